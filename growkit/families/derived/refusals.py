"""What a derived table does not offer, and sizes that its class does not accept."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from growkit.families.derived.config_sizes import ConfigSizes
from growkit.families.derived.form import GROUPS, SPOKEN_FOR
from growkit.families.layer_fields import leaf
from growkit.families.unit_layout import Sizes


def refused_options(read: ConfigSizes) -> RefusedOptions:
    """Options that are not proven or that this config stands against, and why."""
    operators = read.table["operators"]
    why_not = {name: proof["why"] for name, proof in operators.items() if "why" in proof}
    refused = RefusedOptions(why_not)
    refused.proven = {name for name, proof in operators.items() if "error" in proof}
    for option, why in _refused_here(read):
        refused[option] = why
        refused.proven.discard(option)
    if "expert" not in read.axes and not read.stacks()[1:]:
        refused.proven.add("--experts")  # the operator says which dense models get some
    if not operators:  # the table of a twin, whose proof is under way
        refused.proven = None
    return refused


def _refused_here(read: ConfigSizes) -> Iterator[tuple[str, str]]:
    """Options that this config alone stands against, and why."""
    inner = leaf(read.config, read.place)
    for name in GROUPS:
        value = inner.get(name, read.table["defaults"].get(name))
        if isinstance(value, int) and value > 1:
            yield "--experts", f"it chooses experts within groups ({name} = {value})"
    for name in read.axes.get("hidden", ())[1:]:
        said = leaf(read.config, read.path(name))
        hidden = read.number(read.config, read.axes["hidden"][0])
        if said is not None and said != hidden:
            yield "--hidden", f"{name[1:]} is {said}, and the hidden size {hidden}"
    if (why := read.stream.get("tied")) and read.tied(read.config):
        yield "--hidden", why


def refusal(read: ConfigSizes, sizes: Sizes) -> str | None:
    """Why the class does not accept these sizes; None where it does."""
    if "query_head" in read.fills:
        heads, hidden, width = (sizes[name] for name in ("query_head", "hidden", "head_dim"))
        times = [sizes[f".{name}"] for name in read.fills["query_head"]]
        if heads * width != hidden * prod(times):
            return (
                f"{read.table['class']} wants the hidden size to be heads x head size, and "
                f"{heads} heads of {width} make {heads * width}, not {hidden}; grow --hidden "
                "and --heads together"
            )
    if (name := read.table.get("divides")) and sizes["hidden"] % sizes["query_head"]:
        return (
            f"{name} refuses {read.axes['hidden'][0]} {sizes['hidden']} with "
            f"{read.axes['query_head'][0]} {sizes['query_head']}: it has to divide, even with "
            "an explicit head_dim"
        )
    if "kv_head" in sizes and "kv_head" not in read.axes:
        if sizes["kv_head"] != sizes["query_head"]:
            return (
                f"{read.table['class']} has one key/value head for each query head, not "
                f"{sizes['kv_head']} for {sizes['query_head']}; --heads grows both"
            )
    elif "kv_head" in sizes and sizes["query_head"] % sizes["kv_head"]:
        return f"{sizes['query_head']} query heads cannot share {sizes['kv_head']} key/value heads"
    return None


class RefusedOptions(dict[str, str]):
    """Option -> why not: whatever is not proven is not offered."""

    proven: set[str] | None = None

    def __contains__(self, option: object) -> bool:
        told = SPOKEN_FOR.get(str(option), option)
        return self.proven is not None and told not in self.proven

    def get(self, option: str, default: Any = None) -> Any:
        if option not in self:
            return default
        told = SPOKEN_FOR.get(option, option)
        return super().get(told, "it is not derived yet")
