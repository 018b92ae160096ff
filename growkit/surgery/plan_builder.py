"""The list of written tensors: counted by kind at once, made one by one only for who reads them.

A mixture of experts has hundreds of thousands of tensors and a thousand kinds of them, so whatever
sizes and costs are computed from are the kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import frexp
from typing import Any, overload

import numpy as np

from growkit.checkpoint import Checkpoint, OutputTensor
from growkit.core.errors import CheckpointError, UsageError
from growkit.families import Family, Tensor
from growkit.families.base import Dim
from growkit.families.differential import LAMBDA_ROLES
from growkit.surgery.aligned_layers import AlignedLayers
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.dim_map import DimMap, map_dim
from growkit.surgery.effect import NO_LAYER, Alias, Computed, Effect, LayerSource, UnitMaps
from growkit.surgery.lambdas import LambdaChange
from growkit.surgery.tensor_plans import Action, ExpertShare, TensorPlan

FLOATS = {"F64", "F32", "F16", "BF16"}


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
        growth: Effect,
        config: Mapping[str, Any],
    ) -> None:
        self.checkpoint, self.config = checkpoint, config
        self.source_family, self.family = source_family, family
        self.source_sizes, self.growth = source_sizes, growth
        self.rounded = False
        self._sources: dict[str, Tensor | None] = {}
        self._dims: dict[tuple[str, int], tuple[DimMap | None, ...]] = {}
        self._maps: dict[tuple[Dim, Dim, int], DimMap | None] = {}
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
                name = member.named(self.growth.sizes, layer)
                yield TensorGroup(self._plan(member, layer, name), count)

    def _kinds(self, tensor: Tensor, layer: int | None) -> dict[tuple[str, bool], tuple[int, int]]:
        """Kind of the experts of a layer -> (the first of them, how many)."""
        source = self._source_tensor(tensor)
        scratch = layer is not None and self.growth.stacks[tensor.stack][layer].from_scratch
        if source is None or scratch:
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
        layer_source = self.growth.stacks[tensor.stack][layer] if layer is not None else None
        if tensor.role in self.growth.computed:
            return self._computed(tensor, layer, layer_source, name)
        if layer_source is not None and layer_source.from_scratch:
            return self._from_scratch(tensor, layer, layer_source, name)
        if layer_source is not None and layer_source.kind == "aligned":
            return self._aligned(tensor, layer, layer_source, name)
        source_tensor = self._source_tensor(tensor)
        shape = self._shape(tensor)
        if source_tensor is None:
            return TensorPlan(
                output=OutputTensor(name, self._dtype_of_new(tensor, layer_source), shape),
                role=tensor.role,
                source=None,
                dims=(None,) * len(shape),
                action=Action.NEW,
                init=self.growth.starts.get(tensor.role, tensor.init),
                layer=layer,
                layer_source=layer_source,
                repeated=split.parts
                if (split := self.growth.split) and tensor.role == "router"
                else 1,
            )
        source, rank = source_tensor.named(self.source_sizes), 0
        if layer_source is not None:
            source = source.replace("{layer}", str(layer_source.source))
        if tensor.expert is not None:
            origin, rank = self._origins[tensor.expert]
            source = source.replace("{expert}", str(origin))
        dtype = self.checkpoint.tensors[source].dtype
        dims = self._dims_of(tensor, source_tensor)
        constant = self._constant(tensor, layer)
        if constant is not None:
            return TensorPlan(
                output=OutputTensor(name, dtype, shape),
                role=tensor.role,
                source=source,
                dims=dims,
                action=Action.CLOSED if constant else Action.ZERO,
                layer=layer,
                gain_offset=-constant,
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
        redrawn = self._redrawn(tensor, rank, layer_source)
        moved = any(dim is not None for dim in dims)
        if moved and dtype not in FLOATS:
            raise _no_floats(source, dtype, "copies but cannot grow")
        noise = 0.0
        warm = self.growth.warm_start
        if warm and len(shape) in (2, 3) and tensor.init == "normal":
            if dtype not in FLOATS:
                raise _no_floats(source, dtype, "cannot shrink")
            noise = warm.noise(tensor, self.source_sizes, self.growth.sizes)
            if tensor.writes_residual:
                noise *= residual_scale(self.growth.sizes[tensor.stack])
            action = Action.PERTURBED
        elif redrawn:
            action = Action.REDRAWN
        elif lambda_change is not None:
            action = Action.LAMBDA
        elif moved:
            action = Action.GROWN
        else:
            action = Action.COPIED if factor == 1.0 else Action.RESCALED
        if lambda_change is not None or _needs_float32(tensor, factor):
            dtype = "F64" if dtype == "F64" else "F32"
        return TensorPlan(
            output=OutputTensor(name, dtype, shape),
            role=tensor.role,
            source=source,
            dims=dims,
            action=action,
            factor=factor,
            init=tensor.init,
            lambda_change=lambda_change,
            layer=layer,
            gain_offset=tensor.gain_offset,
            layer_source=layer_source,
            expert=tensor.expert,
            expert_copy=rank > 0,
            share=share,
            redrawn=redrawn,
            noise=noise,
        )

    def _constant(self, tensor: Tensor, layer: int | None) -> float | None:
        """What all entries are: of what an identity layer closes, and of the norm that passes its
        numbers on to the last of the identity layers behind it."""
        if layer is None:
            return None
        stack = self.growth.stacks[tensor.stack]
        if stack[layer].kind == "identity" and tensor.writes_residual:
            return tensor.closing
        behind = stack[layer + 1].kind if layer + 1 < len(stack) else ""
        return tensor.passes_on if behind == "identity" else None

    def _from_scratch(
        self, tensor: Tensor, layer: int | None, layer_source: LayerSource, name: str
    ) -> TensorPlan:
        """A tensor of a layer that takes no weight from the source.

        It starts as the class starts it. What writes the residual stream is smaller by
        :func:`residual_scale`; in an identity layer it is zero.
        """
        shape = self._shape(tensor)
        action, factor, offset = Action.NEW, 1.0, tensor.gain_offset
        if tensor.writes_residual and layer_source.kind == "identity":
            action = Action.CLOSED if tensor.closing else Action.ZERO
            offset = -tensor.closing
        elif tensor.writes_residual:
            factor = residual_scale(self.growth.sizes[tensor.stack])
        if self.growth.warm_start and tensor.init == "normal" and len(shape) > 1:
            factor *= self.growth.warm_start.noise(tensor, self.source_sizes, self.growth.sizes)
        return TensorPlan(
            output=OutputTensor(name, self._dtype_from_scratch(tensor, layer_source), shape),
            role=tensor.role,
            source=None,
            dims=(None,) * len(shape),
            action=action,
            factor=factor,
            init=tensor.init,
            layer=layer,
            gain_offset=offset,
            layer_source=layer_source,
            expert=tensor.expert,
        )

    def _aligned(
        self, tensor: Tensor, layer: int | None, layer_source: LayerSource, name: str
    ) -> TensorPlan:
        """A tensor of a layer between two neighbours."""
        if (
            self.growth.axes
            or self.family is not self.source_family
            or "expert" in self.source_sizes
        ):
            raise UsageError(
                "--new-layers aligned averages the layers of the source as they are: no other "
                "growth goes with it, and no experts.",
                "Grow in two steps, or give --new-layers interposed.",
            )
        source = tensor.name.replace("{layer}", str(layer_source.source))
        computed = self._alignment.computed(tensor, layer_source.source, layer_source.partner)
        return self._calculated(tensor, name, source, computed, layer, layer_source)

    @cached_property
    def _alignment(self) -> AlignedLayers:
        return AlignedLayers(self.source_family, self.source_sizes)

    def _dtype_from_scratch(self, tensor: Tensor, layer_source: LayerSource) -> str:
        """That of the same tensor of the nearest old layer, else that of the embedding; lambda
        vectors are kept in float32."""
        source = self._source_tensor(tensor)
        if source is not None and layer_source.source != NO_LAYER:
            name = source.name.replace("{layer}", str(layer_source.source))
            found = self.checkpoint.tensors.get(name.replace("{expert}", "0"))
            if found is not None:
                return found.dtype
        embedding = self.source_family.tensor("embed")
        assert embedding is not None
        dtype = self.checkpoint.tensors[embedding.name].dtype
        return "F32" if tensor.role in LAMBDA_ROLES and dtype != "F64" else dtype

    def _computed(
        self, tensor: Tensor, layer: int | None, layer_source: LayerSource | None, name: str
    ) -> TensorPlan:
        computed = self.growth.computed[tensor.role]
        first = self.source_family.tensor(computed.reads[0])
        assert first is not None
        number = str(layer_source.source) if layer_source else ""
        source = first.name.replace("{layer}", number)
        return self._calculated(tensor, name, source, computed, layer, layer_source)

    def _calculated(
        self,
        tensor: Tensor,
        name: str,
        source: str,
        computed: Computed,
        layer: int | None,
        layer_source: LayerSource | None,
    ) -> TensorPlan:
        """A tensor whose entries are calculated, in the dtype of ``source``."""
        dtype = self.checkpoint.tensors[source].dtype
        if dtype not in FLOATS:
            raise _no_floats(source, dtype, "cannot calculate with")
        shape = self._shape(tensor)
        return TensorPlan(
            output=OutputTensor(name, dtype, shape),
            role=tensor.role,
            source=source,
            dims=(None,) * len(shape),
            action=Action.COMPUTED,
            layer=layer,
            layer_source=layer_source,
            computed=computed,
        )

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        if tensor.role not in self._shapes:
            self._shapes[tensor.role] = tensor.shape(self.growth.sizes)
        return self._shapes[tensor.role]

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
        if tensor.role in self.growth.fused:
            return self.source_family.tensor(self.growth.fused[tensor.role][0])
        # A layer that stays without experts in a mixture, or an expert that all tokens meet.
        for of_ffn in ("dense_", "shared_"):
            if tensor.role.startswith(of_ffn):
                role = tensor.role.removeprefix(of_ffn)
                return self.source_family.tensor(self.growth.fused.get(role, (role,))[0])
        return None

    @cached_property
    def _origins(self) -> list[tuple[int, int]]:
        """(old expert, which copy of it) of every written expert.

        Experts that share the units of an FFN are one copy of it, and a shared expert that has all
        units is the first.
        """
        axis = self.growth.axes.get("expert")
        if axis is None:
            return [(expert, 0) for expert in range(self.growth.sizes["expert"])]
        if (split := self.growth.split) is not None:
            whole = int(split.shared > 0 and split.first == 0)
            return [(0, rank // split.parts + whole) for rank in axis.rank.tolist()]
        return list(zip(axis.source.tolist(), axis.rank.tolist(), strict=True))

    def _redrawn(self, tensor: Tensor, rank: int, layer: LayerSource | None) -> float:
        """Of all experts made of an FFN, of further copies of experts; not in inserted blocks."""
        if not tensor.of_experts or (layer is not None and layer.kind == "identity"):
            return 0.0
        stack = tensor.expert is None
        made_of_ffn = self.growth.family is not None
        return self.growth.expert_reinit if stack or made_of_ffn or rank else 0.0

    def _dtype_of_new(self, tensor: Tensor, layer_source: LayerSource | None) -> str:
        if tensor.role in LAMBDA_ROLES:
            # lambda is the exponential of a dot product: 16 bits would move it visibly.
            return "F32"
        reference = self.source_family.tensor("input_norm" if layer_source else "final_norm")
        assert reference is not None
        layer = str(layer_source.source) if layer_source else ""
        return self.checkpoint.tensors[reference.name.replace("{layer}", layer)].dtype

    def _dims_of(self, tensor: Tensor, source: Tensor) -> tuple[DimMap | None, ...]:
        part = self._part(tensor)
        if (tensor.role, part) not in self._dims:
            self._dims[tensor.role, part] = self._find_dims(tensor, source, part)
        return self._dims[tensor.role, part]

    def _part(self, tensor: Tensor) -> int:
        """Which part of the FFN's units an expert has."""
        split = self.growth.split
        return tensor.expert % split.parts if split and tensor.expert is not None else 0

    def _find_dims(self, tensor: Tensor, source: Tensor, part: int) -> tuple[DimMap | None, ...]:
        if tensor.role in self.growth.verbatim:
            return (None,) * len(tensor.dims)
        own = self.growth.by_role.get(tensor.role)
        if (fused := self.growth.fused.get(tensor.role)) is not None:
            aliases = {axis: Alias(axis, {0: which}) for axis, which in fused[1].items()}
            own = {**self.growth.aliases, **aliases}, self.growth.axes
        pairs = zip(source.dims, tensor.dims, strict=True)
        dims = [self._map(*pair, own, part) for pair in pairs]
        if tensor.role in self.growth.shared_rows and dims[0] is not None:
            dims[0] = replace(dims[0], consumes=True)
        return tuple(dims)

    def _map(self, old: Dim, new: Dim, own: UnitMaps | None, part: int) -> DimMap | None:
        """The map of one dimension; all tensors without maps of their ``own`` share it, and the
        experts that have the same part of an FFN."""
        if own is None and (old, new, part) in self._maps:
            return self._maps[old, new, part]
        aliases, axes = own or (self.growth.aliases, self.growth.axes)
        units = new.layout(self.growth.sizes)
        if (split := self.growth.split) is not None and "ffn" in units.axes:
            routed = AxisMap(split.units(part), self.source_sizes["ffn"], partial=True)
            axes = {**axes, "ffn": routed}
        if "layer" in units.axes and self.growth.layers_moved:  # a part for each layer (Gemma 4)
            sources = np.array([layer.source for layer in self.growth.layers])
            axes = {**axes, "layer": AxisMap(sources, self.source_sizes["layer"], partial=True)}
        found = map_dim(
            old.layout(self.source_sizes),
            units,
            axes,
            new,
            self.growth.new_units,
            self.growth.key_factor,
            aliases,
            self.growth.perturbed,
        )
        if own is None:
            self._maps[old, new, part] = found
        return found

    def _lambda_change(
        self, layer: int | None, layer_source: LayerSource | None
    ) -> LambdaChange | None:
        before, after = self.source_family.lambda_init, self.family.lambda_init
        if layer is None or layer_source is None or before is None or after is None:
            return None
        change = LambdaChange(
            before(self.checkpoint.config, layer_source.source),
            after(self.config, layer),
            self.growth.noise_copies,
        )
        return None if change.is_identity else change

    def _factor(self, tensor: Tensor, change: LambdaChange | None, dtype: str) -> float:
        growth, role = self.growth, tensor.role
        factor = growth.factors.get(role, 1.0)
        if growth.split is not None and tensor.writes_residual:
            routed = tensor.of_experts
            if routed or role.startswith("shared_"):
                split = growth.split
                factor *= split.routed_factor if routed else split.shared_factor
                self.rounded |= frexp(factor)[0] != 0.5
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


