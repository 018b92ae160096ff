"""One training run of a study: the process ``python -m growkit.study.one_run FOLDER PARENT``.

FOLDER holds ``node.json``, what to do, and gets::

    source/         the model that the run starts from, grown or converted and verified
    model/          the run (see growkit.training.run): trained weights at its top
    record.json     what is kept of it

A run that was killed continues from its last checkpoint, and comes to the same result. One process
makes a run; it ends when the study that started it is gone.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ConfigDict

from growkit import __version__
from growkit.core import records as core_records
from growkit.core.errors import CheckpointError, Diverged, GrowkitError
from growkit.core.files import open_lock
from growkit.core.names import METRICS, RECIPE
from growkit.core.printed_text import printable
from growkit.core.systems import lock_record
from growkit.core.writing import write_whole
from growkit.core.yaml_files import read_yaml
from growkit.record.manifest import read_training_record
from growkit.study import run_records as kept
from growkit.study.recipe import Start
from growkit.study.run_records import MODEL, NODE, RECORD, Record, can_go_on, read_record
from growkit.study.shapes import apply_change
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe

# EX_TEMPFAIL of sysexits.h: another process makes this run at the moment.
BUSY = 75


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder to itself for the time being.

    On a file system without locks everybody has it: two studies must not share such a folder.
    """
    with open_lock(folder / ".lock") as file:
        yield lock_record(file.fileno())


def end_with_parent(parent: int, interval: float = 2.0) -> None:
    """Send this process SIGTERM when its parent is gone (killed, too): nobody waits for it.

    Args:
        parent: process id; the parent says it, for it may be gone before it is asked.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


BEGIN_ANEW = "Remove the folder of the run; it is made again."


class NodeRecord(core_records.Record):
    """What node.json holds; the study that waits for the run wrote it."""

    model_config = ConfigDict(extra="ignore")
    remedy: ClassVar[str] = BEGIN_ANEW

    key: str
    name: str
    start: dict[str, Any]
    recipe: dict[str, Any]
    parent: str | None
    parameters: int
    flops_per_token: float
    has_children: bool
    measures: list[str]
    series: list[str]


def _node(folder: Path) -> dict[str, Any]:
    return core_records.read_record(folder / NODE, NodeRecord).model_dump()


def work(folder: Path) -> Record:
    """Make the run that ``folder/node.json`` describes, or continue with it.

    Raises:
        GrowkitError: whatever the growth or the training raises, but not for a loss that is NaN:
            that is a result.
    """
    node = _node(folder)
    start = Start.model_validate(node["start"])
    values, manifest = node["recipe"], None
    if node["parent"] is not None:
        source, manifest = _source(start, Path(node["parent"]), folder / "source")
        values["model"] |= {"checkpoint": str(source)}
        values["model"].pop("config", None)
        # All arms of a study read the same samples.
        values["data"] |= {"start": "beginning"}
    from growkit.training import train

    # Arms are compared to the last digits: no clock decides about their arithmetic.
    values["training"].setdefault("torch_compile", False)
    recipe = make_recipe(values, node["name"])
    model, diverged = folder / MODEL, None
    _move(model / "training" / RECIPE, recipe)
    try:
        train(recipe, model)
    except Diverged as error:
        diverged = error.cause
    rows = read_metrics(model / "training" / METRICS)
    diverged = diverged or kept.not_finite(rows)
    final = _final(model)
    measures = {} if diverged else kept.measures(model, recipe, rows, node["measures"])
    record = Record(
        key=node["key"],
        name=node["name"],
        change=None if manifest is None else _in_words(start),
        exactness=None if manifest is None else _exactness(manifest),
        parameters=node["parameters"],
        flops_per_token=node["flops_per_token"],
        steps=recipe.total_steps - recipe.first_step,
        tokens=(recipe.total_steps - recipe.first_step) * recipe.tokens_per_step,
        learning_rate=recipe.training.learning_rate,
        seconds=kept.training_seconds(rows, recipe.first_step * recipe.tokens_per_step),
        curve=kept.curve(rows, recipe.first_step * recipe.tokens_per_step),
        measures=measures,
        series=kept.series(rows, node["series"]),
        machine=machine(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        held_out_tokens=final.get("held_out_tokens", 0),
        diverged=diverged,
        recipe=_without_places(final.get("recipe", {})),
    )
    record.write(folder / RECORD)
    _clean(folder, keep_state=node["has_children"])
    return record


# Where a recipe says that files are. The key of the run vouches for what is in them.
PLACES = {
    "model": ["checkpoint"],
    "data": ["files", "eval_files", "tokens", "eval_tokens"],
    "tokenizer": ["path"],
}


def _move(stored: Path, recipe: Recipe) -> None:
    """A run that was begun elsewhere (the folder of runs or its text was moved) may continue."""
    if not stored.is_file():
        return
    old, new = read_yaml(stored, error=CheckpointError, remedy=BEGIN_ANEW), recipe.to_dict()
    for section, keys in PLACES.items():
        for key in keys:
            if key in (new.get(section) or {}):
                old.setdefault(section, {})[key] = new[section][key]
    write_whole(stored, yaml.safe_dump(old, sort_keys=False))


def _source(start: Start, parent: Path, target: Path) -> tuple[Path, dict[str, Any] | None]:
    """The folder that the run starts from, made once, and the manifest of its change."""
    from growkit.record.manifest import read_manifest

    if start.change is None and start.checkpoint is not None:
        return parent, None
    if start.change is None:
        if not target.is_dir():
            carry_over(parent, target)
        return target, None
    if not target.is_dir():
        apply_change(start, parent, target)
    return target, read_manifest(target)


def carry_over(source: Path, target: Path) -> None:
    """A copy of a trained folder with its optimizer state, so that a run continues as it was.

    It is the growth that changes nothing.
    """
    from growkit.checkpoint import open_checkpoint
    from growkit.growing import WriteOptions, publish_plan
    from growkit.optimizer_state.find import find_state
    from growkit.optimizer_state.write import GrownState
    from growkit.surgery.plan import build_plan

    with open_checkpoint(source) as checkpoint:
        plan = build_plan(checkpoint, [])
        state = find_state(source)
        optimizer = None if state is None else GrownState(plan, state, "grow")
        publish_plan(plan, target, {}, WriteOptions(verify=False), optimizer=optimizer)


def _in_words(start: Start) -> str:
    change = start.change or {}
    (kind, values), *_ = change.items()
    return f"{kind}: " + ", ".join(f"{key} {value}" for key, value in values.items())


def _exactness(manifest: dict[str, Any]) -> str:
    verified = (manifest.get("verification") or {}).get("summary", "not verified")
    return f"{(manifest.get('plan') or {}).get('exactness')}; {verified}"


def _without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps of the recipe: folders of this machine mean nothing on another."""
    model = {key: value for key, value in recipe.get("model", {}).items() if key != "checkpoint"}
    return {"model": model, "training": recipe.get("training", {})} if recipe else {}


