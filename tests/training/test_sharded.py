"""FSDP2 by two gloo processes on the CPU: the code that GPUs run, against one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from grown_runs import changed, continue_recipe, grow, make_source
from process_runs import growkit, run, start
from safetensors.torch import load_file, save_file
from training_runs import (
    TINY_GDA,
    assert_close,
    cut_back,
    figures,
    make,
    needs_sharding,
    recipe_values,
    weights,
)

from growkit.core.errors import CheckpointError, UsageError
from growkit.training import Recipe, train
from growkit.training.checkpoints import damage, list_checkpoints, newest_whole
from growkit.training.read_recipe import make_recipe

pytestmark = needs_sharding


def write(path: Path, recipe: Recipe, **parallel: Any) -> Path:
    """The recipe as a file, sharded."""
    values = recipe.to_dict()
    values["parallel"] = {"strategy": "fsdp", **parallel}
    path.write_text(yaml.safe_dump(values))
    return path


def gda_recipe(text: Path, **training: Any) -> Recipe:
    values = recipe_values(text, **training)
    values["model"]["config"] = dict(TINY_GDA)
    return make_recipe(values)


@pytest.fixture(scope="module")
def recipe(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("recipe") / "gda.yaml", gda_recipe(text_file))


@pytest.fixture(scope="module")
def alone(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, not sharded."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(gda_recipe(text_file), out)
    return out


@pytest.fixture(scope="module")
def sharded(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that hold a half each."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    run(2, ["train", str(recipe), "--out", str(out)])
    return out


def test_two_halves_make_the_run_of_one_process(alone: Path, sharded: Path) -> None:
    assert_close(sharded, alone, 1e-5)


def test_final_folder_is_the_models_own(alone: Path, sharded: Path) -> None:
    """fully_shard changes the class of the model; saved as it is, its folder would not load."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = json.loads((sharded / "config.json").read_text())
    assert config == json.loads((alone / "config.json").read_text())
    names = {path.name for path in sharded.iterdir()}
    assert names == {path.name for path in alone.iterdir()}
    stored = load_file(sharded / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied
    code = get_class_from_dynamic_module(config["auto_map"]["AutoModelForCausalLM"], str(sharded))
    assert code.__module__.startswith("transformers_modules")
    model, info = code.from_pretrained(sharded, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_resume_in_any_number_of_processes(
    before: int, after: int, recipe: Path, alone: Path, sharded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    if before == 2:
        shutil.copytree(sharded, out)
    else:
        run(1, ["train", str(recipe), "--out", str(out)])
        assert weights(out) == weights(alone)  # one process: nothing is added up differently
    cut_back(out, 6)
    run(after, ["train", str(recipe), "--out", str(out)])
    if before == after:
        assert weights(out) == weights(sharded) and figures(out) == figures(sharded)
    else:
        assert_close(out, alone, 1e-5)


def _dump(arguments: Sequence[str]) -> int:
    """Resume, and write down what was loaded instead of going on."""
    from growkit.training.trainer import RunTrainer

    def stop(self: RunTrainer, *given: Any) -> Any:
        optimizer = self._bare_optimizer()
        state = {}
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                values = {"parameter": parameter, **optimizer.state[parameter]}
                for key, value in values.items():
                    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                    state[f"{name}.{key}"] = whole.detach().clone().contiguous()
        if self.processes.first:
            save_file(state, self.folder / f"loaded-{self.processes.count}.safetensors")
        raise SystemExit(0)

    RunTrainer.get_batch_samples = stop  # type: ignore[method-assign]
    return growkit(arguments)


def test_state_is_bit_for_bit_the_same_in_any_number_of_processes(
    recipe: Path, sharded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(sharded, out)
    cut_back(out, 9)
    for count in (1, 2, 4):
        run(count, ["train", str(recipe), "--out", str(out)], _dump)
    folder = out / "training" / "checkpoints"
    one, two, four = (load_file(folder / f"loaded-{count}.safetensors") for count in (1, 2, 4))
    stored = load_file(folder / "checkpoint-9" / "model.safetensors")
    assert one.keys() == two.keys() == four.keys() and len(one) == 4 * len(stored)
    for name, value in one.items():
        assert torch.equal(value, two[name]) and torch.equal(value, four[name]), name
    for name, value in stored.items():
        assert torch.equal(one[f"{name}.parameter"], value)
        assert one[f"{name}.exp_avg"].abs().max() > 0


@pytest.fixture(scope="module")
def grown(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    return grow(make_source(text_file, folder / "source"), folder / "grown")


@pytest.mark.parametrize(
    "choices",
    [
        {"train": "new", "optimizer": "adamw"},
        {"train": "all", "average_checkpoints": 2, "bf16": True},
    ],
)
def test_grown_folder_is_trained_by_parts(
    choices: dict[str, Any], grown: Path, text_file: Path, tmp_path: Path
) -> None:
    """Read by parts, with the new slots' own rules; frozen bytes stay frozen."""
    plain = continue_recipe(text_file, grown, save_steps=2, **choices)
    train(plain, tmp_path / "alone")
    path = write(tmp_path / "recipe.yaml", plain)
    run(2, ["train", str(path), "--out", str(tmp_path / "run")])
    # A last bit of a weight becomes one of bfloat16 where rounding to it falls the other way.
    assert_close(tmp_path / "run", tmp_path / "alone", 1e-5, 1e-3 if "bf16" in choices else 0)
    if choices["train"] == "new":
        counts = changed(grown, tmp_path / "run").values()
        assert sum(old for old, _ in counts) == 0 and sum(new for _, new in counts) > 0
    assert (tmp_path / "run" / "growkit.json").read_bytes() == (grown / "growkit.json").read_bytes()


def test_muon_orthogonalises_whole_matrices(grown: Path, text_file: Path, tmp_path: Path) -> None:
    """In bfloat16, so that the losses agree and the weights do not quite."""
    plain = continue_recipe(text_file, grown, optimizer="muon")
    train(plain, tmp_path / "alone")
    path = write(tmp_path / "recipe.yaml", plain)
    run(2, ["train", str(path), "--out", str(tmp_path / "run")])
    for key in ("loss", "eval_loss"):
        run_losses, losses = (
            [row[key] for row in figures(tmp_path / name) if key in row]
            for name in ("run", "alone")
        )
        assert len(losses) > 2 and run_losses == pytest.approx(losses, abs=1e-3)


def _forget_buffers(arguments: Sequence[str]) -> int:
    from growkit.training.parallel import sharding

    def allocate(model: Any, device: Any) -> None:
        model.to_empty(device=device)
        for buffer in model.buffers():
            buffer.fill_(0.5)  # what it would be is whatever lay there

    sharding._allocate = allocate
    return growkit(arguments)


def test_buffers_that_were_not_restored_are_noticed(
    grown: Path, text_file: Path, tmp_path: Path
) -> None:
    """Negative control: rotary frequencies are in no file."""
    plain = continue_recipe(text_file, grown, max_steps=2)
    train(plain, tmp_path / "alone")
    path = write(tmp_path / "recipe.yaml", plain)
    run(1, ["train", str(path), "--out", str(tmp_path / "right")])
    assert weights(tmp_path / "right") == weights(tmp_path / "alone")
    run(1, ["train", str(path), "--out", str(tmp_path / "run")], _forget_buffers)
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "run", tmp_path / "alone", 1e-3)


@pytest.mark.parametrize("name", ["optimizer_0/.metadata", "optimizer_0/__1_0.distcp"])
def test_damaged_sharded_checkpoint_is_skipped(name: str, sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(sharded, out)
    folder = out / "training" / "checkpoints"
    (folder / "checkpoint-12" / name).unlink()
    newest, skipped = newest_whole(folder)
    assert newest == folder / "checkpoint-9" and name in skipped[0][1]


def test_strategy_of_a_run_stays(recipe: Path, sharded: Path, text_file: Path) -> None:
    with pytest.raises(UsageError, match=r"parallel.strategy was 'fsdp' and is 'ddp'"):
        train(gda_recipe(text_file), sharded)
    for checkpoint in list_checkpoints(sharded / "training" / "checkpoints"):
        assert damage(checkpoint) is None


def test_what_cannot_be_sharded_is_refused(grown: Path, text_file: Path, tmp_path: Path) -> None:
    values = continue_recipe(text_file, grown).to_dict()
    values["model"]["dtype"] = "bfloat16"
    path = write(tmp_path / "recipe.yaml", make_recipe(values))
    launch = start(1, ["train", str(path), "--out", str(tmp_path / "run")])
    assert launch.wait() == [2]
    assert "one dtype, and these are bfloat16 and float32" in launch.output()

    from growkit.training.models import build_model
    from growkit.training.parallel.sharded_files import read_model

    model = build_model(make(text_file).model, _Sized(range(257)), 0)
    with pytest.raises(CheckpointError, match=r"unknown to the model, model\.layers\.0\..*lambda"):
        read_model(model, grown)


class _Sized:
    """A tokenizer of which only the size is asked."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)


def _measured(arguments: Sequence[str]) -> int:
    """The command, and the largest growth of this process's memory from the model on, in bytes."""
    from growkit.training import models, run
    from growkit.training.parallel import sharding

    def resident(key: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{key}:")[1].split()[0]) * 1024

    base = [0]

    def at_start(function: Any) -> Any:
        def measured(*given: Any) -> Any:
            base[0] = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            return function(*given)

        return measured

    sharding.build_sharded = at_start(sharding.build_sharded)
    models.build_model = at_start(models.build_model)
    code = growkit(arguments)
    print(f"\nGROWTH {resident('VmHWM') - base[0]}")
    assert run is not None
    return code


def test_no_process_holds_a_model_that_is_sharded(text_file: Path, tmp_path: Path) -> None:
    """Grown, read, trained, saved and published in less memory than the model takes.

    New layers only are trained, so that there is a gradient and optimizer state of little else.
    """
    from growkit.modeling import GdaConfig, GdaForCausalLM

    values = recipe_values(text_file, max_steps=2, save_steps=1, warmup_steps=0, decay_steps=1)
    values["training"] |= {"train": "new", "per_device_train_batch_size": 1}
    values["data"]["eval_fraction"] = 0
    values["data"].pop("max_eval_tokens")
    torch.manual_seed(0)
    config = GdaConfig(
        **{**TINY_GDA, "model_type": "gda"}
        | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 31,
           "num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 2,
           "head_dim": 64, "vocab_size": 257},
    )  # fmt: skip
    GdaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    grow(tmp_path / "source", tmp_path / "grown", layers="+1")
    values["model"] = {"checkpoint": str(tmp_path / "grown")}
    size = 4 * sum(
        int(np.prod(tensor.shape))
        for tensor in load_file(tmp_path / "grown" / "model.safetensors").values()
    )
    assert size > 200e6
    growth = {}
    for strategy in ("fsdp", "ddp"):
        values["parallel"] = {"strategy": strategy}
        path = tmp_path / f"{strategy}.yaml"
        path.write_text(yaml.safe_dump(values))
        launch = run(2, ["train", str(path), "--out", str(tmp_path / strategy)], _measured)
        growth[strategy] = [
            int(launch.output(rank).split("GROWTH")[1].split()[0]) / size for rank in (0, 1)
        ]
    assert max(growth["fsdp"]) < 0.95, growth  # half of it, and some 100 MB whatever its size
    assert min(growth["ddp"]) > 1.2, growth  # the measure sees a whole model
    assert_close(tmp_path / "fsdp", tmp_path / "ddp", 1e-2)
