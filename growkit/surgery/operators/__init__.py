"""Growth operators, one a file. Each turns a request into axis maps; none sees a tensor."""

from __future__ import annotations

from growkit.surgery.growth import Operator
from growkit.surgery.operators.depth import Depth
from growkit.surgery.operators.ffn import Ffn
from growkit.surgery.operators.head_dim import HeadDim
from growkit.surgery.operators.heads import Heads
from growkit.surgery.operators.hidden import Hidden
from growkit.surgery.operators.kv_heads import KvHeads
from growkit.surgery.operators.noise_heads import NoiseHeads
from growkit.surgery.operators.query_heads import QueryHeads
from growkit.surgery.operators.signal_heads import SignalHeads
from growkit.surgery.operators.uniform_heads import UniformHeads
from growkit.surgery.operators.untie import UntieEmbeddings

# Recipe key -> operator, in the order of application. One line an operator.
OPERATORS: dict[str, type] = {
    "untie_embeddings": UntieEmbeddings,
    "uniform_heads": UniformHeads,
    "signal_heads": SignalHeads,
    "noise_heads": NoiseHeads,
    "heads": Heads,
    "query_heads": QueryHeads,
    "kv_heads": KvHeads,
    "head_dim": HeadDim,
    "ffn": Ffn,
    "hidden": Hidden,
    "layers": Depth,
}

__all__ = ["OPERATORS", "Operator"]
