"""The processes of one run: which of them writes, and what all have to agree on.

Messages go over a gloo group of their own. It waits as long as the first process tokenizes or
writes, it does not disturb a GPU's collectives, and it notices at once when a process dies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from growkit.core.errors import FailedElsewhere, GrowkitError
from growkit.training.recipe import Recipe

T = TypeVar("T")
_PATIENCE = timedelta(days=7)
_group: Any = None


class Processes:
    """This process among ``count``, with rank ``rank``; the first one (rank 0) writes."""

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank, self.count, self.group = rank, count, group

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
                dist.broadcast_object_list(answer, src=0, group=self.group)
            result, failure = answer[0]
            if failure is not None:
                raise FailedElsewhere(failure)
            return result
        try:
            result = work()
        except BaseException as error:
            code = error.exit_code if isinstance(error, GrowkitError) else 1
            with contextlib.suppress(RuntimeError):
                dist.broadcast_object_list([(None, code)], src=0, group=self.group)
            raise
        with waiting():
            dist.broadcast_object_list([(result, None)], src=0, group=self.group)
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
        """Sums over all processes, in float64."""
        if self.count == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        with waiting():
            dist.all_reduce(total, group=self.group)
        return [float(value) for value in total]

    def barrier(self) -> None:
        """Wait for all."""
        self.any(False)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Turn the error of a collective whose other side is gone into a quiet end.

    Raises:
        FailedElsewhere: another process ended; it says itself why.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors that name its source file.
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise FailedElsewhere(1) from error
        raise


def join(recipe: Recipe, count: int) -> Processes:
    """Meet the other processes; what the launcher said about them has been checked before.

    Raises:
        GrowkitError: accelerate sees another number of processes than the launcher started.
    """
    global _group
    if count == 1 and recipe.parallel.strategy == "ddp":
        return Processes()
    if not dist.is_initialized():
        _initialise(recipe, count)
    if _group is None:
        _group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size(), _group)


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
    global _group
    if dist.is_initialized():
        dist.destroy_process_group()
    _group = None
