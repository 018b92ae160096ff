"""The plan: what every tensor of the larger model is made of. Data, no tensor read, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from growkit.checkpoint import DTYPES, Checkpoint, OutputTensor
from growkit.errors import CheckpointError, UsageError
from growkit.families import FAMILIES, Family, Tensor, family_of
from growkit.families.differential import LAMBDA_ROLES
from growkit.families.layout import Units
from growkit.surgery.compose import ComposedGrowth, compose
from growkit.surgery.config import grown_config
from growkit.surgery.dim_map import DimMap, map_dim
from growkit.surgery.growth import Exactness, LayerSource, ModelShape, Operator
from growkit.surgery.lambdas import LambdaChange
from growkit.surgery.symmetry import Symmetry

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class TensorPlan:
    """How one written tensor comes about.

    Attributes:
        output: name, dtype and shape.
        role: its role in the family table.
        source: name of the tensor it is made of; None when it is new.
        dims: map of each dimension, None where it is unchanged.
        action: ``copied`` (same bytes), ``grown``, ``rescaled``, ``zero`` or ``new``.
        factor: every entry is multiplied by this, after sharing.
        init: how entries without a source start (``normal``, ``ones``, ``zeros``).
        lambda_change: what happens to the lambda vector, if this is one.
        layer: index of the written layer, if it belongs to one.
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


@dataclass(frozen=True)
class Plan:
    """Everything that will be written, decided before a byte is.

    Attributes:
        checkpoint: the opened source.
        source_family, family: format read and format written (they differ when the source's own
            format cannot hold the grown model).
        source_sizes, growth: axis sizes before, and the composed growth.
        config: content of the written config.json, without the growkit block.
        tensors: every written tensor, in writing order.
        symmetry: how copies share weights.
        exactness: of the whole plan.
        warnings: what a user should know.
    """

    checkpoint: Checkpoint
    source_family: Family
    family: Family
    source_sizes: Mapping[str, int]
    growth: ComposedGrowth
    config: dict[str, Any]
    tensors: tuple[TensorPlan, ...]
    symmetry: Symmetry
    exactness: Exactness
    warnings: tuple[str, ...] = field(default=())

    @property
    def sizes(self) -> Mapping[str, int]:
        """Axis sizes of the grown model."""
        return self.growth.sizes

    @property
    def converted(self) -> bool:
        """The grown model is written in another format than the source's."""
        return self.family.name != self.source_family.name

    @property
    def total_bytes(self) -> int:
        """Bytes of all written tensors."""
        return sum(
            DTYPES[t.output.dtype].bits * int(np.prod(t.output.shape, dtype=object)) // 8
            for t in self.tensors
        )


