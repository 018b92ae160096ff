"""Growth operators, one a file. Each turns a request into axis maps; none sees a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from growkit.surgery.effect import Operator
from growkit.surgery.operators.depth import Depth
from growkit.surgery.operators.experts import Experts
from growkit.surgery.operators.ffn import Ffn
from growkit.surgery.operators.head_dim import HeadDim
from growkit.surgery.operators.heads import Heads
from growkit.surgery.operators.hidden import Hidden
from growkit.surgery.operators.kv_heads import KvHeads
from growkit.surgery.operators.noise_heads import NoiseHeads
from growkit.surgery.operators.query_heads import QueryHeads
from growkit.surgery.operators.signal_heads import SignalHeads
from growkit.surgery.operators.slices import Slices
from growkit.surgery.operators.uniform_heads import UniformHeads
from growkit.surgery.operators.untie import UntieEmbeddings
from growkit.surgery.symmetry import Symmetry


class Choices(Protocol):
    """What operators ask of a request beside their own amount (see GrowthRequest)."""

    @property
    def new_heads(self) -> str: ...
    @property
    def new_units(self) -> str: ...
    @property
    def hidden_method(self) -> str: ...
    @property
    def depth_method(self) -> str: ...
    @property
    def experts_per_token(self) -> int | None: ...
    @property
    def expert_reinit(self) -> float: ...
    @property
    def ffn(self) -> str | None: ...
    @property
    def hidden(self) -> str | None: ...
    def placement(self) -> str | tuple[int, ...]: ...
    def symmetry_choice(self) -> Symmetry: ...


# Recipe key -> how the operator is made of the amount (None for a switch; the text of a key in
# TEXTS) and the request's choices, in the order of application. One line an operator.
OPERATORS: dict[str, Callable[[Any, Choices], Operator]] = {
    "untie_embeddings": lambda amount, request: UntieEmbeddings(),
    "uniform_heads": lambda amount, request: UniformHeads(amount),
    "signal_heads": lambda amount, request: SignalHeads(amount, request.new_heads),
    "noise_heads": lambda amount, request: NoiseHeads(amount),
    "heads": lambda amount, request: Heads(amount, request.new_heads),
    "query_heads": lambda amount, request: QueryHeads(amount, request.new_heads),
    "kv_heads": lambda amount, request: KvHeads(amount),
    "head_dim": lambda amount, request: HeadDim(amount),
    "ffn": lambda amount, request: Ffn(amount, request.new_units),
    "hidden": lambda amount, request: Hidden(amount, request.hidden_method),
    "layers": lambda amount, request: Depth(amount, request.depth_method, request.placement()),
    "layers_from": lambda text, request: Slices(text),
    "decoder_layers": lambda amount, request: Depth(
        amount, request.depth_method, request.placement(), "decoder_layer"
    ),
    "experts": lambda amount, request: Experts(
        amount,
        request.experts_per_token,
        request.symmetry_choice(),
        request.expert_reinit,
        widened=bool(request.ffn or request.hidden),
    ),
}

# Keys whose value is no amount.
TEXTS = ("layers_from",)

__all__ = [
    "OPERATORS",
    "TEXTS",
    "Depth",
    "Experts",
    "Ffn",
    "HeadDim",
    "Heads",
    "Hidden",
    "KvHeads",
    "NoiseHeads",
    "Operator",
    "QueryHeads",
    "SignalHeads",
    "Slices",
    "UniformHeads",
    "UntieEmbeddings",
]