def _final(model: Path) -> dict[str, Any]:
    return read_training_record(model) or {}


def _clean(folder: Path, *, keep_state: bool) -> None:
    """Leave the weights, and optimizer state where another run continues from them."""
    shutil.rmtree(folder / "source", ignore_errors=True)
    if not keep_state:
        shutil.rmtree(folder / "model" / "training" / "checkpoints", ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """The worker process: exit 1 and one line on stderr for a failure.

    Args:
        arguments: the folder, and the process id of the study that waits for the run.
    """
    from growkit.core.process import wait_passively

    wait_passively()
    folder, parent = Path(arguments[0]), int(arguments[1])
    end_with_parent(parent)
    with held(folder) as alone:
        if not alone:
            return BUSY
        try:
            if not _is_made(folder):
                work(folder)
        except GrowkitError as error:
            print(printable(f"{error.cause} {error.remedy}"), file=sys.stderr)
            return error.exit_code
    return 0


def _is_made(folder: Path) -> bool:
    """Another study may have made it since this process was started, and kept what is needed."""
    record = read_record(folder / RECORD)
    if record is None or record.diverged:
        return record is not None
    node = _node(folder)
    return not node["has_children"] or can_go_on(folder / MODEL)


def machine() -> dict[str, Any]:
    """Processor, cores and versions; the accelerator and torch where torch is imported."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "growkit": __version__,
    }
    if "torch" in sys.modules:
        import torch

        found["torch"] = torch.__version__
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["accelerator"] = torch.cuda.get_device_name(0)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
