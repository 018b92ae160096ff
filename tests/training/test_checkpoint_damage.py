"""Damage that keeps sizes: found by checksums, and by trying what would be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_runs import cut_back, make, weights

from growkit.cli.main import main
from growkit.core.errors import CheckpointError
from growkit.training import train
from growkit.training.checkpoints import damage, newest_whole
from growkit.training.checksums import checksum
from growkit.training.moments import check_optimizer_state
from growkit.training.optimizer import GrowthOptimizer
from growkit.training.run_files import MOST_PROCESSES


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(make(text_file), out)
    return out


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    """The newest of two whole checkpoints."""
    shutil.copytree(finished, tmp_path / "run")
    cut_back(tmp_path / "run", 6)
    return tmp_path / "run" / "training" / "checkpoints" / "checkpoint-6"


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "config.json"]
)
@pytest.mark.parametrize("harm", [zero, flip])
def test_same_size_other_bytes(name: str, harm: Callable[[Path], None], checkpoint: Path) -> None:
    harm(checkpoint / name)
    newest, skipped = newest_whole(checkpoint.parent)
    assert newest == checkpoint.with_name("checkpoint-3")
    assert skipped == [(checkpoint, f"{name} has other bytes than were written")]


def test_flipped_bit_is_said_and_the_run_ends_the_same(
    finished: Path, checkpoint: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    flip(checkpoint / "optimizer.pt")
    run = checkpoint.parents[2]
    recipe = run.with_name("recipe.yaml")
    recipe.write_text(yaml.safe_dump(make(text_file).to_dict()))
    assert main(["train", str(recipe), "--out", str(run)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoint-6 is damaged (optimizer.pt has other bytes than were written)" in said
    assert "Going on from checkpoint-3." in said
    assert weights(run) == weights(finished)


def as_format_1(checkpoint: Path, **changes: Any) -> None:
    """As an older growkit wrote it: sizes alone."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["xxh3"]
    sizes = {name: (checkpoint / name).stat().st_size for name in manifest["files"]}
    path.write_text(json.dumps(manifest | {"format": 1, "files": sizes} | changes))


def test_older_checkpoints_stay_readable(checkpoint: Path) -> None:
    as_format_1(checkpoint)
    assert damage(checkpoint) is None
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for key in ("processes", "strategy"):
        del manifest[key]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert damage(checkpoint) is None


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_without_checksums_what_cannot_be_loaded_is_damaged(name: str, checkpoint: Path) -> None:
    zero(checkpoint / name)
    as_format_1(checkpoint)
    assert damage(checkpoint) == f"'{name}' cannot be read by torch"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("optimizer.pt", 5, "optimizer.pt is not the state of an optimizer"),
        ("scheduler.pt", {"last_epoch": "x"}, "scheduler.pt is not the state of a schedule"),
        ("rng_state.pth", {"python": 1}, "rng_state.pth is not the state of random numbers"),
        ("rng_state.pth", None, "rng_state.pth is not the state of random numbers"),
    ],
)
def test_state_of_another_kind(name: str, content: Any, reason: str, checkpoint: Path) -> None:
    torch.save(content, checkpoint / name)
    as_format_1(checkpoint)
    assert damage(checkpoint) == reason


def test_position_beyond_the_generators_memory(checkpoint: Path) -> None:
    """numpy takes it, and reads there."""
    from growkit.training.checkpoint_state import load_state

    state = load_state(checkpoint / "rng_state.pth")
    kind, values, _, *rest = state["numpy"]
    torch.save({**state, "numpy": (kind, values, 10**6, *rest)}, checkpoint / "rng_state.pth")
    as_format_1(checkpoint)
    assert damage(checkpoint) == "rng_state.pth is not the state of random numbers"


@pytest.mark.parametrize("count", [10**9, MOST_PROCESSES, 0, -1, "2", None, 1.5])
def test_number_of_processes_is_never_counted_to(count: Any, checkpoint: Path) -> None:
    as_format_1(checkpoint, processes=count)
    assert damage(checkpoint) is not None


