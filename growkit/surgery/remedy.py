"""What to ask for instead of sizes that transformers would not load: found by asking the family."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from growkit.families import Family
from growkit.families.base import Config

MOST = 4


def sizes_that_load(
    family: Family, config: Config, sizes: Mapping[str, int], grown: Collection[str]
) -> str:
    """One sentence with query head counts and hidden sizes near ``sizes`` that are not refused.

    Args:
        family: of the written checkpoint.
        config: of the source.
        sizes: the refused sizes.
        grown: axes that the request grew.
    """
    choices = []
    if "query_head" in grown:
        step = sizes["query_head"] // sizes["kv_head"] if "kv_head" in grown else sizes["kv_head"]
        counts = _accepted(family, config, sizes, "query_head", step)
        if counts:
            choices.append(f"query heads that fit: {counts}")
    hidden = _accepted(family, config, sizes, "hidden", 1, sizes["hidden"] + 1)
    if hidden:
        choices.append(f"or with --hidden {hidden}" if choices else f"with --hidden {hidden}")
    if "hidden" in grown and "query_head" in sizes and "query_head" not in grown:
        heads, odd = divmod(sizes["query_head"] * sizes["hidden"], family.sizes(config)["hidden"])
        if not odd and not family.refusal(config, {**sizes, "query_head": heads}):
            choices.append(f"with --query-heads {heads} beside the hidden size")
    if not choices and "hidden" in grown and "query_head" in sizes:
        choices = _heads_that_fit(family, config, sizes)
    if not choices:
        return "Choose another size or grow another axis too."
    text = ", ".join(choices)
    return f"{text[0].upper()}{text[1:]}."


def _accepted(
    family: Family,
    config: Config,
    sizes: Mapping[str, int],
    axis: str,
    step: int,
    first: int | None = None,
) -> str:
    """Multiples of ``step`` up to four times the refused size that the family accepts.

    They begin at ``first``, by default above the source's size.
    """
    first = first or family.sizes(config)[axis] + step
    accepted = [
        size
        for size in range(first - first % step, 4 * sizes[axis] + 1, step)
        if family.refusal(config, {**sizes, axis: size}) is None
    ]
    return ", ".join(str(size) for size in accepted[:MOST])


def _heads_that_fit(family: Family, config: Config, sizes: Mapping[str, int]) -> list[str]:
    """Numbers and sizes of heads that go with a hidden size, for classes that tie them together."""
    width = sizes["query_head"] // sizes["kv_head"]
    counts = [
        str(heads)
        for heads in range(sizes["query_head"] + width, 4 * sizes["query_head"] + 1, width)
        if not family.refusal(config, {**sizes, "query_head": heads, "kv_head": heads // width})
    ]
    dims = [
        str(dim)
        for dim in range(sizes["head_dim"] + 1, 4 * sizes["head_dim"] + 1)
        if not family.head_dim.refusal
        and not family.refusal(config, {**sizes, "head_dim": dim, "value_dim": dim})
    ]
    options = (("--heads", counts[:MOST]), ("--head-dim", dims[:MOST]))
    texts = [f"with {option} {', '.join(found)}" for option, found in options if found]
    return [f"or {text}" if place else text for place, text in enumerate(texts)]
