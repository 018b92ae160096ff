"""What each written tensor is made of: the list at the heart of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import frexp, prod
from typing import Any

from growkit.checkpoint import DTYPES, Checkpoint, OutputTensor
from growkit.core.errors import CheckpointError
from growkit.families import Family, Tensor
from growkit.families.base import Dim
from growkit.families.differential import LAMBDA_ROLES
from growkit.surgery.axis_map import NEW
from growkit.surgery.compose import ComposedGrowth
from growkit.surgery.conversion import Computed, UnitMaps
from growkit.surgery.dim_map import DimMap, map_dim
from growkit.surgery.effect import LayerSource
from growkit.surgery.lambdas import LambdaChange

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class ExpertShare:
    """The part of an expert's output weight that one of its copies carries.

    Copies that are chosen together have the same 1 / copies of the old probability; so their
    outputs are averaged, and each carries ``copies`` times its part of the weight. Noisy experts,
    which are not chosen together, carry the same: the old weight and noise.

    Attributes:
        rank: which copy.
        copies: how many there are.
    """

    rank: int
    copies: int


@dataclass(frozen=True)
class TensorPlan:
    """How one written tensor comes about.

    Attributes:
        output: name, dtype and shape.
        role: its role in the family table.
        source: name of the tensor it is made of; None when it is new.
        dims: map of each dimension, None where it is unchanged.
        action: ``copied`` (same bytes), ``grown``, ``rescaled``, ``zero``, ``closed``
            (a norm gain stored with an offset, written so that the gain is zero), ``new``,
            ``redrawn`` (part of the units are) or ``computed`` (by a conversion).
        factor: every entry is multiplied by this, after sharing.
        init: how entries without a source start (``normal``, ``ones``, ``zeros``).
        lambda_change: what happens to the lambda vector, if this is one.
        layer: index of the written layer, if it belongs to one.
        layer_source: what that layer is made of.
        gain_offset: what the model adds to every entry; the factor applies to the sum.
        expert: index of the written expert, if it belongs to one.
        expert_copy: it belongs to a further copy of an expert.
        share: the part of the source that it carries, where copies of an expert share it.
        redrawn: part of the FFN units that is drawn anew (of a stack: in its further copies).
        piece: index of this matrix in a stack of matrices (see :meth:`matrices`).
        source_start, output_start: bytes of the stacks in front of it.
        computed: how its entries are calculated, where no map says where they come from.
    """

    output: OutputTensor
    role: str
    source: str | None
    dims: tuple[DimMap | None, ...]
    action: str
    factor: float = 1.0
    init: str = "normal"
    lambda_change: LambdaChange | None = None
    layer: int | None = None
    gain_offset: float = 0.0
    layer_source: LayerSource | None = None
    expert: int | None = None
    expert_copy: bool = False
    share: ExpertShare | None = None
    redrawn: float = 0.0
    piece: int | None = None
    source_start: int = 0
    output_start: int = 0
    computed: Computed | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the written tensor."""
        return prod(self.output.shape) * DTYPES[self.output.dtype].bits // 8

    @property
    def in_new_layer(self) -> bool:
        """It belongs to an inserted layer or to a further copy of one."""
        return self.layer_source is not None and self.layer_source.kind != "kept"

    @property
    def dim_labels(self) -> tuple[str, ...]:
        """What the dimensions are called."""
        names = ("experts", "rows", "columns")
        return names if len(self.output.shape) == 3 else names[1 : 1 + len(self.output.shape)]

    @property
    def key(self) -> str:
        """Names the tensor, or its place in a stack; randomness is keyed by it."""
        return self.output.name if self.piece is None else f"{self.output.name}[{self.piece}]"

    @property
    def source_key(self) -> str:
        """Names the source, or its place in a stack."""
        return f"{self.source}+{self.source_start}" if self.piece is not None else f"{self.source}"

    def matrices(self) -> Iterator[TensorPlan]:
        """The tensor itself, or of a stack [experts, rows, columns] a plan for each matrix."""
        shape = self.output.shape
        if len(shape) != 3 or self.action in ("copied", "zero", "computed"):
            yield self
            return
        stack, *dims = self.dims
        old = [dim.old_width if dim else size for dim, size in zip(dims, shape[1:], strict=True)]
        bytes_each = DTYPES[self.output.dtype].bits // 8
        for piece in range(shape[0]):
            origin = piece if stack is None else int(stack.source[piece])
            rank = 0 if stack is None else int(stack.rank[piece])
            yield replace(
                self,
                output=OutputTensor(self.output.name, self.output.dtype, shape[1:]),
                source=None if origin == NEW else self.source,
                dims=tuple(dims),
                share=replace(self.share, rank=rank) if self.share else None,
                redrawn=self.redrawn if rank else 0.0,
                expert=piece,
                expert_copy=rank > 0,
                piece=piece,
                source_start=max(origin, 0) * prod(old) * bytes_each,
                output_start=piece * prod(shape[1:]) * bytes_each,
            )


