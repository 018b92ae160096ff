# SPDX-License-Identifier: Apache-2.0
"""One process that runs commands on damaged folders: ``worker.py FOLDER FIRST COUNT``.

Prints one JSON line for each fault, and a last line with the counts. A fault is a traceback, more
than 5 s of processor time (or 60 s of waiting), 500 MB, or an output that a failure leaves behind.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import typer  # noqa: E402
from damage import copy, damage  # noqa: E402
from templates import make_all  # noqa: E402

from growkit.cli import app  # noqa: E402
from growkit.cli.main import main  # noqa: E402
from growkit.core.errors import GrowkitError  # noqa: E402

MEMORY = 500_000_000
SECONDS = 5.0
OUTPUTS = ("out", "out.html")


class Hang(BaseException):
    """The command took too long."""


def _hang(*_: Any) -> None:
    raise Hang


def _megabytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def resume(folder: Path, recipe: Path) -> int:
    """What ``growkit train`` reads of a run folder before it trains."""
    from growkit.core.progress import Silent
    from growkit.core.records import read_record
    from growkit.record.manifest import read_training_record
    from growkit.training.data_position import DATA, DataBegin
    from growkit.training.growth.stage_end import read_stop
    from growkit.training.read_recipe import load_recipe
    from growkit.training.run_folder import open_run, resume_point

    try:
        place = folder / "training"
        with open_run(load_recipe(recipe), folder, place, "auto", False, Silent()):
            read_record(place / DATA, DataBegin)
            resume_point(place / "checkpoints", "auto", Silent())
            read_training_record(folder)
            read_stop(place)
    except GrowkitError as error:
        return error.exit_code
    return 0


def read(folder: Path) -> int:
    """What ``growkit report`` reads before it draws."""
    from growkit.report import read_runs

    try:
        read_runs([folder])
    except GrowkitError as error:
        return error.exit_code
    return 0


def commands(name: str, folder: Path, templates: dict[str, Path]) -> list[Callable[[], int]]:
    """What is run on a damaged copy of a template."""
    out, given = str(folder.parent / "out"), str(folder)
    if name == "run":
        report = ["report", given, "-q", "--out", str(folder.parent / "out.html")]
        recipe = templates["recipes"] / "train.yaml"
        # Drawing takes a second or more, so most cases end where the runs are read.
        return [lambda: read(folder), lambda: resume(folder, recipe)] * 6 + [lambda: main(report)]
    if name == "recipes":
        llama = str(templates["llama"])
        grow = ["plan", llama, "--recipe", f"{given}/grow.yaml"]
        train = ["plan", llama, "--layers", "+1", "--train-recipe", f"{given}/train.yaml"]
        return [lambda: main(grow), lambda: main(train)]
    grown = [] if name == "t5" else ["--layers", "+1"]
    option = ["--ffn", "x2"] if name in ("t5", "gpt2") else ["--heads", "x2"]
    if name in ("gda", "motif", "diffllama"):
        option = ["--signal-heads", "x2"]
    other = str(templates["llama" if name == "grown" else name])
    return [
        lambda: main(["inspect", given]),
        lambda: main(["plan", given, *grown, *option]),
        lambda: main(["grow", given, *grown, *option, "--no-verify", "-q", "--out", out]),
        lambda: main(["diff", other, given]),
    ]


def one(seed: int, place: Path, templates: dict[str, Path]) -> dict[str, Any] | None:
    """Run one case; the fault, if there is one."""
    rng = random.Random(seed)
    name = rng.choice(sorted(templates))
    if name not in ("run", "recipes") and rng.random() < 0.3:
        name = rng.choice(("run", "recipes", "state", "grown"))
    work = place / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    done = damage(rng, copy(templates[name], work / "in"))
    number = rng.randrange(1000)
    run = commands(name, work / "in", templates)
    case = {"seed": seed, "template": name, "damage": done, "command": number % len(run)}
    Path("/proc/self/clear_refs").write_text("5")
    before = _megabytes("VmRSS")
    said = io.StringIO()
    fault, code = "", -1
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = run[number % len(run)]()
    except Hang:
        fault = "hang: " + traceback.format_exc()[-600:]
    except BaseException:
        fault = "traceback: " + traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    used = _megabytes("VmHWM") - before
    left = sorted(p.name for p in work.iterdir() if p.name != "in")
    if "unexpected failure" in said.getvalue() or "Traceback (most" in said.getvalue():
        fault = "traceback: " + said.getvalue()[-1500:]
    elif not fault and code not in (0, 1, 2, 3):
        fault = f"exit code {code}"
    elif not fault and used > MEMORY:
        fault = f"memory: {used / 1e6:.0f} MB"
    elif not fault and left and (code != 0 or not set(left) <= set(OUTPUTS)):
        fault = f"partial output: {left} after exit code {code}"
    return case | {"fault": fault, "said": said.getvalue()[-200:]} if fault else None


def work(place: Path, first: int, count: int) -> None:
    signal.signal(signal.SIGPROF, _hang)
    signal.signal(signal.SIGALRM, _hang)
    command = typer.main.get_command(app.build_app())  # made once: a fifth of a second a call
    app.build_app = lambda given: command  # type: ignore[assignment, return-value]
    templates = make_all(place / "templates")
    for run in commands("run", templates["run"], templates)[:2]:
        run()  # imports are no part of a case
    main(["plan", str(templates["grown"]), "--layers", "+1", "-q"])
    resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9, 6 * 10**9))
    faults = 0
    for seed in range(first, first + count):
        (place / "seed").write_text(str(seed))  # for whoever finds the process dead
        fault = one(seed, place, templates)
        if fault is not None:
            faults += 1
            print(json.dumps(fault), flush=True)
    print(json.dumps({"cases": count, "faults": faults}), flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
