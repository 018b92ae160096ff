"""The training recipe: what a YAML file may say, checked before anything else happens.

Relative paths are relative to the current folder, as for every command. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from growkit.core.files import read_text
from growkit.core.yaml_files import (
    MAX_YAML_BYTES,
    RECIPE_REMEDY,
    IncrementLoader,
    parse_yaml,
)
from growkit.errors import UsageError
from growkit.training.recipe_checks import check_averaging, check_schedule, check_thaw
from growkit.training.recipe_data import DataSection
from growkit.training.recipe_errors import validated
from growkit.training.recipe_parallel import ParallelSection
from growkit.training.recipe_section import Positive, Section
from growkit.training.recipe_stages import Position, Stage, check_stages
from growkit.training.recipe_training import TrainingSection

ROUTER_FIELDS = {"output_router_logits", "router_aux_loss_coef"}


class ModelSection(Section):
    """Either an existing checkpoint folder, or a configuration to start from scratch."""

    checkpoint: Path | None = None
    config: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    # That the checkpoint has seen; only where no record of growkit's says it.
    trained_tokens: Positive | None = None
    # State that was grown with the checkpoint: used where it is there, or left.
    optimizer_state: Literal["auto", "reset"] = "auto"

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if self.checkpoint is not None and self.config and self.config.keys() <= ROUTER_FIELDS:
            raise ValueError(
                f"'config' ({', '.join(self.config)}) is for models from scratch; the auxiliary "
                "loss of a checkpoint with experts is switched on by training.router_aux_loss, "
                "for example 0.01"
            )
        if (self.checkpoint is None) == (self.config is None):
            raise ValueError("give exactly one of 'checkpoint' (a folder) and 'config' (a mapping)")
        if self.config is not None and self.trained_tokens is not None:
            raise ValueError("'trained_tokens' are those of a 'checkpoint'")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("'config' needs a model_type, for example gda or llama")
        return self


class TokenizerSection(Section):
    """Where the tokenizer comes from; without this section, from the model's checkpoint."""

    path: Path | None = None
    train_bpe: Annotated[int, Field(ge=257)] | None = None
    bytes: bool = False

    @model_validator(mode="after")
    def _at_most_one(self) -> TokenizerSection:
        if (self.path is not None) + (self.train_bpe is not None) + self.bytes != 1:
            raise ValueError(
                "give exactly one of 'path' (a folder), 'train_bpe' (a vocabulary size of at "
                "least 257) and 'bytes: true'"
            )
        return self


class Recipe(Section):
    """A whole training run."""

    model: ModelSection
    tokenizer: TokenizerSection | None = None
    data: DataSection
    training: TrainingSection
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    stages: list[Stage] = Field(default_factory=list)
    position: Position | None = None
    out: Path | None = None

    @model_validator(mode="after")
    def _tokenizer_known(self) -> Recipe:
        if self.tokenizer is None and self.model.checkpoint is None:
            raise ValueError("a model from scratch needs a 'tokenizer' section")
        return self

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step, of all processes: batch size times accumulation."""
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens read in one optimizer step."""
        return self.sequences_per_step * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; a token budget is rounded up to whole steps."""
        if self.training.max_steps is not None:
            return self.training.max_steps
        assert self.training.max_tokens is not None
        return math.ceil(self.training.max_tokens / self.tokens_per_step)

    @property
    def first_step(self) -> int:
        """Steps of the whole run before this one: those of earlier stages."""
        return self.position.first_step if self.position is not None else 0

    @property
    def end_step(self) -> int:
        """The step of the whole run at which this one ends: that of the next growth, or the end."""
        return self.position.end_step if self.position is not None else self.total_steps

    def steps(self, value: float) -> int:
        """A number of steps that may have been given as a fraction of all steps."""
        return round(value * self.total_steps) if value < 1 else round(value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the YAML file would hold them."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)


def make_recipe(values: Any, source: str = "recipe", text: str = "") -> Recipe:
    """Check a mapping; ``text`` is the YAML it came from, for line numbers in errors.

    Raises:
        UsageError: naming the key, its line, and the nearest valid key of an unknown one.
    """
    recipe = validated(Recipe, values, source, text)
    check_schedule(recipe, source)
    check_thaw(recipe, source)
    check_averaging(recipe, source)
    check_stages(recipe, source)
    return recipe


def load_recipe(path: Path, overrides: Sequence[str] = (), max_steps: int | None = None) -> Recipe:
    """Read a YAML recipe and apply ``key.path=value`` overrides (values are YAML).

    Raises:
        UsageError: the file cannot be read, is not YAML, or says something that no recipe can.
    """
    values, text = read_values(path, overrides)
    if max_steps is not None and isinstance(values, dict):
        training = values.setdefault("training", {})
        if isinstance(training, dict):
            training.pop("max_tokens", None)
            training["max_steps"] = max_steps
    return make_recipe(values, str(path), text)


def read_values(path: Path, overrides: Sequence[str]) -> tuple[Any, str]:
    """The content of a YAML file with ``key.path=value`` overrides applied, and its text.

    Raises:
        UsageError: the file cannot be read or is not YAML, or an override cannot be applied.
    """
    text = read_text(path, limit=MAX_YAML_BYTES, error=UsageError, remedy=RECIPE_REMEDY)
    values = parse_yaml(text, str(path), IncrementLoader)
    for override in overrides:
        _apply(values, override)
    return values, text


def _apply(values: Any, override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UsageError(
            f"--set {override!r} is not of the form key.path=value.",
            "For example --set training.learning_rate=1e-3.",
        )
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(values, dict) and values.get(parent) is None:
            values[parent] = {}
        values = values[parent] if isinstance(values, dict) else None
    if not isinstance(values, dict):
        raise UsageError(
            f"--set {override!r} goes into a value that is not a mapping.",
            "Its dots name nested sections, as in training.learning_rate.",
        )
    values[last] = parse_yaml(value, f"The value of --set {override!r}")
