"""A folder with the final name is always whole: write beside it, make it durable, rename.

Two markers make every state after a kill readable by the next run. ``OUT.partial`` carries a
marker file from its first moment, so that nothing but our own leftovers is ever deleted. A live
run holds a lock (flock) on the folder itself: it disappears with the process and leaves no file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from growkit.errors import GrowkitError, UsageError

MARKER = ".growkit-partial"
_CHECKPOINT_SIGNS = ("config.json", "growkit.json", "model.safetensors")
_NO_LOCKS_HERE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL}


@contextmanager
def staged_output(
    out: Path, *, overwrite: bool, needed_bytes: int, sources: Sequence[Path]
) -> Iterator[Path]:
    """Give a folder ``OUT.partial`` to write into; publish it as ``out`` on normal exit.

    On any exception (Ctrl-C too) the partial folder is removed and an older ``out`` is untouched.
    After a kill, ``out`` is absent, the old one or the new one, never a part; the next run removes
    what is left over.

    Args:
        out: the final folder; missing parents are created.
        overwrite: replace an existing non-empty checkpoint folder.
        needed_bytes: what will be written; compared with the free space first.
        sources: folders that are read; ``out`` may not be, hold or lie in one of them.

    Raises:
        UsageError: ``out`` cannot be used: a source, a file, not empty without ``overwrite``, or
            with ``overwrite`` not a checkpoint.
        GrowkitError: too little space, no permission, or another run is writing the same ``out``.
    """
    out = Path(out).resolve()
    partial = out.with_name(out.name + ".partial") if out.name else out
    _check_target(out, partial, overwrite, sources)
    created = _make_parents(out.parent)
    locks: list[int] = []
    try:
        locks.append(_acquire(partial, out))
        try:
            _recover(out)
            _clear(partial, keep_marker=True)
            _check_space(out.parent, needed_bytes)
            yield partial
            _sync_tree(partial)
            _publish(partial, out, locks)
        except BaseException:
            if _same(partial, locks[0]):
                _remove(partial)
            raise
    except BaseException:
        for folder in created:  # deepest first; a folder that someone else used stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        for descriptor in locks:
            os.close(descriptor)


def _check_target(out: Path, partial: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    if os.path.ismount(out):
        raise UsageError(f"{str(out)!r} is a mount point.", "Choose a new folder inside it.")
    for source in (Path(item).resolve() for item in sources):
        for folder in (out, partial):
            if folder == source or folder in source.parents or source in folder.parents:
                relation = "is" if folder == source else "holds or lies in"
                raise UsageError(
                    f"The output {str(folder)!r} {relation} the source {str(source)!r}.",
                    "Choose an output folder beside the source.",
                )
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"The output {str(out)!r} is a file.", "Choose a folder.")
    names = os.listdir(out)
    if not names:
        return
    if not overwrite:
        raise UsageError(
            f"The output {str(out)!r} exists and is not empty.",
            "Choose another folder, or replace it with --overwrite.",
        )
    if not any(name in _CHECKPOINT_SIGNS for name in names):
        raise UsageError(
            f"{str(out)!r} does not look like a checkpoint, so --overwrite does not replace it.",
            "Choose another folder or remove it yourself.",
        )


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; the created ones, deepest first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
    except OSError as error:
        raise _not_writable(parent, error) from error
    return missing


def _not_writable(folder: Path, error: OSError) -> GrowkitError:
    return GrowkitError(
        f"The output cannot be written into {str(folder)!r}: {error.strerror}.",
        "Choose an output folder where you may write.",
    )


def _acquire(partial: Path, out: Path) -> int:
    """Create and lock the partial folder; the descriptor holds the lock."""
    for _ in range(100):
        try:
            partial.mkdir(exist_ok=True)
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileExistsError as error:
            raise _foreign(partial) from error
        except FileNotFoundError:
            continue  # another run finished and renamed it away
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _foreign(partial) from error
            raise _not_writable(partial.parent, error) from error
        try:
            _lock(descriptor, out)
            if not _same(partial, descriptor):
                os.close(descriptor)
                continue
            names = os.listdir(partial)
            if names and MARKER not in names:
                raise _foreign(partial)
            (partial / MARKER).touch()
        except OSError as error:
            os.close(descriptor)
            raise _not_writable(partial, error) from error
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor
    raise GrowkitError(
        f"{str(partial)!r} is created and removed by other runs all the time.",
        "Choose another output folder.",
    )


def _foreign(partial: Path) -> UsageError:
    return UsageError(
        f"{str(partial)!r} exists and was not made by growkit.",
        "Move it away or choose another output folder.",
    )


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise GrowkitError(
            f"Another run is writing {str(out)!r} now.",
            "Wait for it or choose another output folder.",
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:  # some network file systems have no locks
            raise


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise GrowkitError(
            f"The output needs {needed_bytes / 1e9:.3g} GB and {str(folder)!r} has "
            f"{free / 1e9:.3g} GB free.",
            "Free some space or choose an output folder on another disk.",
        )


def _recover(out: Path) -> None:
    """Undo or finish a replacement that was killed between its two renames."""
    for old in _old_folders(out):
        if out.exists():
            _remove(old)
        else:
            old.rename(out)
            (out / MARKER).unlink(missing_ok=True)


def _old_folders(out: Path) -> list[Path]:
    with os.scandir(out.parent) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(f"{out.name}.old-")
            and entry.is_dir(follow_symlinks=False)
            and os.path.exists(os.path.join(entry.path, MARKER))
        )


def _publish(partial: Path, out: Path, locks: list[int]) -> None:
    """Give the whole folder its final name, in one step where the system can exchange names."""
    if out.is_dir() and os.listdir(out):
        # From here on the old folder may be found under the other name: marked, it will be
        # recognised as ours; locked, no other run takes it for a leftover while we remove it.
        locks.append(os.open(out, os.O_RDONLY | os.O_DIRECTORY))
        _lock(locks[-1], out)
        (out / MARKER).touch()
        old = partial
        if not _exchange(partial, out):
            old = out.with_name(f"{out.name}.old-{os.getpid()}")
            out.rename(old)
            try:
                partial.rename(out)
            except BaseException:
                old.rename(out)
                (out / MARKER).unlink(missing_ok=True)
                raise
        _sync(out.parent)
        (out / MARKER).unlink(missing_ok=True)
        _remove(old)
    else:
        partial.rename(out)
        _sync(out.parent)
        (out / MARKER).unlink(missing_ok=True)
    _sync(out)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically (Linux renameat2 with RENAME_EXCHANGE); False where it cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    result: int = renameat2(
        at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange
    )
    return result == 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """fsync every file and folder; files that are already durable cost nothing."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if stat.S_ISREG(path.stat(follow_symlinks=False).st_mode):
                _sync(path)
        _sync(Path(root))


def _clear(folder: Path, *, keep_marker: bool) -> None:
    """Remove the content, the marker last: half removed, it is still recognised as ours."""
    for name in os.listdir(folder):
        path = folder / name
        if name == MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not keep_marker:
        (folder / MARKER).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        _clear(folder, keep_marker=False)
        folder.rmdir()
