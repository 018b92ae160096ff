"""The training recipe: what a YAML file may say, checked before anything else happens.

Relative paths are relative to the current folder, as for every command. No torch here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from growkit.data.recipe import DataSection
from growkit.recipe.section import Positive, Section
from growkit.training.recipe_stages import Position, Stage
from growkit.training.recipe_training import ParallelSection, TrainingSection

ROUTER_FIELDS = {"output_router_logits", "router_aux_loss_coef"}


class ModelSection(Section):
    """Either an existing checkpoint folder, or a configuration to start from scratch.

    Attributes:
        checkpoint: folder to continue from, grown or not.
        config: fields of a config.json, ``model_type`` among them, for random initial weights.
        dtype: of the weights while training; ``auto``: as stored. ``training.bf16`` is another
            thing: float32 weights, bfloat16 arithmetic.
        attn_implementation: ``eager``, ``sdpa``, ``flex_attention`` or ``flash_attention_2``;
            absent: as transformers chooses.
        trust_remote_code: run code that the checkpoint folder holds.
        trained_tokens: tokens that the checkpoint has seen, where no record of growkit says it; for
            advice alone.
        optimizer_state: ``auto`` uses the state beside the weights (grown with them, or that of
            Trainer, accelerate or a distributed checkpoint); ``reset`` begins anew.
    """

    checkpoint: Path | None = None
    config: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    trained_tokens: Positive | None = None
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
    """Where the tokenizer comes from; without this section, from the model's checkpoint.

    Attributes:
        path: folder with a tokenizer.
        train_bpe: train a byte-level BPE tokenizer of this vocabulary size on the training text.
        bytes: one token a byte.
    """

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
    """A whole training run.

    Attributes:
        model: what is trained.
        tokenizer: where the tokenizer comes from; absent: from the checkpoint.
        data: what is read.
        training: how it is optimized.
        parallel: how several processes share it.
        stages: growths during the run, oldest first.
        position: written by growkit into the recipes of stages; not to be given.
        out: folder of the run; ``--out`` says the same.
    """

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
        if self.tokenizer is not None and self.tokenizer.train_bpe and self.data.holds_tokens:
            raise ValueError(
                "'tokenizer.train_bpe' needs text, and 'data' names token files: give "
                "'tokenizer.path', the tokenizer that made them"
            )
        if self.tokenizer_folder is None and self.data.holds_conversations:
            raise ValueError(
                "'data.messages_field' needs a chat template, and a tokenizer that the run makes "
                "has none: give 'tokenizer.path'"
            )
        return self

    @model_validator(mode="after")
    def _what_adapters_are_of(self) -> Recipe:
        if self.training.lora is not None:
            if self.model.checkpoint is None:
                raise ValueError("'training.lora' needs a 'model.checkpoint' that it adapts")
            if self.stages:
                raise ValueError("'training.lora' and 'stages' do not go together: merge first")
            if self.parallel.sharded:
                raise ValueError(f"'training.lora' and {self._how_sharded} do not go together")
        return self

    @model_validator(mode="after")
    def _evaluations_to_go_by(self) -> Recipe:
        section = self.training
        named = {name for name in ("samples", "early_stopping", "eval_tasks")
                 if getattr(section, name) is not None}  # fmt: skip
        if named and self.data.eval_fraction == 0 and not self.data.holds_out_files:
            raise ValueError(
                f"'training.{min(named)}' comes with evaluations, and data.eval_fraction is 0: "
                "give data.eval_files, or hold out a part"
            )
        if section.early_stopping is not None and self.stages:
            raise ValueError("'training.early_stopping' ends a run, and 'stages' say when one ends")
        measured = named & {"samples", "eval_tasks"}
        if measured and self.parallel.sharded:
            raise ValueError(
                f"'training.{min(measured)}' needs the whole model in one process, which "
                f"{self._how_sharded} rules out: measure the finished folder by growkit eval"
            )
        return self

    @model_validator(mode="after")
    def _sequences_to_divide(self) -> Recipe:
        context, length = self.parallel.context, self.data.sequence_length
        if context == 1:
            return self
        if length % context:
            raise ValueError(
                f"'parallel.context' {context} does not divide data.sequence_length {length}: "
                "every process takes as many tokens of a sequence"
            )
        if self.parallel.tensor > 1:
            raise ValueError(
                "'parallel.context' and 'parallel.tensor' do not go together: both divide the "
                "heads of attention"
            )
        if self.training.torch_compile is True:
            raise ValueError(
                "'parallel.context' and 'training.torch_compile: true' do not go together: leave "
                "the latter out"
            )
        return self

    @property
    def _how_sharded(self) -> str:
        sharded = self.parallel.strategy == "fsdp"
        return f"parallel.{'strategy fsdp' if sharded else f'tensor {self.parallel.tensor}'}"

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder whose tokenizer the run takes; None: one is made from its text."""
        return self.model.checkpoint if self.tokenizer is None else self.tokenizer.path

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step, of all processes: batch size times accumulation."""
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps

    def shares(self, processes: int) -> tuple[int, int]:
        """(batch size, accumulation steps) of one process, so that all read the step together.

        The batch is the largest that is at most the recipe's and divides the share evenly.
        """
        share = self.sequences_per_step // processes
        largest = min(self.training.per_device_train_batch_size, share)
        batch = next(size for size in range(largest, 0, -1) if share % size == 0)
        return batch, share // batch

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