def test_missing_checksums_are_not_passed_over(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["xxh3"]["optimizer.pt"]
    path.write_text(json.dumps(manifest))
    assert damage(checkpoint) == "a checksum was never in it"


def test_checksum_is_that_of_xxhash(tmp_path: Path) -> None:
    import xxhash

    content = bytes(range(256)) * 9000  # more than two blocks
    (tmp_path / "x").write_bytes(content)
    assert checksum(tmp_path / "x") == xxhash.xxh3_128_hexdigest(content)


def optimizer_of(kind: str) -> GrowthOptimizer:
    """Two parameters that took a step."""
    from growkit.training.growth.rates import Rates
    from growkit.training.growth.slots import SlotMap

    section = make_section()
    parameters = [torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(6, 4))]
    group = {"params": [("a", parameters[0]), ("b", parameters[1])], "kind": kind, "part": "old",
             "multiplier": 1.0, "weight_decay": 0.0}  # fmt: skip
    optimizer = GrowthOptimizer([group], section, SlotMap({}), lambda: Rates(1.0, 1.0))
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return optimizer


def make_section() -> Any:
    from growkit.training.recipe_training import TrainingSection

    return TrainingSection(max_steps=2, per_device_train_batch_size=1)


FILE = Path("optimizer.pt")
EDITS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda c: c["state"][0].update(exp_avg=torch.zeros(2, 6)),
    "transposed": lambda c: c["state"][0].update(exp_avg_sq=torch.zeros(6, 4)),
    "dtype": lambda c: c["state"][0].update(exp_avg=torch.zeros(4, 6, dtype=torch.int64)),
    "half": lambda c: c["state"][0].update(exp_avg=torch.zeros(4, 6, dtype=torch.bfloat16)),
    "text": lambda c: c["state"][0].update(exp_avg="x"),
    "missing": lambda c: c["state"][0].pop("exp_avg_sq"),
    "counter": lambda c: c["state"][0].update(step=torch.zeros(3)),
    "negative": lambda c: c["state"][0].update(step=-1),
    "nan": lambda c: c["state"][0].update(step=float("nan")),
    "foreign": lambda c: c["state"].update({9: {}}),
    "unknown": lambda c: c["state"][0].update(momentum_buffer=torch.zeros(4, 6)),
    "state": lambda c: c.update(state=[1]),
    "entries": lambda c: c["state"].update({0: None}),
    "groups": lambda c: c["param_groups"].append({}),
    "group": lambda c: c.update(param_groups=[7]),
    "positions": lambda c: c["param_groups"][0].update(params=[0]),
    "names": lambda c: c["param_groups"][0].update(param_names=["b", "a"]),
    "rate": lambda c: c["param_groups"][0].update(lr="fast"),
    "betas": lambda c: c["param_groups"][0].update(betas=(0.9,)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_moments_are_checked_before_anything_is_loaded(edit: str) -> None:
    optimizer = optimizer_of("adamw")
    content = optimizer.state_dict()
    check_optimizer_state(optimizer, content, FILE)
    EDITS[edit](content)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        check_optimizer_state(optimizer, content, FILE)


def test_moments_of_a_sharded_checkpoint_are_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By what the metadata says, before memory is taken; the file itself is written by DCP."""
    from growkit.training.parallel.processes import Processes
    from growkit.training.parallel.sharded_optimizer import load_optimizer, save_optimizer

    optimizer = optimizer_of("adamw")
    parameter = optimizer.param_groups[0]["params"][0]
    save_optimizer(optimizer, tmp_path / "good", Processes())
    load_optimizer(optimizer, tmp_path / "good", Processes())
    optimizer.state[parameter]["exp_avg"] = torch.zeros(40, 6)
    save_optimizer(optimizer, tmp_path / "bad", Processes())
    with pytest.raises(CheckpointError, match=r"exp_avg of 'a', and the parameter is \[4, 6\]"):
        load_optimizer(optimizer, tmp_path / "bad", Processes())


def test_moments_of_a_grown_model_are_checked() -> None:
    from growkit.optimizer_state.load import load_into
    from growkit.optimizer_state.source import Moment, OptimizerState, ParameterState

    optimizer = optimizer_of("adamw")
    names = ["a", "b"]
    named = list(zip(names, optimizer.param_groups[0]["params"], strict=True))
    model = SimpleNamespace(named_parameters=lambda: named)

    def state(dtype: str, step: float) -> OptimizerState:
        zeros = torch.zeros(4, 6, dtype=torch.float32 if dtype == "F32" else torch.int32).numpy()
        moment = Moment((4, 6), dtype, lambda: zeros)
        both = {"exp_avg": moment, "exp_avg_sq": moment}
        return OptimizerState("test", FILE, {"a": ParameterState(both, step)}, ())

    assert load_into(optimizer, model, state("F32", 3)).loaded == ("a",)
    for dtype, step in (("I32", 3.0), ("F32", float("nan")), ("F32", -1.0)):
        with pytest.raises(CheckpointError, match="'a'"):
            load_into(optimizer, model, state(dtype, step))
