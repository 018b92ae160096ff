"""A twin: the user's own config with every flag kept and few, small sizes, that a class accepts.

What makes a model large is taken away (depth, hidden size, vocabulary, numbers of heads and
experts, widths), and nothing else: a twin takes the same branches of the class as the model does.
Names of config fields only say what to try first; whatever the class refuses is left as it was, and
what is still too large is halved field by field. Classes are built on the meta device meanwhile,
so that a config of 10^12 parameters costs no more than a small one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from growkit.derive.builder import Builder, Path, Underivable, Values, check_forward, said_by
from growkit.derive.few_layers import few_layers
from growkit.derive.layer_stacks import Layers, find_layers
from growkit.derive.small_sizes import halved, strategies, with_shared_heads
from growkit.families.layer_fields import with_values
from growkit.verification.sight import Sight

Look = Callable[[Builder, Values, Layers], tuple[Values, Sight | None]]


def make_twin(
    builder: Builder,
    values: Mapping[str, Any],
    keep: Collection[Path] = (),
    look: Look | None = None,
) -> tuple[Values, Layers]:
    """Config values of a twin of the model with these, and how it counts layers.

    Args:
        builder: of its class; is told what the twin can be given to see.
        values: of the model.
        keep: fields that decide what layers are, and stay as they are.
        look: makes the towers of a twin work.

    Raises:
        Underivable: no smaller config is accepted by the class.
    """

    def sighted(small: Values, layers: Layers) -> Values:
        if look is not None:
            small, builder.sight = look(builder, small, layers)
        return small

    builder.sight = None
    layers = find_layers(builder, values)
    tried: list[str] = []
    for sizes in strategies(values):
        small = with_values(values, sizes)
        try:
            short, fewer = few_layers(builder, small, layers, keep)
            if layers.second:
                short, second = few_layers(builder, short, layers.second, keep)
                fewer = replace(fewer, second=second)
            short = halved(builder, short)
            try:
                check_forward(builder.build(short))
            except Exception:  # a class that has to see something
                short = sighted(short, fewer)
                if builder.sight is None:
                    raise
                return short, fewer
        except Exception as error:  # whatever a class objects to: the next set may do
            tried.append(said_by(error))
            continue
        return sighted(with_shared_heads(builder, short), fewer), fewer
    reasons = "; ".join(dict.fromkeys(tried)) or "-"
    if lacking := re.search(r"requires the (\w+) library", reasons):
        raise Underivable(
            f"The class of {builder.model_type!r} needs the package {lacking[1]}, which is not "
            f"installed (pip install {lacking[1]}).",
            f"Install it, and derive again: pip install {lacking[1]}",
        )
    raise Underivable(
        f"{len(tried)} small configs of {builder.model_type!r} were tried, and the class accepts "
        f"none ({reasons[:400]})."
    )
