# SPDX-License-Identifier: Apache-2.0
"""A disk that fails while a run writes: one sentence with the file, the cause and what is kept.

Python's own writes raise an OSError. torch and the Rust libraries raise errors of their own that
hold its number in their text or not at all; then a small write to the same place tells it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from growkit.core.errors import GrowkitError
from growkit.core.os_errors import explained
from growkit.training import checkpoints

_RUST = re.compile(r"os error (\d+)")  # safetensors, tokenizers
_TORCH = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream error")
_PROBE_BYTES = 1 << 20
_DEEPEST = 20


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn whatever says that a write into ``folder`` failed into an OSError that names a file."""
    try:
        yield
    except Exception as error:
        found = _os_error(error, folder)
        if found is None or found is error:
            raise
        raise found from error


@contextmanager
def says_what_is_kept(run: Path) -> Iterator[None]:
    """Turn an OSError into a sentence that ends with the checkpoint that the run continues from.

    Args:
        run: ``OUT/training``.

    Raises:
        GrowkitError: with the file and the cause.
    """
    try:
        with writing(run):
            yield
    except OSError as error:
        said = explained(error)
        raise GrowkitError(said.cause, f"{said.remedy} {_kept(run)}".strip()) from error


def _os_error(error: BaseException, folder: Path) -> OSError | None:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and len(chain) < _DEEPEST:
        chain.append(link)
        # torch's distributed checkpoint collects the errors of all processes.
        failures = getattr(link, "failures", None)
        if isinstance(failures, dict):
            chain += [entry[0] for entry in failures.values() if isinstance(entry, tuple)]
        link = link.__cause__ or link.__context__
    for one in chain:
        if isinstance(one, GrowkitError):
            return None
        if isinstance(one, OSError) and one.errno is not None:
            if one.filename is None:
                one.filename = str(folder)
            return one
    for one in chain:
        number = _RUST.search(str(one))
        if number:
            return OSError(int(number[1]), os.strerror(int(number[1])), str(folder))
    if any(sign in str(one) for one in chain for sign in _TORCH):
        return _probe(folder)
    return None


def _probe(folder: Path) -> OSError:
    """What the system says to another write, once torch has said that one failed."""
    path = folder / "probe.partial"
    try:
        with path.open("wb", buffering=0) as file:
            while True:
                written = file.write(bytes(_PROBE_BYTES))
                if written == _PROBE_BYTES:
                    break
    except OSError as error:
        error.filename = str(folder)
        return error
    finally:
        with suppress(OSError):
            path.unlink()
    return OSError(5, os.strerror(5), str(folder))


def _kept(run: Path) -> str:
    places = [run / "checkpoints", *run.glob("stages/*/training/checkpoints")]
    found = [path for place in places for path in checkpoints.list_checkpoints(place)]
    for path in sorted(found, key=checkpoints.step_of, reverse=True):
        with suppress(OSError):
            if checkpoints.damage(path, contents=False) is None:
                return f"{path.name} is whole: the same command continues from there."
    return "No checkpoint is lost: the same command begins again."
