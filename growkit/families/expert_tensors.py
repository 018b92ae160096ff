"""What families with a mixture of experts share: experts on disk in two layouts, and a router.

Published checkpoints, and transformers by default, store every matrix of every expert as a tensor
of its own. ``save_pretrained(save_original_format=False)`` stores the experts of a layer in two
tensors (transformers 5.23, ``conversion_mapping.py``):

    gate_up_proj  [experts, 2 x ffn, hidden]  (all gates, then all ups)
    down_proj     [experts, hidden, ffn]

The config does not tell which; the names do. A checkpoint is written in the layout it was read in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from growkit.families.base import Config, Dim, Tensor, produces, required
from growkit.families.decoder import (
    LAYER,
    ffn_in,
    ffn_out,
    gate_up_rows,
    hidden_in,
    hidden_out,
)
from growkit.families.unit_layout import Sizes, plain

FUSED = LAYER + "mlp.experts."
expert_out = produces(plain("expert"))


def has_experts(sizes: Sizes, layer: int) -> bool:
    """The FFN of this layer is a set of experts (bit ``layer`` of ``expert_layers``)."""
    return bool(sizes["expert_layers"] >> layer & 1)


def moved_layers(sizes: Sizes, sources: Sequence[int]) -> dict[str, int]:
    """What depth growth makes of the pattern: every layer is of its source's kind, and one without
    a source (-1) of the kind that the class gives to its index.

    The period (``expert_step``) stays where it still holds; else a list has to say it all. Patterns
    of derived tables (``layers:0`` ...) are moved likewise.
    """
    masks = {
        name: sum(1 << new for new, old in enumerate(sources) if old >= 0 and mask >> old & 1)
        for name, mask in sizes.items()
        if name.startswith("layers:")
    }
    if "expert_layers" not in sizes:
        return masks
    step = sizes.get("expert_step", 1)
    moved = [
        layer
        for layer, source in enumerate(sources)
        if (not (layer + 1) % step if source < 0 else has_experts(sizes, source))
    ]
    facts = {"expert_layers": sum(1 << layer for layer in moved)}
    if step > 1 and any((layer + 1) % step for layer in moved):
        facts["expert_step"] = 1
    return facts


def is_dense(sizes: Sizes, layer: int) -> bool:
    """The FFN of this layer is an ordinary one."""
    return not has_experts(sizes, layer)


def fused(sizes: Sizes) -> bool:
    """The experts of a layer stand in two tensors."""
    return bool(sizes.get("fused_experts"))


def separate(sizes: Sizes) -> bool:
    """Every expert stores tensors of its own."""
    return not fused(sizes)


def stored_layout(names: Collection[str]) -> dict[str, int]:
    """Which of the two layouts tensors of these names have."""
    return {"fused_experts": int(any(name.endswith(".experts.gate_up_proj") for name in names))}


def expert_sizes(config: Config, experts: str, layers: int) -> dict[str, int]:
    """Sizes of the experts; ``experts`` is the config field of their number."""
    return {
        "expert": required(config, experts),
        "active_expert": required(config, "num_experts_per_tok"),
        "expert_layers": (1 << layers) - 1,
    }


GROUPED_BYTES = 16


def aligned(model_type: str, width_field: str) -> Callable[[Config, Sizes], str | None]:
    """Objection to widths that the default matrix product of transformers 5 cannot run.

    ``torch.nn.functional.grouped_mm`` wants rows of a multiple of 16 bytes, of experts and of the
    hidden state; a dense FFN knows no such bound. A checkpoint that is so already is left alone.
    """

    def refusal(config: Config, sizes: Sizes) -> str | None:
        named = str(config.get("dtype") or config.get("torch_dtype") or "")
        multiple = GROUPED_BYTES // (4 if "float32" in named else 2)
        same = config.get("model_type") == model_type
        for axis, name in (("ffn", width_field), ("hidden", "hidden_size")):
            size = sizes[axis]
            if size % multiple and not (same and config.get(name) == size):
                near = size // multiple * multiple
                fitting = " or ".join(str(n) for n in (near, near + multiple) if n)
                return (
                    f"its grouped matrix product of experts wants {name} to be a multiple of "
                    f"{multiple}, and {size} is none ({fitting} would do)"
                )
        return None

    return refusal


def expert_tensors(
    router: str, experts: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Tensor, ...]:
    """Router and experts in both layouts.

    Args:
        router: name of the router where every expert stores its own tensors, after the layer.
        experts: what stands between the layer and the expert's number there.
        gate, up, down: names of its matrices there.
    """

    def route(role: str, name: str, when: Callable[[Sizes], bool]) -> Tensor:
        return Tensor(role, LAYER + name, (expert_out, hidden_in), when, layers=has_experts)

    def weights(role: str, name: str, when: Callable[[Sizes], bool], *dims: Dim) -> Tensor:
        writes = dims[-1] is ffn_in
        return Tensor(role, name, dims, when, writes, layers=has_experts, of_experts=True)

    each = LAYER + experts + ".{expert}."
    return (
        route("router", router, separate),
        route("fused_router", "mlp.gate.weight", fused),
        weights("gate", f"{each}{gate}.weight", separate, ffn_out, hidden_in),
        weights("up", f"{each}{up}.weight", separate, ffn_out, hidden_in),
        weights("down", f"{each}{down}.weight", separate, hidden_out, ffn_in),
        weights("gate_up", FUSED + "gate_up_proj", fused, expert_out, gate_up_rows, hidden_in),
        weights("fused_down", FUSED + "down_proj", fused, expert_out, hidden_out, ffn_in),
    )
