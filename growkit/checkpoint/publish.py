"""A folder with the final name is always whole: write beside it, make it durable, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from growkit.checkpoint.side_files import Overwrite, check_replaceable
from growkit.checkpoint.staging import (
    acquire,
    clear,
    not_writable,
    publish,
    recover,
    remove,
    sync_tree,
)
from growkit.core.errors import GrowkitError, UsageError
from growkit.core.files import output_path
from growkit.core.names import CONFIG, MANIFEST, SINGLE_FILE
from growkit.core.os_errors import about
from growkit.core.quantities import human_bytes
from growkit.core.systems import is_opened_as

_CHECKPOINT_SIGNS = (CONFIG, MANIFEST, SINGLE_FILE)


@contextmanager
def staged_output(
    out: Path, *, overwrite: Overwrite, needed_bytes: int, sources: Sequence[Path]
) -> Iterator[Path]:
    """Give a folder ``OUT.partial`` to write into; publish it as ``out`` on normal exit.

    On any exception (Ctrl-C too) the partial folder is removed and an older ``out`` is untouched.
    After a kill, ``out`` is absent, the old one or the new one, never a part; the next run removes
    what is left over.

    Args:
        out: the final folder; missing parents are created.
        overwrite: replace an existing non-empty checkpoint folder; ``"all"``: also one with files
            that neither growkit nor transformers wrote.
        needed_bytes: what will be written; compared with the free space first.
        sources: folders that are read; ``out`` may not be, hold or lie in one of them.

    Raises:
        UsageError: ``out`` cannot be used: a source, a file, not empty without ``overwrite``, or
            with ``overwrite`` not a checkpoint, or one with foreign files.
        GrowkitError: too little space, no permission, or another run is writing the same ``out``.
    """
    out = output_path(out)
    partial = out.with_name(out.name + ".partial") if out.name else out
    _check_target(out, partial, overwrite, sources)
    created = _make_parents(out.parent)
    locks: list[int] = []
    try:
        locks.append(acquire(partial, out))
        try:
            with about(out.parent):
                recover(out)
            _check_target(out, partial, overwrite, sources)  # an old folder may be back
            clear(partial, keep_marker=True)
            _check_space(out, needed_bytes)
            yield partial
            sync_tree(partial)
            _check_target(out, partial, overwrite, sources)  # somebody may have filled it meanwhile
            publish(partial, out, locks, created)
        except BaseException:
            if is_opened_as(partial, locks[0]):
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    remove(partial)
            raise
    except BaseException:
        for folder in created:  # deepest first; a folder that someone else used stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        for descriptor in locks:
            os.close(descriptor)


def _check_target(out: Path, partial: Path, overwrite: Overwrite, sources: Sequence[Path]) -> None:
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
    check_replaceable(out, overwrite)


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; the created ones, deepest first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    nearest = next(folder for folder in (parent, *parent.parents) if folder not in missing)
    if not nearest.is_dir():
        raise UsageError(
            f"The output cannot be written into {str(nearest)!r}, which is a file.",
            "Choose another folder.",
        )
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
    except OSError as error:
        raise not_writable(parent, error) from error
    return missing


def _check_space(out: Path, needed_bytes: int) -> None:
    """An old folder stays beside the new one until that is whole, so both need space at once."""
    free = shutil.disk_usage(out.parent).free
    if needed_bytes <= free:
        return
    cause = f"The output needs {_size(needed_bytes)}"
    remedy = "Free some space or choose an output folder on another disk."
    if out.is_dir() and (freed := _freed_by_removal(out)):
        cause += " beside the old folder, which stays until the new one is whole,"
        if needed_bytes <= free + freed:
            remedy = (
                f"Remove the old folder first, which frees {_size(freed)}, or choose an output "
                "folder on another disk."
            )
        else:
            remedy += f" The old folder takes {_size(freed)}."
    raise GrowkitError(f"{cause} and {str(out.parent)!r} has {_size(free)} free.", remedy)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else human_bytes(count)


def _freed_by_removal(folder: Path) -> int:
    """Bytes on disk that nothing else holds: without holes, and without files of several names."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            found = os.lstat(os.path.join(root, name))
            if found.st_nlink == 1:
                total += getattr(found, "st_blocks", -(-found.st_size // 512)) * 512
    return total
