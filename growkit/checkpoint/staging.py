"""The steps of an atomic publish: claim a partial folder, make it durable, exchange names, clean.

Every state after a kill is readable by the next run. The partial folder carries a marker file from
its first moment, so that nothing but our own leftovers is ever deleted. A live run holds a lock
(flock) on the folder itself, which disappears with the process and leaves no file behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from growkit.core import systems
from growkit.core.errors import GrowkitError, UsageError
from growkit.core.os_errors import about, explained

MARKER = ".growkit-partial"


def acquire(partial: Path, out: Path) -> int:
    """Create and lock the partial folder; the descriptor holds the lock."""
    for _ in range(100):
        try:
            partial.mkdir(exist_ok=True)
            descriptor = systems.open_folder(partial)
        except FileExistsError as error:
            raise _foreign(partial) from error
        except FileNotFoundError:
            continue  # another run finished and renamed it away
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _foreign(partial) from error
            with contextlib.suppress(OSError):
                partial.rmdir()  # only while it is empty
            raise not_writable(partial.parent, error) from error
        try:
            _lock(descriptor, out)
            if not systems.is_opened_as(partial, descriptor):
                os.close(descriptor)
                continue
            names = os.listdir(partial)
            if names and MARKER not in names:
                raise _foreign(partial)
            (partial / MARKER).touch()
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, FileNotFoundError):
                continue  # another run that failed has removed it
            with contextlib.suppress(OSError):
                partial.rmdir()
            raise not_writable(partial, error) from error
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
    if not systems.lock_open_file(descriptor):
        raise GrowkitError(
            f"Another run is writing {str(out)!r} now.",
            "Wait for it or choose another output folder.",
        )


def recover(out: Path) -> None:
    """Undo or finish a replacement that was killed between its two renames."""
    with os.scandir(out.parent) as entries:
        found = [
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(f"{out.name}.old-") and entry.is_dir(follow_symlinks=False)
        ]
    for old in found:
        names = os.listdir(old)
        if names and MARKER not in names:
            continue  # not ours
        if names and not out.exists():
            old.rename(out)
            (out / MARKER).unlink(missing_ok=True)
        else:
            remove(old)


def publish(partial: Path, out: Path, locks: list[int], created: Sequence[Path] = ()) -> None:
    """Give the whole folder its final name, in one step where the system can exchange names.

    Args:
        partial: whole and durable.
        out: its name from now on.
        locks: takes the lock of a folder that is replaced.
        created: parents of ``out`` that were made for it.

    Raises:
        OSError: before the renaming; all is as it was.
        GrowkitError: after it: the new folder is there and whole, and something is left over.
    """
    with about(out):
        old = _give_name(partial, out, locks)
    try:
        sync(out.parent)
        for folder in created:
            sync(folder.parent)
        if old is not None:
            remove(old)
        (out / MARKER).unlink(missing_ok=True)
    except OSError as error:
        said = explained(error)
        raise GrowkitError(
            f"{str(out)!r} is in place and whole, but this failed afterwards: {said.cause}",
            "Run the same command again: it finds the folder and cleans up.",
        ) from error
    with contextlib.suppress(OSError):  # at worst the next run finds the marker again
        sync(out)


def _give_name(partial: Path, out: Path, locks: list[int]) -> Path | None:
    """Rename; returns the replaced folder under its last name."""
    if not (out.is_dir() and os.listdir(out)):
        if not systems.FOLDERS_CAN_BE_OPENED and out.is_dir():
            out.rmdir()  # Windows renames onto no folder, not even an empty one
        partial.rename(out)
        return None
    # From here on the old folder may be found under the other name: marked, it will be
    # recognised as ours; locked, no other run takes it for a leftover while we remove it.
    locks.append(systems.open_folder(out, follow=True))
    _lock(locks[-1], out)
    try:
        (out / MARKER).touch()
        if _exchange(partial, out):
            return partial
        old = out.with_name(f"{out.name}.old-{os.getpid()}")
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
        return old
    except BaseException:
        with contextlib.suppress(OSError):
            (out / MARKER).unlink(missing_ok=True)
        raise


def remove_marker(out: Path) -> None:
    """Remove what an unfinished publication left in a folder that is known to be whole.

    A run that is replacing the folder now needs its marker and holds its lock.
    """
    if not (out / MARKER).exists():
        return
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, out)
        (out / MARKER).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically (Linux renameat2 with RENAME_EXCHANGE); False where it cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # macOS and Windows have none
        return False
    at_fdcwd, rename_exchange = -100, 2
    arguments = at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange
    while renameat2(*arguments) != 0:
        if ctypes.get_errno() != errno.EINTR:
            return False
    return True


def sync(path: Path) -> None:
    with about(path):
        systems.sync_path(path)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder; files that are already durable cost nothing."""

    def fail(error: OSError) -> None:  # os.walk would leave a folder out without a word
        raise error

    for root, _, names in os.walk(folder, onerror=fail):
        for name in names:
            path = Path(root, name)
            if stat.S_ISREG(path.stat(follow_symlinks=False).st_mode):
                sync(path)
        sync(Path(root))


def clear(folder: Path, *, keep_marker: bool) -> None:
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


def remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        clear(folder, keep_marker=False)
        folder.rmdir()


def not_writable(folder: Path, error: OSError) -> GrowkitError:
    remedy = "Choose an output folder where you may write."
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
        remedy = explained(error).remedy or remedy
    return GrowkitError(
        f"The output cannot be written into {str(folder)!r}: {error.strerror}.", remedy
    )
