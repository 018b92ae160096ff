# SPDX-License-Identifier: Apache-2.0
"""The one place where an OSError becomes a sentence: the file, the cause, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from growkit.core.errors import GrowkitError

_OTHER_OUTPUT = "choose another output folder"
# errno -> (cause, remedy); {file} is the quoted path, or "a file" where the system names none.
_SENTENCES = {
    errno.ENOSPC: (
        "The disk became full while {file} was written.",
        f"Free some space or {_OTHER_OUTPUT}.",
    ),
    errno.EDQUOT: (
        "The disk became full for you while {file} was written: your quota is used up.",
        f"Free some of it or {_OTHER_OUTPUT}.",
    ),
    errno.EFBIG: (
        "{file} became larger than its file system or a limit (ulimit -f) allows.",
        f"Give a smaller --max-shard-size, or {_OTHER_OUTPUT}.",
    ),
    errno.EROFS: ("{file} is on a read-only file system.", "Choose another output folder."),
    errno.EACCES: ("No permission to use {file}.", "Choose another folder, or change its mode."),
    errno.EPERM: ("The system does not permit to use {file}.", "Choose another folder."),
    errno.EIO: (
        "The disk failed at {file}: Input/output error.",
        "Look at the system's log; run the command again on a disk that works.",
    ),
    errno.EMFILE: (
        "{file} cannot be opened: this process has as many files open as it may.",
        "Raise the limit, for example with: ulimit -n 4096.",
    ),
    errno.ENFILE: (
        "{file} cannot be opened: the system has as many files open as it can.",
        "End other programs, or ask who runs the machine to raise fs.file-max.",
    ),
    errno.EINTR: ("A signal interrupted the use of {file}.", "Run the command again."),
    errno.ENAMETOOLONG: ("The name {file} is too long for the system.", "Choose a shorter path."),
    errno.ELOOP: ("Links lead in a circle at {file}.", "Give the path of the folder itself."),
    errno.ENOENT: ("{file} does not exist.", "It may have been removed meanwhile: check the path."),
    errno.ENOTDIR: ("{file} leads through a file, not a folder.", "Check the path."),
    errno.ESTALE: (
        "{file} was removed or exchanged on its file server while it was used.",
        "Run the command again when nothing else uses it.",
    ),
    errno.EBUSY: ("{file} is in use by the system.", "Run the command again when it is free."),
}
# Where two files are named (a copy, a rename), these speak of the second one.
_ABOUT_THE_TARGET = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


# The system failed, and the file may be sound: nobody may take it for damaged or missing.
_FAILURES = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.EINTR, errno.ENOMEM, errno.ESTALE}


def system_failed(error: BaseException) -> bool:
    """Whether the operating system failed, rather than the file being bad or not there."""
    return isinstance(error, OSError) and error.errno in _FAILURES


def explained(error: OSError) -> GrowkitError:
    """The sentence for an error of the operating system, with the file if it is known."""
    name = error.filename
    if error.filename2 is not None and error.errno in _ABOUT_THE_TARGET:
        name = error.filename2
    file = "a file" if name is None or isinstance(name, int) else repr(_shown(name))
    if name is None and error.errno == errno.ENOSPC:
        return GrowkitError("The disk is full.", _SENTENCES[errno.ENOSPC][1])
    if error.errno in _SENTENCES:
        cause, remedy = _SENTENCES[error.errno]
        cause = cause.format(file=file)
        return GrowkitError(cause[0].upper() + cause[1:], remedy)
    lines = str(error.strerror or error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    if error.errno is None:  # a library's own OSError: its text says all that is known
        return GrowkitError(f"{reason[:1].upper()}{reason[1:]}.", "--verbose shows where.")
    return GrowkitError(f"{file[0].upper()}{file[1:]} cannot be used: {reason}.")


@contextmanager
def about(path: os.PathLike[str] | str) -> Iterator[None]:
    """Name ``path`` in an OSError that names no file, as those of open descriptors do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def _shown(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"
