"""How this process was started, and whether the run would be what was asked for. No torch here.

Several launchers start something else than one might think, and say nothing:

* ``accelerate launch --cpu --num_processes 2`` starts one process;
* ``srun`` and ``mpirun`` start processes that do not know of each other, each of which would train
  the whole run, into the same folder;
* ``accelerate launch --use_fsdp`` leaves FSDP out on a CPU, and its mixed precision enters a run
  behind the recipe's back.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from growkit.core.errors import UsageError
from growkit.training.recipe import Recipe

_FOREIGN = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_COPIES = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}


def torchrun_command(processes: int, arguments: Sequence[str] | None = None) -> str:
    """The command that starts this run in ``processes`` processes of one machine."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    shown = shlex.join(given) if given[:1] == ["train"] else "train RECIPE"
    return f"torchrun --nproc-per-node {processes} -m growkit {shown}"


def train_command(
    out: Path,
    *,
    resume: Path | None = None,
    values: Mapping[str, object] = MappingProxyType({}),
    arguments: Sequence[str] | None = None,
) -> str:
    """The command that was given, with another folder, checkpoint or values of the recipe."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words, rest = ["train"], iter(given[1:] if given[:1] == ["train"] else ["RECIPE"])
    for word in rest:
        name = word.partition("=")[0]
        if name in ("--out", "-o", "--resume", "--set"):
            value = word.partition("=")[2] if word.startswith("--") and "=" in word else next(rest)
            if name == "--set" and value.partition("=")[0] not in values:
                words += ["--set", value]
        elif name not in ("--dry-run", "--overwrite"):
            words.append(word)
    words += ["--out", _near(out)]
    if resume is not None:
        words += ["--resume", _near(resume)]
    for key, changed in values.items():
        words += ["--set", f"{key}={changed}"]
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return torchrun_command(count, words) if count > 1 else shlex.join(["growkit", *words])


def _near(path: Path) -> str:
    """As it is named from the current folder, where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def check_launch(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> int:
    """The number of processes of this run.

    Raises:
        UsageError: the launcher did not start what it seems to, or the recipe asks for something
            else; the remedy is the command to use.
    """
    _refuse_foreign_strategy(recipe, environment)
    wanted = recipe.parallel.processes
    if "WORLD_SIZE" not in environment:
        _refuse_copies(wanted or 2, environment)
    count = int(environment.get("WORLD_SIZE", "1"))
    missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
               if n not in environment]  # fmt: skip
    if count > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE is {count} and {missing[0]} is not set: the processes cannot find each "
            "other.",
            f"Start them with: {torchrun_command(count)}",
        )
    if wanted is not None and wanted != count:
        how = torchrun_command(wanted) if wanted > 1 else "growkit train, without a launcher"
        raise UsageError(
            f"parallel.processes is {wanted} and {count} "
            + ("process was started." if count == 1 else "processes were started."),
            f"Start it with: {how}",
        )
    check_shares(recipe, count)
    return count


def check_shares(recipe: Recipe, count: int) -> None:
    """Raises:
    UsageError: tensor or context parallelism does not divide the processes, or those that read
        sequences of their own do not divide the sequences of a step.
    """
    tensor, strategy = recipe.parallel.tensor, recipe.parallel.strategy
    shared = {"tensor": (tensor, "a model"), "context": (recipe.parallel.context, "a sequence")}
    for key, (size, what) in shared.items():
        if count % size:
            some = f"{count} process was" if count == 1 else f"{count} processes were"
            raise UsageError(
                f"parallel.{key} is {size} and {some} started: every {size} of them share {what}.",
                f"Start a multiple of {size}: {torchrun_command(size)}",
            )
    if count > tensor > 1 and strategy == "ddp":
        raise UsageError(
            f"parallel.tensor is {tensor} in {count} processes, which leaves {count // tensor} to "
            "divide the data, and parallel.strategy ddp cannot hold copies of a model in parts.",
            f"Set parallel.strategy: fsdp, or start {tensor} processes: {torchrun_command(tensor)}",
        )
    count = recipe.parallel.readers(count)
    if recipe.sequences_per_step % count:
        raise UsageError(
            f"The {recipe.sequences_per_step} sequences of a step (per_device_train_batch_size x "
            f"gradient_accumulation_steps) cannot be shared evenly by {count} processes.",
            f"Change training.gradient_accumulation_steps so that the product is a multiple of "
            f"{count}; it is the same whatever the number of processes.",
        )


def _refuse_foreign_strategy(recipe: Recipe, environment: Mapping[str, str]) -> None:
    for variable, name in _FOREIGN.items():
        if environment.get(variable, "false").lower() in ("true", "1"):
            raise UsageError(
                f"accelerate launch was configured for {name} ({variable} is set), which growkit "
                "does not take from it.",
                "Set parallel.strategy: fsdp in the recipe for a sharded model, and start it with: "
                f"{torchrun_command(int(environment.get('WORLD_SIZE', '2')))}",
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16" if recipe.training.bf16 else "no"):
        raise UsageError(
            f"The launcher asks for mixed precision {precision!r} and the recipe says "
            f"training.bf16: {str(recipe.training.bf16).lower()}.",
            "Set training.bf16 in the recipe and launch with --mixed_precision no.",
        )


def _refuse_copies(processes: int, environment: Mapping[str, str]) -> None:
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        raise UsageError(
            "accelerate launch was asked for several processes and started one (it starts several "
            "CPU processes through mpirun only).",
            f"Start them with: {torchrun_command(processes)}",
        )
    for variable, launcher in _COPIES.items():
        count = int(environment.get(variable, "1"))
        if count > 1:
            raise UsageError(
                f"{launcher} started {count} processes ({variable}) that do not know of each "
                "other: each would train the whole run.",
                f"Let {launcher} start one torchrun a machine; on one machine: "
                f"{torchrun_command(count)}",
            )
