"""The processes of one run: which of them writes, and what all have to agree on.

Messages go over gloo groups of their own, which do not disturb a GPU's collectives and notice at
once when a process dies. One waits as long as the first process tokenizes or writes; of what all
do together, one that waits longer than ``parallel.timeout_minutes`` ends the run with a sentence.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from growkit.core.errors import FailedElsewhere, GrowkitError
from growkit.training.recipe import Recipe

T = TypeVar("T")
_PATIENCE = timedelta(days=7)
_groups: tuple[Any, Any, Any] | None = None
_timeout_minutes = 30.0


class Processes:
    """This process among ``count``, with rank ``rank``; the first one (rank 0) writes.

    Every ``tensor`` neighbours share the layers of one model, every ``context`` neighbours divide
    the tokens of their sequences: together they are reader number ``reader`` of ``readers``.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        groups: tuple[Any, Any, Any] = (None, None, None),
        tensor: int = 1,
        context: int = 1,
    ) -> None:
        self.rank, self.count, self.tensor, self.context = rank, count, tensor, context
        self.patient, self.group, self.context_group = groups
        self.reader, self.readers = rank // (tensor * context), count // (tensor * context)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def from_first(self, work: Callable[[], T]) -> T:
        """Let the first process do something; the others wait, and get its (picklable) result.

        Raises:
            FailedElsewhere: in the others, when it failed in the first.
        """
        if self.count == 1:
            return work()
        answer: list[Any] = [None]
        if not self.first:
            with waiting():
                dist.broadcast_object_list(answer, src=0, group=self.patient)
            result, failure = answer[0]
            if failure is not None:
                raise FailedElsewhere(failure)
            return result
        try:
            result = work()
        except BaseException as error:
            code = error.exit_code if isinstance(error, GrowkitError) else 1
            with contextlib.suppress(RuntimeError):
                dist.broadcast_object_list([(None, code)], src=0, group=self.patient)
            raise
        with waiting():
            dist.broadcast_object_list([(result, None)], src=0, group=self.patient)
        return result

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.count == 1:
            return flag
        value = torch.tensor([int(flag)])
        with waiting():
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return bool(value.item())

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with waiting():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all that compute something of their own, in float64."""
        if self.count == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        with waiting():
            dist.all_reduce(total, group=self.group)
        return [float(value) / self.tensor for value in total]

    def barrier(self) -> None:
        """Wait for all."""
        self.any(False)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Turn the error of a collective whose other side is gone or silent into an end in order.

    Raises:
        FailedElsewhere: another process ended; it says itself why.
        GrowkitError: none ended, and one did not come.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors that name its source file.
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        if "timed out" in str(error).lower():
            raise _nobody_came() from error
        raise FailedElsewhere(1) from error


def _nobody_came() -> GrowkitError:
    rank = os.environ.get("RANK", "0")
    return GrowkitError(
        f"Process {rank} waited for another one for {_timeout_minutes:g} minutes "
        "(parallel.timeout_minutes), and it did not come.",
        "A process of this run hangs or was never started: look for the one that says nothing. The "
        "same command continues from the last checkpoint; raise the limit where one is only slow.",
    )


def join(recipe: Recipe, count: int) -> Processes:
    """Meet the other processes; what the launcher said about them has been checked before.

    Raises:
        GrowkitError: they do not come, or accelerate sees another number of processes than the
            launcher started.
    """
    global _groups, _timeout_minutes
    _timeout_minutes = recipe.parallel.timeout_minutes
    if count == 1 and not recipe.parallel.sharded:
        return Processes()
    with waiting():
        if not dist.is_initialized():
            _initialise(recipe, count)
        if _groups is None:
            limit = timedelta(minutes=_timeout_minutes)
            patient, group = (dist.new_group(backend="gloo", timeout=t) for t in (_PATIENCE, limit))
            own, context = None, recipe.parallel.context
            if context > 1:  # of the devices, where the others carry messages
                own, _ = dist.new_subgroups(context, timeout=limit)
            _groups = patient, group, own
    sizes = recipe.parallel.tensor, recipe.parallel.context
    return Processes(dist.get_rank(), dist.get_world_size(), _groups, *sizes)


def _initialise(recipe: Recipe, count: int) -> None:
    timeout = timedelta(minutes=recipe.parallel.timeout_minutes)
    if count == 1:  # a sharded model needs a group even when it is alone in it
        cpu = on_cpu(recipe)
        device = None if cpu else torch.accelerator.current_accelerator()
        dist.init_process_group(
            "gloo" if device is None else dist.get_default_backend_for_device(device),
            store=dist.HashStore(),
            rank=0,
            world_size=1,
            timeout=timeout,
        )
        return
    from accelerate import PartialState

    state = PartialState(cpu=on_cpu(recipe), timeout=timeout)
    if state.num_processes != count:
        raise GrowkitError(
            f"{count} processes were started and accelerate sees {state.num_processes}: each would "
            "train the whole run.",
            "Start them with torchrun, and set training.use_cpu: true when no GPU is to be used.",
        )


def on_cpu(recipe: Recipe) -> bool:
    """Whether the run is on the CPU: because it is asked for, or because there is nothing else."""
    return recipe.training.use_cpu or not torch.accelerator.is_available()


def leave() -> None:
    """Take leave of the other processes at the end of a program."""
    global _groups
    if dist.is_initialized():
        dist.destroy_process_group()
    _groups = None