@dataclass(frozen=True)
class TensorGroup:
    """Written tensors that differ in nothing but their expert.

    Attributes:
        first: the first of them.
        count: how many there are.
    """

    first: TensorPlan
    count: int


class PlanBuilder:
    """Makes the list of written tensors.

    Maps are computed once for each pair of layouts: the thousands of tensors of a large mixture
    share a handful.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        source_family: Family,
        family: Family,
        source_sizes: Mapping[str, int],
        growth: ComposedGrowth,
        config: Mapping[str, Any],
    ) -> None:
        self.checkpoint, self.config = checkpoint, config
        self.source_family, self.family = source_family, family
        self.source_sizes, self.growth = source_sizes, growth
        self.rounded = False
        self._sources: dict[str, Tensor | None] = {}
        self._dims: dict[str, tuple[DimMap | None, ...]] = {}
        self._maps: dict[tuple[Dim, Dim], DimMap | None] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def tensors(self) -> Iterator[TensorPlan]:
        """Every written tensor, in writing order."""
        for tensor, layer, name in self.family.names(self.growth.sizes):
            yield self._plan(tensor, layer, name)

    def groups(self) -> Iterator[TensorGroup]:
        """The same by kind: the experts of a layer differ in dtype, and in being a further copy."""
        experts: dict[str, tuple[Tensor, ...]] = {}
        for tensor, layer in self.family.members(self.growth.sizes):
            if tensor.role not in experts:
                experts[tensor.role] = tensor.per_expert(self.growth.sizes)
            members = experts[tensor.role]
            kinds = self._kinds(tensor, layer) if members[0].expert is not None else {}
            for first, count in kinds.values() or [(0, 1)]:
                member = members[first]
                name = member.name if layer is None else member.name.replace("{layer}", str(layer))
                yield TensorGroup(self._plan(member, layer, name), count)

    def _kinds(self, tensor: Tensor, layer: int | None) -> dict[tuple[str, bool], tuple[int, int]]:
        """Kind of the experts of a layer -> (the first of them, how many)."""
        source = self._source_tensor(tensor)
        if source is None:
            return {("", False): (0, self.growth.sizes["expert"])}
        name = source.name
        if layer is not None:
            name = name.replace("{layer}", str(self.growth.stacks[tensor.stack][layer].source))
        experts = self.source_sizes.get("expert", 1)
        stored = self.checkpoint.tensors
        dtypes = [stored[name.replace("{expert}", str(e))].dtype for e in range(experts)]
        kinds: dict[tuple[str, bool], tuple[int, int]] = {}
        for expert in range(self.growth.sizes["expert"]):
            origin, rank = self._origins[expert]
            kind = dtypes[origin], rank > 0
            first, count = kinds.get(kind, (expert, 0))
            kinds[kind] = first, count + 1
        return kinds

    def _plan(self, tensor: Tensor, layer: int | None, name: str) -> TensorPlan:
        source_tensor = self._source_tensor(tensor)
        layer_source = self.growth.stacks[tensor.stack][layer] if layer is not None else None
        if tensor.role not in self._shapes:
            self._shapes[tensor.role] = tensor.shape(self.growth.sizes)
        shape = self._shapes[tensor.role]
        if source_tensor is None:
            dtype = self._dtype_of_new(layer_source)
            output = OutputTensor(name, dtype, shape)
            return TensorPlan(
                output,
                tensor.role,
                None,
                (None,) * len(shape),
                "new",
                init=tensor.init,
                layer=layer,
                layer_source=layer_source,
            )
        source = source_tensor.name
        if layer_source is not None:
            source = source.replace("{layer}", str(layer_source.source))
        rank = 0
        if tensor.expert is not None:
            origin, rank = self._origins[tensor.expert]
            source = source.replace("{expert}", str(origin))
        dtype = self.checkpoint.tensors[source].dtype
        dims = self._dims_of(tensor, source_tensor)
        if layer_source is not None and layer_source.kind == "identity" and tensor.writes_residual:
            output = OutputTensor(name, dtype, shape)
            return TensorPlan(
                output,
                tensor.role,
                source,
                dims,
                "closed" if tensor.gain_offset else "zero",
                layer=layer,
                gain_offset=tensor.gain_offset,
                layer_source=layer_source,
                expert=tensor.expert,
                expert_copy=rank > 0,
            )
        change = self._lambda_change(layer, layer_source)
        factor = self._factor(tensor, change, dtype)
        share = None
        copies = max(self.growth.expert_copies, self.growth.noisy_experts)
        if tensor.of_experts and tensor.writes_residual and copies > 1:
            share = ExpertShare(rank, copies)
            factor *= share.copies
        lambda_change = change if change and tensor.role in LAMBDA_ROLES else None
        if lambda_change is not None or _needs_float32(tensor, factor):
            dtype = "F64" if dtype == "F64" else "F32"
        action = "copied"
        if any(dim is not None for dim in dims):
            action = "grown"
            if dtype not in FLOATS:
                raise CheckpointError(
                    f"Tensor {source!r} has dtype {dtype}, which growkit copies but cannot grow.",
                    "Convert the checkpoint to bfloat16, float16 or float32 first.",
                )
        elif factor != 1.0 or lambda_change is not None:
            action = "rescaled"
        redrawn = self._redrawn(tensor, rank, layer_source)
        if redrawn:
            action = "redrawn"
        return TensorPlan(
            OutputTensor(name, dtype, shape),
            tensor.role,
            source,
            dims,
            action,
            factor,
            tensor.init,
            lambda_change,
            layer,
            tensor.gain_offset,
            layer_source,
            tensor.expert,
            rank > 0,
            share,
            redrawn,
        )

    def _source_tensor(self, tensor: Tensor) -> Tensor | None:
        if tensor.role not in self._sources:
            self._sources[tensor.role] = self._find_source(tensor)
        return self._sources[tensor.role]

    def _find_source(self, tensor: Tensor) -> Tensor | None:
        found = self.source_family.tensor(tensor.role)
        if found is not None and found.when(self.source_sizes):
            return found
        if tensor.role == "lm_head":
            return self.source_family.tensor("embed")
        return None

    @cached_property
    def _origins(self) -> list[tuple[int, int]]:
        """(old expert, which copy of it) of every written expert."""
        axis = self.growth.axes.get("expert")
        if axis is None:
            return [(expert, 0) for expert in range(self.growth.sizes["expert"])]
        return list(zip(axis.source.tolist(), axis.rank.tolist(), strict=True))

    def _redrawn(self, tensor: Tensor, rank: int, layer: LayerSource | None) -> float:
        """Of all experts made of an FFN, of further copies of experts; not in inserted blocks."""
        if not tensor.of_experts or (layer is not None and layer.kind == "identity"):
            return 0.0
        stack = tensor.expert is None
        made_of_ffn = self.growth.family is not None
        return self.growth.expert_reinit if stack or made_of_ffn or rank else 0.0

    def _dtype_of_new(self, layer_source: LayerSource | None) -> str:
        reference = self.source_family.tensor("input_norm" if layer_source else "final_norm")
        assert reference is not None
        layer = str(layer_source.source) if layer_source else ""
        return self.checkpoint.tensors[reference.name.replace("{layer}", layer)].dtype

    def _dims_of(self, tensor: Tensor, source: Tensor) -> tuple[DimMap | None, ...]:
        if tensor.role not in self._dims:
            units = self._unit_maps(tensor)
            pairs = zip(source.dims, tensor.dims, strict=True)
            self._dims[tensor.role] = tuple(self._map(old, new, units) for old, new in pairs)
        return self._dims[tensor.role]

    def _map(self, old: Dim, new: Dim, units: UnitMaps | None) -> DimMap | None:
        """The map of one dimension; tensors whose units are the growth's own share it."""
        if units is None and (old, new) in self._maps:
            return self._maps[old, new]
        aliases, axes = units or ({}, self.growth.axes)
        found = map_dim(
            old.layout(self.source_sizes),
            new.layout(self.growth.sizes),
            axes,
            new,
            self.growth.new_units,
            self.growth.key_factor,
            aliases,
            self.growth.perturbed,
        )
        if units is None:
            self._maps[old, new] = found
        return found

    def _unit_maps(self, tensor: Tensor) -> UnitMaps | None:
        """What the axes of a tensor are called in the source, and where their units come from;
        None: as everywhere in this growth."""
        return None

    def _lambda_change(
        self, layer: int | None, layer_source: LayerSource | None
    ) -> LambdaChange | None:
        if layer is None or layer_source is None or self.family.lambda_init is None:
            return None
        assert self.source_family.lambda_init is not None
        change = LambdaChange(
            self.source_family.lambda_init(self.checkpoint.config, layer_source.source),
            self.family.lambda_init(self.config, layer),
            self.growth.noise_copies,
        )
        return None if change.is_identity else change

    def _factor(self, tensor: Tensor, change: LambdaChange | None, dtype: str) -> float:
        growth, role = self.growth, tensor.role
        factor = 1.0
        if role in ("final_norm", "final_norm_bias"):
            factor *= growth.final_norm_factor
        if role == "embed":
            factor *= growth.embedding_factor
        if tensor.is_gain:
            factor *= growth.norm_factor
        elif growth.stream_factor != 1.0 and self._writes_stream(tensor):
            factor *= growth.stream_factor
        elif role in self.family.norm.shared_inputs and dtype in ("F32", "F64"):
            # Another norm reads the rescaled epsilon. In 16-bit dtypes the factor would round more
            # than it mends.
            factor *= growth.norm_factor
        if change is not None and role == self.family.lambda_scale_role:
            if change.scale_factor != 1.0 and role != "subln":
                self.rounded = True
            factor *= change.scale_factor
        return factor

    def _writes_stream(self, tensor: Tensor) -> bool:
        """The embedding, and what a block writes."""
        return any(
            "hidden" in dim.layout(self.source_sizes).axes
            for dim in tensor.dims
            if not (dim.consumes or dim.normed)
        )


def _needs_float32(tensor: Tensor, factor: float) -> bool:
    """A rescaled gain: a few numbers a layer, exact in float32 where bfloat16 would round.

    Powers of two do not round, but with an offset even a half does: (w - 1) / 2 has more digits
    than w.
    """
    if factor == 1.0:
        return False
    rounds = frexp(factor)[0] != 0.5 or tensor.gain_offset != 0.0
    return tensor.role == "subln" or (tensor.is_gain and rounds)