def residual_scale(layers: int) -> float:
    """Factor on what writes the residual stream in a new layer of a model of so many layers.

    1 / sqrt(2 L), for two blocks a layer: together they then write about what one would (Radford et
    al. 2019, GPT-2, section 2.3; GPT-2's class in transformers starts its ``c_proj`` so).
    """
    return (2.0 * layers) ** -0.5


def _no_floats(source: str, dtype: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"Tensor {source!r} has dtype {dtype}, which growkit {why}.",
        "Convert the checkpoint to bfloat16, float16 or float32 first.",
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


class PlannedTensors(Sequence[TensorPlan]):
    """Every written tensor, in writing order.

    Attributes:
        groups: the same by kind, in the order of their first tensors.
    """

    def __init__(self, builder: PlanBuilder) -> None:
        self._builder = builder
        self.groups = tuple(builder.groups())

    def __len__(self) -> int:
        return sum(group.count for group in self.groups)

    def __iter__(self) -> Iterator[TensorPlan]:
        return self._builder.tensors()

    @overload
    def __getitem__(self, index: int) -> TensorPlan: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TensorPlan, ...]: ...
    def __getitem__(self, index: int | slice) -> TensorPlan | tuple[TensorPlan, ...]:
        if isinstance(index, slice):
            return tuple(self)[index]
        position = range(len(self))[index]
        return next(islice(self, position, None))
