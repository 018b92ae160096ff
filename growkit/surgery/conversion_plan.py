"""The plan of a conversion: the same list of written tensors, from a family to another."""

from __future__ import annotations

from dataclasses import replace

from growkit.checkpoint import Checkpoint, OutputTensor
from growkit.core.errors import CheckpointError, GrowkitError
from growkit.families import Tensor, family_of
from growkit.families.differential import LAMBDA_ROLES
from growkit.families.layout import Sizes
from growkit.surgery.axis_map import NEW, AxisMap
from growkit.surgery.compose import ComposedGrowth
from growkit.surgery.conversion import Alias, Conversion, Converted, UnitMaps
from growkit.surgery.dim_map import DimMap
from growkit.surgery.effect import Exactness, Growth, LayerSource, ModelShape
from growkit.surgery.lambdas import LambdaChange
from growkit.surgery.plan import Plan, plan_of, read_source
from growkit.surgery.symmetry import Symmetry
from growkit.surgery.tensor_plans import FLOATS, PlanBuilder, TensorPlan


class ConversionBuilder(PlanBuilder):
    """A plan builder that knows aliases, factors and calculated tensors of a conversion."""

    @property
    def conversion(self) -> Converted:
        assert self.growth.conversion is not None
        return self.growth.conversion

    def _plan(self, tensor: Tensor, layer: int | None, name: str) -> TensorPlan:
        if tensor.role in self.conversion.computed:
            return self._computed(tensor, layer, name)
        plan = super()._plan(tensor, layer, name)
        if plan.source is not None:
            return plan
        if tensor.role in LAMBDA_ROLES:
            # lambda is the exponential of a dot product: 16 bits would move it visibly.
            plan = replace(plan, output=replace(plan.output, dtype="F32"))
        return replace(plan, init=self.conversion.starts.get(tensor.role, plan.init))

    def _computed(self, tensor: Tensor, layer: int | None, name: str) -> TensorPlan:
        computed = self.conversion.computed[tensor.role]
        shape = tensor.shape(self.growth.sizes)
        layer_source = self.growth.stacks[tensor.stack][layer] if layer is not None else None
        first = self.source_family.tensor(computed.reads[0])
        assert first is not None
        number = str(layer_source.source) if layer_source else ""
        source = first.name.replace("{layer}", number)
        dtype = self.checkpoint.tensors[source].dtype
        if dtype not in FLOATS:
            raise CheckpointError(
                f"Tensor {source!r} has dtype {dtype}, which growkit cannot calculate with.",
                "Convert the checkpoint to bfloat16, float16 or float32 first.",
            )
        return TensorPlan(
            OutputTensor(name, dtype, shape),
            tensor.role,
            source,
            (None,) * len(shape),
            "computed",
            layer=layer,
            layer_source=layer_source,
            computed=computed,
        )

    def _lambda_change(
        self, layer: int | None, layer_source: LayerSource | None
    ) -> LambdaChange | None:
        if self.source_family.lambda_init is None:
            return None
        return super()._lambda_change(layer, layer_source)

    def _dims_of(self, tensor: Tensor, source: Tensor) -> tuple[DimMap | None, ...]:
        if tensor.role in self.conversion.verbatim:
            return (None,) * len(tensor.dims)
        dims = super()._dims_of(tensor, source)
        rows = dims[0]
        if tensor.role in self.conversion.shared_rows and rows is not None:
            return (replace(rows, consumes=True), *dims[1:])
        return dims

    def _unit_maps(self, tensor: Tensor) -> UnitMaps:
        usual = (self.conversion.aliases, self.conversion.axes)
        return self.conversion.by_role.get(tensor.role, usual)

    def _factor(self, tensor: Tensor, change: LambdaChange | None, dtype: str) -> float:
        factor = self.conversion.factors.get(tensor.role, 1.0)
        return factor * super()._factor(tensor, change, dtype)


def build_conversion_plan(
    checkpoint: Checkpoint, conversion: Conversion, *, symmetry: Symmetry | None = None
) -> Plan:
    """Decide what every tensor of the converted checkpoint is made of.

    Args:
        checkpoint: opened source; only headers and config are read.
        conversion: to what.
        symmetry: how copies of a unit share its weight, and the seed of new weights.

    Raises:
        UsageError: the model cannot be converted that way.
        CheckpointError: tensors that the family does not declare, or with wrong shapes.
    """
    symmetry = symmetry or Symmetry()
    source_family, source_sizes = read_source(checkpoint)
    shape = ModelShape(source_family, source_sizes, checkpoint.config)
    converted = conversion.apply(shape)
    family = family_of(converted.config)
    sizes = family.sizes(converted.config)
    if family.ties_by_values:
        sizes["tied"] = source_sizes["tied"]  # what the source stores decides, not its config
    axes = dict(converted.axes)
    if converted.exactness is not Exactness.NOT_EXACT:
        check_converted_links(shape, sizes, converted)
    step = Growth(
        operator="convert",
        summary=converted.summary,
        exactness=converted.exactness,
        reason=converted.reason,
        warnings=converted.warnings,
    )
    growth = ComposedGrowth(
        steps=(step,),
        sizes=sizes,
        axes=axes,
        stacks={
            stack.axis: tuple(LayerSource(i, "kept") for i in range(sizes[stack.axis]))
            for stack in family.stacks
        },
        new_units={},
        noise_copies=1,
        final_norm_factor=1.0,
        embedding_factor=1.0,
        norm_factor=1.0,
        stream_factor=1.0,
        key_factor=1.0,
        config={},
        exactness=converted.exactness,
        family=family.name,
        conversion=converted,
    )
    builder = ConversionBuilder(
        checkpoint, source_family, family, source_sizes, growth, converted.config
    )
    return plan_of(builder, symmetry)


def check_converted_links(shape: ModelShape, sizes: Sizes, converted: Converted) -> None:
    """Every written head has to read a copy of what its source reads (the proof on paper)."""
    family = family_of(converted.config)
    known = {(link.source, link.target): link for link in shape.family.links}
    for link in family.links:
        heads, read = (
            _in_source(axis, shape, sizes, converted) for axis in (link.source, link.target)
        )
        before = known.get((heads[0], read[0]))
        if before is None:
            continue
        copied = heads[1].source != NEW
        expected = before.indices(shape.sizes)[heads[1].source[copied]]
        found = read[1].source[link.indices(sizes)[copied]]
        if expected.shape != found.shape or (expected != found).any():
            raise GrowkitError(
                f"The conversion would move {link.source.replace('_', ' ')}s to other "
                f"{link.target.replace('_', ' ')}s.",
                "Please report this: it is a defect of the conversion.",
            )


def _in_source(
    axis: str, shape: ModelShape, sizes: Sizes, converted: Converted
) -> tuple[str, AxisMap]:
    """(axis of the source, map from it) of a written axis."""
    name = converted.aliases.get(axis, Alias(axis)).axis
    return name, converted.axes.get(axis) or AxisMap.identity(sizes[axis])
