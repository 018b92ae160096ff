"""Launches that would be something else than what was asked for are refused, without torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from process_runs import start
from training_runs import make, recipe_values

from growkit.core.errors import FailedElsewhere, GrowkitError, UsageError
from growkit.training.parallel.launch import check_launch, torchrun_command
from growkit.training.read_recipe import make_recipe

TORCHRUN = {
    "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def test_ordinary_launches(text_file: Path) -> None:
    recipe = make(text_file)
    assert check_launch(recipe, {}) == 1
    assert check_launch(recipe, TORCHRUN) == 2
    # srun starts one torchrun a machine
    assert check_launch(recipe, {**TORCHRUN, "SLURM_STEP_NUM_TASKS": "4"}) == 2
    assert check_launch(recipe, {"SLURM_STEP_NUM_TASKS": "1"}) == 1
    assert check_launch(recipe, {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}) == 2
    bf16 = make(text_file, bf16=True)
    assert check_launch(bf16, {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "bf16"}) == 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "asked for several processes and started one.*torchrun --nproc-per-node 2 -m growkit",
        ),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 .* --nproc-per-node 8"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2"),
        ({"ACCELERATE_USE_FSDP": "true", **TORCHRUN}, "configured for FSDP.*strategy: fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "configured for DeepSpeed"),
        (
            {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "bf16"},
            "mixed precision 'bf16' and the recipe says training.bf16: false",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "3"}, "4 sequences .* cannot be shared evenly by 3"),
    ],
)
def test_refused(environment: dict[str, str], message: str, text_file: Path) -> None:
    with pytest.raises(UsageError, match=message) as error:
        check_launch(make(text_file), environment)
    assert error.value.exit_code == 2


def test_recipe_may_say_how_many_processes(text_file: Path) -> None:
    values = recipe_values(text_file)
    values["parallel"] = {"processes": 2}
    recipe = make_recipe(values)
    assert check_launch(recipe, TORCHRUN) == 2
    with pytest.raises(UsageError, match=r"processes is 2 and 1 process was.*--nproc-per-node 2"):
        check_launch(recipe, {})
    values["parallel"] = {"processes": 1}
    with pytest.raises(UsageError, match=r"is 1 and 2 processes were.*without a launcher"):
        check_launch(make_recipe(values), TORCHRUN)


def test_command_is_the_one_that_was_typed() -> None:
    command = torchrun_command(4, ["train", "my recipe.yaml", "-o", "x"])
    assert command == "torchrun --nproc-per-node 4 -m growkit train 'my recipe.yaml' -o x"
    assert torchrun_command(4, ["-x"]) == "torchrun --nproc-per-node 4 -m growkit train RECIPE"


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "expected"),
    [
        (2, 2, 1, (2, 2)),
        (2, 2, 2, (2, 1)),
        (2, 2, 4, (1, 1)),
        (8, 3, 2, (6, 2)),
        (8, 1, 8, (1, 1)),
        (5, 4, 2, (5, 2)),
    ],
)
def test_step_is_shared(
    batch: int, accumulation: int, processes: int, expected: tuple[int, int], text_file: Path
) -> None:
    recipe = make(
        text_file, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    assert recipe.shares(processes) == expected
    assert expected[0] * expected[1] * processes == batch * accumulation


def accelerate_launch(arguments: Sequence[str]) -> int:
    """``accelerate launch``."""
    from accelerate.commands.launch import main

    sys.argv = ["accelerate-launch", *arguments]
    main()
    return 0


@pytest.mark.parametrize("arguments", [["--cpu", "--num_processes", "2", "--num_machines", "1"]])
def test_accelerate_launch_that_starts_one_process_is_refused(
    arguments: list[str], text_file: Path, tmp_path: Path
) -> None:
    """The real launcher: asked for two, it starts one, and says nothing."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(text_file)))
    command = [*arguments, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "growkit",
               "train", str(path), "--out", str(tmp_path / "run")]  # fmt: skip
    launcher = start(1, command, accelerate_launch)
    assert launcher.wait() != [0]
    said = launcher.output()
    assert "asked for several processes and started one" in said
    assert f"torchrun --nproc-per-node 2 -m growkit train {path}" in said
    assert "exit status 2" in said  # of growkit itself, quoted by the launcher
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        (
            "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting "
            "120000ms for recv operation to complete",
            GrowkitError,
            r"waited for another one for 30 minutes \(parallel.timeout_minutes\)",
        ),
        (
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer",
            FailedElsewhere,
            "failed",
        ),
        ("mat1 and mat2 shapes cannot be multiplied", RuntimeError, "mat1"),
    ],
    ids=["silent", "gone", "another error"],
)
def test_another_process_is_silent_or_gone(said: str, kind: type[Exception], message: str) -> None:
    """What gloo raises, word for word; a hang ends in a sentence."""
    from growkit.training.parallel.processes import waiting

    with pytest.raises(kind, match=message), waiting():
        raise RuntimeError(said)