def build_plan(
    checkpoint: Checkpoint,
    operators: Sequence[Operator],
    *,
    symmetry: Symmetry | None = None,
    target: str | None = None,
) -> Plan:
    """Decide what every tensor of the grown checkpoint is made of.

    Args:
        checkpoint: opened source; only headers, config and lambda vectors are read.
        operators: applied in order, as one composed growth.
        symmetry: how copies of a unit share its weight (default: split).
        target: name of the family to write; by default the source's own, or ``gda`` where that
            cannot hold the grown model.

    Raises:
        UsageError: unknown family, impossible size, or a model that transformers would refuse.
        CheckpointError: tensors that the family does not declare, or with wrong shapes.
    """
    symmetry = symmetry or Symmetry()
    source_family = family_of(checkpoint.config)
    source_sizes = source_family.sizes(checkpoint.config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    source_family.check_tensors(shapes, source_sizes)
    shape = ModelShape(source_family, source_sizes, checkpoint.config)
    growth = compose(operators, shape)
    family = _choose_family(source_family, growth, checkpoint.config, target)
    if family is not source_family:
        growth.sizes["sub_layer_norm"] = 1
    config = grown_config(checkpoint.config, source_family, family, source_sizes, growth)
    builder = _Builder(checkpoint, source_family, family, source_sizes, growth, config)
    tensors = builder.tensors()
    exactness = growth.exactness
    if builder.rounded or (symmetry.mode != "split" and _rounds(symmetry, growth)):
        exactness = exactness.worst(Exactness.ROUNDED)
    return Plan(
        checkpoint=checkpoint,
        source_family=source_family,
        family=family,
        source_sizes=source_sizes,
        growth=growth,
        config=config,
        tensors=tensors,
        symmetry=symmetry,
        exactness=exactness,
        warnings=_warnings(symmetry, growth, source_family, family),
    )


def _choose_family(
    source: Family, growth: ComposedGrowth, config: Mapping[str, Any], target: str | None
) -> Family:
    if target is not None:
        family = FAMILIES.get(target)
        convertible = ("gda", source.name) if source.differential else (source.name,)
        if family is None or target not in convertible:
            raise UsageError(
                f"--format {target!r} cannot hold a {source.name} checkpoint.",
                f"Valid values: {', '.join(dict.fromkeys(convertible))}.",
            )
        if family is source:
            _check_refusal(family, growth, config)
        return family
    if source.differential and source.refusal(config, growth.sizes):
        return FAMILIES["gda"]
    _check_refusal(source, growth, config)
    return source


def _check_refusal(family: Family, growth: ComposedGrowth, config: Mapping[str, Any]) -> None:
    refusal = family.refusal(config, growth.sizes)
    if refusal:
        raise UsageError(
            f"transformers would not load the grown model: {refusal}.",
            "Choose another size"
            + (", or --format gda." if family.differential else " or grow another axis too."),
        )


def _rounds(symmetry: Symmetry, growth: ComposedGrowth) -> bool:
    if symmetry.mode == "noise":
        return any((m.multiplicity > 1).any() for m in growth.axes.values())
    return any(((c := m.multiplicity) & (c - 1)).any() for m in growth.axes.values())


def _warnings(
    symmetry: Symmetry, growth: ComposedGrowth, source: Family, family: Family
) -> tuple[str, ...]:
    warnings = [warning for step in growth.steps for warning in step.warnings]
    if family is not source:
        warnings.append(
            f"the {source.name} format cannot hold this model; it is written as {family.name}"
        )
    copied = any((m.multiplicity > 1).any() for m in growth.axes.values())
    if symmetry.mode == "even" and copied:
        warnings.append(
            "even shares keep copies equal for ever (equal gradients): growth that is never used"
        )
    return tuple(warnings)


class _Builder:
    """Makes the list of written tensors; maps are computed once a role, not once a layer."""

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
        self._dims: dict[str, tuple[DimMap | None, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._units: dict[tuple[str, int, bool], Units] = {}

    def tensors(self) -> tuple[TensorPlan, ...]:
        names = list(self.family.names(self.growth.sizes))
        return tuple(self._plan(tensor, layer, name) for tensor, layer, name in names)

    def _plan(self, tensor: Tensor, layer: int | None, name: str) -> TensorPlan:
        source_tensor = self._source_tensor(tensor)
        layer_source = self.growth.layers[layer] if layer is not None else None
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
            )
        source = source_tensor.name
        if layer_source is not None:
            source = source.replace("{layer}", str(layer_source.source))
        dtype = self.checkpoint.tensors[source].dtype
        dims = self._dims_of(tensor, source_tensor)
        if layer_source is not None and layer_source.kind == "identity" and tensor.writes_residual:
            output = OutputTensor(name, dtype, shape)
            return TensorPlan(output, tensor.role, source, dims, "zero", layer=layer)
        change = self._lambda_change(layer, layer_source)
        factor = self._factor(tensor.role, change)
        lambda_change = change if change and tensor.role in LAMBDA_ROLES else None
        if lambda_change is not None:
            dtype = "F32"
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
        )

    def _source_tensor(self, tensor: Tensor) -> Tensor | None:
        found = self.source_family.tensor(tensor.role)
        if found is not None and found.when(self.source_sizes):
            return found
        if tensor.role == "lm_head":
            return self.source_family.tensor("embed")
        return None

    def _dtype_of_new(self, layer_source: LayerSource | None) -> str:
        reference = self.source_family.tensor("input_norm" if layer_source else "final_norm")
        assert reference is not None
        layer = str(layer_source.source) if layer_source else ""
        return self.checkpoint.tensors[reference.name.replace("{layer}", layer)].dtype

    def _dims_of(self, tensor: Tensor, source: Tensor) -> tuple[DimMap | None, ...]:
        if tensor.role not in self._dims:
            self._dims[tensor.role] = tuple(
                map_dim(
                    old.layout(self.source_sizes),
                    new.layout(self.growth.sizes),
                    self.growth.axes,
                    new.consumes,
                )
                for old, new in zip(source.dims, tensor.dims, strict=True)
            )
        return self._dims[tensor.role]

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

    def _factor(self, role: str, change: LambdaChange | None) -> float:
        if role == "final_norm":
            return self.growth.final_norm_factor
        if change is not None and role == self.family.lambda_scale_role:
            if change.scale_factor != 1.0:
                self.rounded = True
            return change.scale_factor
        return 1.0
