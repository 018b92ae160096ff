# SPDX-License-Identifier: Apache-2.0
"""What in a grown folder is new: the map in memory, and how growkit.json says it in few bytes.

In memory every tensor has its entry and every run of new rows its range. Written out like that the
map of ``--ffn x1.5`` of a model of 135 M parameters takes 3.5 MB. growkit.json says the same with
two abbreviations, which may stand anywhere in the map; a file without them is read as well:

* ``model.layers.{0..29}.mlp.up_proj.weight`` stands for 30 names, as braces do in a shell;
* a range ``[start, end, step, times]`` stands for ``times`` ranges, each ``step`` after the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from growkit.core.errors import CheckpointError
from growkit.core.json_files import MAX_VALUES
from growkit.surgery.dim_map import DimMap
from growkit.surgery.plan import Plan
from growkit.surgery.tensor_plans import Action, TensorPlan

Range = list[int]
Box = tuple[tuple[int, int], ...]  # first and last of every number in a name

FEWEST = 3  # ranges that are worth an abbreviation
_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])")
_PLACE = re.compile("\0")  # of a number, in a template
_BRACES = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")


def new_parameters(plan: Plan, tensors: Iterable[TensorPlan] | None = None) -> dict[str, Any]:
    """Map from written tensor to what in it has no old counterpart; ``tensors``: of these alone.

    The value is ``"all"`` for a tensor of an inserted layer, of a further copy of an expert, or one
    without a source; otherwise an object with ``rows`` and/or ``columns`` (and ``experts`` of a
    stack [experts, rows, columns]): lists of [start, end) element ranges that hold further copies
    or new units (the first copy of a unit counts as the old one). Tensors without new parts are
    absent. Names are those on disk: transformers stacks the experts of a layer when it loads them.
    """
    result: dict[str, Any] = {}
    known: dict[tuple[DimMap | None, ...], dict[str, Any]] = {}
    for tensor in plan.tensors if tensors is None else tensors:
        part = _new_part(plan, tensor, known)
        if part:
            result[tensor.output.name] = part
    return result


def _new_part(
    plan: Plan, tensor: TensorPlan, ranges: dict[tuple[DimMap | None, ...], dict[str, Any]]
) -> Any:
    """``ranges`` are those of the maps met before: tensors with the same maps share one entry."""
    if tensor.action is Action.COMPUTED:
        # Made of old weights, or a tensor that the source's attention has not.
        known = plan.source_family.tensor(tensor.role)
        return {} if known is not None and known.when(plan.source_sizes) else "all"
    if tensor.redrawn and tensor.expert is not None:
        return "all"  # a mixture of old and new: none of the experts is the old FFN
    if tensor.action.all_new or tensor.expert_copy or tensor.in_new_layer:
        return "all"
    if tensor.dims not in ranges:
        ranges[tensor.dims] = {
            label: [list(r) for r in dim.new_ranges]
            for label, dim in zip(tensor.dim_labels, tensor.dims, strict=True)
            if dim is not None and dim.new_ranges
        }
    return ranges[tensor.dims]


# -- as it is written -----------------------------------------------------------------------------


def abbreviated(new: Mapping[str, Any]) -> dict[str, Any]:
    """The map as growkit.json holds it."""
    parts: dict[int, tuple[str, Any]] = {}  # of objects that many tensors share
    found: dict[tuple[str, str], tuple[Any, list[tuple[int, ...]]]] = {}
    for name, part in new.items():
        if id(part) not in parts:
            short = part if part == "all" else {k: _strides(v) for k, v in part.items()}
            parts[id(part)] = (repr(short), short)
        key, short = parts[id(part)]
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        template = _NUMBER.sub("\0", name)
        found.setdefault((template, key), (short, []))[1].append(numbers)
    return {
        _pattern(template, box): short
        for (template, _), (short, numbers) in found.items()
        for box in _boxes(numbers)
    }


def written_out(new: Mapping[str, Any], file: str, remedy: str) -> dict[str, Any]:
    """The map in memory, of what ``file`` holds; the inverse of :func:`abbreviated`.

    Raises:
        CheckpointError: an abbreviation that stands for nothing, or for more than a model has.
    """
    result: dict[str, Any] = {}
    left = MAX_VALUES

    def spend(count: int, what: str) -> None:
        nonlocal left
        left -= count
        if count < 1 or left < 0:
            raise CheckpointError(
                f"{file!r} holds new_parameters {what}, which stands for {count:,} entries.", remedy
            )

    for pattern, part in new.items():
        full: Any = part
        if part != "all":
            full = {}
            for label, ranges in part.items():
                full[label] = []
                for one in ranges:
                    if len(one) not in (2, 4):
                        raise CheckpointError(
                            f"{file!r} holds the range {one} of {pattern!r}, and a range has 2 or "
                            "4 numbers.",
                            remedy,
                        )
                    start, end, step, times = one if len(one) == 4 else (*one, 0, 1)
                    spend(times, f"{pattern!r}: {one}")
                    full[label] += [[start + i * step, end + i * step] for i in range(times)]
        runs = [(int(a), int(b)) for a, b in _BRACES.findall(pattern)]
        count = 1
        for first, last in runs:
            count *= max(last - first + 1, 0)
        spend(count, repr(pattern))
        for numbers in product(*(range(first, last + 1) for first, last in runs)):
            result[_filled(_BRACES, pattern, map(str, numbers))] = full
    return result


def _strides(ranges: Sequence[Sequence[int]]) -> list[Range]:
    """Equal ranges at equal distances as one: [start, end, step, times]."""
    short: list[Range] = []
    at = 0
    while at < len(ranges):
        start, end = ranges[at]
        times, step = 1, 0
        while at + times < len(ranges):
            begin, stop = ranges[at + times]
            step = step or begin - start
            if (begin, stop) != (start + times * step, end + times * step):
                break
            times += 1
        if times < FEWEST:
            short.append([start, end])
            at += 1
        else:
            short.append([start, end, step, times])
            at += times
    return short


def _boxes(numbers: Sequence[tuple[int, ...]]) -> list[Box]:
    """Tuples as boxes [first, last] of every place: neighbours with the same rest are one."""
    if not numbers[0]:
        return [()]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for one in sorted(numbers):
        rests.setdefault(one[0], []).append(one[1:])
    runs: list[tuple[int, int, list[Box]]] = []
    for number, others in rests.items():
        boxes = _boxes(others)
        if runs and (runs[-1][1] + 1, runs[-1][2]) == (number, boxes):
            runs[-1] = (runs[-1][0], number, boxes)
        else:
            runs.append((number, number, boxes))
    return [((first, last), *box) for first, last, boxes in runs for box in boxes]


def _pattern(template: str, box: Box) -> str:
    runs = (str(a) if a == b else f"{{{a}..{b}}}" for a, b in box)
    return _filled(_PLACE, template, runs)


def _filled(place: re.Pattern[str], text: str, values: Iterable[str]) -> str:
    """``text`` with its places filled, the first one with the first value."""
    each = iter(values)
    return place.sub(lambda _: next(each), text)
