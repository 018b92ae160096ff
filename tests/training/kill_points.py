"""Kill a command before its k-th change of a folder, for any k, and run it again.

The changes are those that Python announces to audit hooks (opening for writing, renaming, removing,
making folders, linking, truncating), counted below one folder. A child that is forked from this
process, which has imported everything, is killed by SIGKILL from within its hook.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Names in audit events -> how many of their arguments are paths.
CHANGES = {
    "os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2,
    "os.truncate": 1, "os.chmod": 1, "shutil.copyfile": 2, "shutil.rmtree": 1,
}  # fmt: skip
Work = Callable[[], Any]


def _paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    if event == "open":
        path, mode, flags = arguments
        changes = (flags or 0) & WRITES or (mode and set(mode) & set("wax+"))
        return [os.fspath(path)] if changes and not isinstance(path, int) else []
    count = CHANGES.get(event, 0)
    return [os.fspath(path) for path in arguments[:count] if not isinstance(path, int)]


def in_child(work: Work, folder: Path, at: int | None, log: Path) -> tuple[int, list[str]]:
    """Run ``work`` in a child; kill it before change number ``at`` (from 0 on) below ``folder``.

    Returns:
        Its exit status (negative: a signal), and the changes it made or was about to make.
    """
    listing = log.with_suffix(".changes")
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status), listing.read_text().splitlines()
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.fsync = lambda descriptor: None
        seen = os.open(listing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        own, inside, count = os.getpid(), str(folder), 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event != "open" and event not in CHANGES:
                return
            paths = [path for path in _paths(event, arguments) if str(path).startswith(inside)]
            if not paths or os.getpid() != own:
                return
            os.write(seen, f"{event} {paths[-1].removeprefix(inside)}\n".encode())
            if count == at:
                os.kill(own, signal.SIGKILL)
            count += 1

        sys.addaudithook(hook)
        code = work()
        os._exit(code if isinstance(code, int) else 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)


def content(folder: Path) -> dict[str, str]:
    """Digest of every file that a repeated command must make again, by name.

    Times are left out of metrics; the trainer's own state and locks may differ.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.suffix in (".lock", ".png") or path.name == ".lock":
            continue
        if path.name in ("trainer_state.json", "manifest.json", "file-hashes.json"):
            found[name] = ""
        elif path.name == "training_args.bin":
            continue
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
            found[name] = json.dumps(rows)
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def sweep(
    make: Callable[[Path], Work],
    place: Path,
    points: list[int] | None = None,
    *,
    step: int = 1,
    only: Callable[[str], bool] = lambda change: True,
) -> tuple[int, list[str]]:
    """Kill at every change (or at ``points``), repeat, compare with the uninterrupted run.

    Args:
        make: the command for an output folder.
        place: a scratch folder.
        only: takes those of the changes for which it is true.

    Returns:
        The number of kills, and a line for each that did not end in the same bytes.
    """
    out, log = place / "case" / "out", place / "log"  # one path: some files name their folder
    out.parent.mkdir(parents=True)
    code, changes = in_child(make(out), out.parent, None, log)
    assert code == 0, log.read_text()[-2000:]
    expected = content(out.parent)
    chosen = range(0, len(changes), step) if points is None else points
    failures, kills = [], 0
    for point in chosen:
        if not only(changes[point]):
            continue
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        code, made = in_child(make(out), out.parent, point, log)
        kills += code == -signal.SIGKILL
        where = f"{point} of {len(changes)}: {made[-1]}"
        code, _ = in_child(make(out), out.parent, None, log)
        found = content(out.parent)
        problem = ""
        if code != 0:
            problem = f"exit {code}: {log.read_text()[-300:]}"
        elif found != expected:
            names = [n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)]
            problem = f"differs in {sorted(names)[:6]}"
        if problem:
            failures.append(f"{where}: {problem}")
        print(f"{where}: {problem or 'same'}", flush=True)  # a long sweep: seen with pytest -s
    return kills, failures
