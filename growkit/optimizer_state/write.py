"""The values of a grown moment, a block of rows at a time.

Write the grown optimizer state of a plan, streamed like the weights.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit import __version__
from growkit.checkpoint import DTYPES, OutputTensor, ShardPlan, ShardWriter, plan_shards
from growkit.checkpoint.writer import DifferentError, ShardComparison
from growkit.core.process import signals_held_back
from growkit.optimizer_state.rules import LAYER_COPY, DimRule, StateRule, state_rules
from growkit.optimizer_state.source import SECOND_MOMENTS, Array, OptimizerState, ParameterState
from growkit.optimizer_state.stacked import split
from growkit.optimizer_state.store import INDEX, as_stored, index_of, write_index
from growkit.surgery.axis_map import NEW
from growkit.surgery.plan import Plan
from growkit.surgery.symmetry import compute_dtype

BLOCK_ELEMENTS = 1 << 20


def grown_blocks(
    moment: Array, kind: str, rule: StateRule, *, reset_new: bool = False
) -> Iterator[tuple[int, Array]]:
    """(first element, block) of the written moment, in order; blocks are contiguous rows.

    Args:
        moment: old values, shape of the old parameter.
        kind: torch's name of it; tells first from second moments.
        rule: of the written parameter.
        reset_new: further copies begin with zero moments too (the first copy keeps its part).
    """
    squared = kind in SECOND_MOMENTS
    shape = rule.tensor.output.shape
    if not shape:
        yield 0, np.asarray(moment * (rule.square if squared else rule.mean))
        return
    wide = compute_dtype(moment.dtype)
    scale = wide.type(rule.square if squared else rule.mean)
    maps = [_elements(dim, squared, reset_new) for dim in rule.dims]
    width = prod(shape[1:])
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    for first in range(0, shape[0], step):
        rows = slice(first, min(first + step, shape[0]))
        block = moment[rows] if maps[0] is None else moment[maps[0][0][rows]]
        for axis, mapped in enumerate(maps[1:], start=1):
            if mapped is not None:
                block = np.take(block, mapped[0], axis=axis)
        block = block.astype(wide)
        for axis, mapped in enumerate(maps):
            if mapped is not None:
                factors = mapped[1][rows] if axis == 0 else mapped[1]
                block *= factors.astype(wide).reshape([-1] + [1] * (len(shape) - axis - 1))
        if scale != 1:
            block *= scale
        yield first * width, np.ascontiguousarray(block.astype(moment.dtype))


def _elements(
    dim: DimRule | None, squared: bool, reset_new: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None:
    """Old element and factor of every written element of a dimension."""
    if dim is None:
        return None
    units, block = dim.map, dim.map.block
    factors = dim.square if squared else dim.mean
    if reset_new:
        factors = np.where(units.rank > 0, 0.0, factors)
    # A new unit reads something that exists, times zero.
    first = np.where(units.source == NEW, 0, units.source) * block
    elements = (first[:, None] + np.arange(block)).reshape(-1)
    return elements, np.repeat(np.where(units.source == NEW, 0.0, factors), block)


ONE_FILE = 1 << 62
ESTIMATES_OF = "E[s] for first and E[s^2] for second moments"


class GrownState:
    """The optimizer state that a plan will have, decided before it is written.

    Args:
        plan: the growth.
        state: of the source.
        mode: ``grow``, or ``reset-new``: copies begin with zero moments, the old units continue.

    Raises:
        CheckpointError: the state is not of this checkpoint, or of a kind that cannot be grown.
    """

    def __init__(self, plan: Plan, state: OptimizerState, mode: str = "grow") -> None:
        state = split(state, plan.checkpoint)
        state.check_shapes({name: info.shape for name, info in plan.checkpoint.tensors.items()})
        self.state, self.mode = state, mode
        self.rules = state_rules(plan)
        self.found = [(rule, found) for rule in self.rules if (found := self._of(rule))]

    def _of(self, rule: StateRule) -> ParameterState | None:
        if rule.source is None or (self.mode == "reset-new" and LAYER_COPY in rule.why):
            return None
        return self.state.parameters.get(rule.source)

    def files(self) -> dict[str, ShardPlan]:
        """Layout of the file of each kind of moment."""
        return {
            kind: plan_shards(
                [
                    OutputTensor(
                        rule.tensor.output.name,
                        found.moments[kind].dtype,
                        rule.tensor.output.shape,
                    )
                    for rule, found in self.found
                    if kind in found.moments
                ],
                ONE_FILE,
                stem=kind,
            )
            for kind in self.state.kinds
        }

    @property
    def total_bytes(self) -> int:
        """Bytes of all moments that will be written."""
        return sum(plan.total_size for plan in self.files().values())

    def write(
        self, folder: Path, *, threads: int | None = None, advance: Callable[[int], None]
    ) -> None:
        """Write everything into ``folder``, which is created. Bytes depend on nothing but the
        plan and the state."""
        folder.mkdir()
        for kind, layout in self.files().items():
            with ShardWriter(folder, layout) as writer:
                self._write_moments(kind, writer, threads, advance)
        write_index(folder, self._index())

    def compare(self, folder: Path, *, threads: int | None = None) -> None:
        """Raise DifferentError unless ``folder`` holds, byte for byte, what would be written."""
        if not (folder / INDEX).is_file() or index_of(folder) != as_stored(self._index()):
            raise DifferentError(INDEX)
        for kind, layout in self.files().items():
            with ShardComparison(folder, layout) as comparison:
                self._write_moments(kind, comparison, threads, lambda count: None)

    def _write_moments(
        self,
        kind: str,
        writer: ShardWriter | ShardComparison,
        threads: int | None,
        advance: Callable[[int], None],
    ) -> None:
        stop = threading.Event()
        jobs = [(r, s) for r, s in self.found if kind in s.moments]
        jobs.sort(key=lambda job: -prod(job[0].tensor.output.shape))

        def write_one(job: tuple[StateRule, ParameterState]) -> None:
            rule, found = job
            size = DTYPES[found.moments[kind].dtype].bits // 8
            moment = found.moments[kind].read()
            zero_new = self.mode == "reset-new"
            for first, block in grown_blocks(moment, kind, rule, reset_new=zero_new):
                if stop.is_set():
                    return
                writer.write(rule.tensor.output.name, first * size, block)
                advance(block.nbytes)

        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            try:
                with signals_held_back():
                    futures = [pool.submit(write_one, job) for job in jobs]
                for future in futures:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _index(self) -> dict[str, Any]:
        parameters = {
            rule.tensor.output.name: {"step": found.step, "moments": list(found.moments)}
            for rule, found in self.found
        }
        return {"growkit_version": __version__, **self.describe(), "parameters": parameters}

    def describe(self) -> dict[str, Any]:
        """For manifest and ``state.json``.

        Keys: ``mode``; ``source`` (layout, file, step, groups); ``moments``; ``tensors`` (how many
        are copied, grown, rescaled, fresh); ``exact`` (all of them are); ``roles``.
        """
        present = {id(rule) for rule, _ in self.found}
        actions: dict[str, int] = {}
        for rule in self.rules:
            action = rule.action if id(rule) in present else "fresh"
            actions[action] = actions.get(action, 0) + 1
        return {
            "mode": self.mode,
            "source": {
                "layout": self.state.layout,
                "file": self.state.path.name,
                "step": self.state.step,
                "groups": [dict(group) for group in self.state.groups],
            },
            "moments": list(self.state.kinds),
            "tensors": actions,
            "exact": all(rule.exact for rule, _ in self.found) and self.mode == "grow",
            "roles": describe(self.rules, present, self.mode),
        }

    def warnings(self) -> tuple[str, ...]:
        """What to know before training on.

        A slot with zero moments and an old step counter has no bias correction: under a constant
        gradient AdamW's step t after the growth is (1 - b1^t) / sqrt(1 - b2^t) times lr.
        """
        zero = self.mode == "reset-new" or any(
            dim is not None and bool((dim.mean == 0).any()) for r, _ in self.found for dim in r.dims
        )
        betas = [group["betas"] for group in self.state.groups if group.get("betas")]
        if not zero or not betas:
            return ()
        t = np.arange(1, 1000)
        largest = max(float(np.max((1 - b1**t) / np.sqrt(1 - b2**t))) for b1, b2 in betas)
        if largest < 1.5:
            return ()
        return (
            f"new slots begin with zero moments and the old step counter: with betas {betas[0]} "
            f"their first updates may be {largest:.1f} times the learning rate; use a warm-up, or "
            "a smaller beta2",
        )

    def summary(self) -> str:
        """One line for the terminal."""
        told = self.describe()
        count = ", ".join(f"{n} {action}" for action, n in told["tensors"].items())
        estimates = sorted({rule.tensor.role for rule, _ in self.found if not rule.exact})
        exact = f"estimates for {', '.join(estimates)}" if estimates else "exact"
        if self.mode == "reset-new":
            exact += "; moments of copies reset"
        step = "" if self.state.step is None else f", step {self.state.step:.0f}"
        return f"optimizer state from {self.state.path.name}{step}: {count}; {exact}"


def describe(rules: Iterable[StateRule], present: set[int], mode: str) -> dict[str, Any]:
    """Tensor role -> how its state is made.

    Values: ``action``; ``moments`` (``exact``, ``estimate`` or ``none``); ``why`` for the latter
    two; ``factor`` on first moments where it is one number; ``same_dynamics`` (see
    :meth:`StateRule.same_dynamics`) where that is not 1 everywhere. A role whose tensors are
    treated in several ways (layers that are kept and layers that are new) has an entry for each.
    """
    result: dict[str, Any] = {}
    for rule in rules:
        action = rule.action if id(rule) in present else "fresh"
        entry: dict[str, Any] = {"action": action}
        if action == "fresh":
            why = rule.why if rule.source is None else ""
            entry |= {"moments": "none", "why": why or "the source has no state of it"}
            if mode == "reset-new" and LAYER_COPY in rule.why:
                entry["why"] = "new slots are reset"
        else:
            entry["moments"] = "exact" if rule.exact else "estimate"
            if not rule.exact:
                entry["why"] = rule.why
                entry["estimate"] = ESTIMATES_OF
            if rule.gradient_scale is not None:
                entry["factor"] = rule.gradient_scale
            dynamics = rule.same_dynamics()
            if dynamics is not None and set(dynamics.values()) != {1.0}:
                entry["same_dynamics"] = dynamics
        entries = result.setdefault(rule.tensor.role, [])
        if entry not in entries:
            entries.append(entry)
    return {role: entries[0] if len(entries) == 1 else entries for role, entries in result.items()}
