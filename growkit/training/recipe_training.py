"""The ``training`` section of a recipe: optimizer, schedule, what is trained, what is saved.

No torch here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from growkit.training.recipe_section import Fraction, Positive, Section, Steps


class TrainingSection(Section):
    """The optimization, in the names that transformers' TrainingArguments use."""

    max_steps: Positive | None = None
    max_tokens: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Steps = 0
    decay_steps: Steps = 0.2
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    min_learning_rate_ratio: Fraction = 0.0
    per_device_train_batch_size: Positive = 8
    per_device_eval_batch_size: Positive | None = None
    gradient_accumulation_steps: Positive = 1
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = True
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    use_cpu: bool = False
    full_determinism: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    logging_steps: Positive = 10
    eval_steps: Positive = 100
    save_steps: Positive = 100
    save_total_limit: Positive | None = 2
    report_to: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_budget(self) -> TrainingSection:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give exactly one of 'max_steps' and 'max_tokens'")
        return self
