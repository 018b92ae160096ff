"""What every section of a recipe is made of."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# A whole number of steps, or a fraction of all steps when it is below 1 (as transformers 5 does).
Steps = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A mapping whose unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """``true`` and ``on`` would be read as 1, and ``false`` as 0."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise PydanticCustomError("switch", "Give a number; this is no switch")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that a field's type names, at any depth."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation} & {bool, int, float}
