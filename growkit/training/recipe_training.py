"""The ``training`` section of a recipe: optimizer, schedule, what is trained, what is saved.

No torch here. docs/training.md says which to choose when.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from growkit.recipe.section import Fraction, Positive, Section, Steps

Multiplier = Annotated[float, Field(gt=0)]


class NewThenAll(Section):
    """``train: {new_then_all: 500}``: the new slots alone for so many steps, then everything."""

    new_then_all: Annotated[float, Field(gt=0)]


class TrainingSection(Section):
    """The optimization, in the names that transformers' TrainingArguments use.

    *New* are the parameters, and the rows and columns of parameters, that the new-parameter map of
    the checkpoint's growkit.json lists; all others are *old*.
    """

    max_steps: Positive | None = None
    max_tokens: Positive | None = None

    train: Literal["new", "all"] | NewThenAll = "all"
    new_learning_rate_multiplier: Multiplier = 1.0
    old_learning_rate_multiplier: Multiplier = 1.0
    lambda_learning_rate_multiplier: Multiplier = 1.0
    new_warmup_steps: Steps = 0
    old_warmup_steps: Steps = 0

    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    schedule: Literal["cosine", "wsd", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: Steps = 0
    decay_steps: Steps = 0.2
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    restarts: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)
    restart_warmup_steps: Steps = 0
    min_learning_rate_ratio: Fraction = 0.0

    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = True
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    muon_learning_rate_multiplier: Multiplier = 1.0
    muon_momentum: Fraction = 0.95
    muon_adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    # Coefficient of the loss that balances experts; 0: off. Absent: as config.json says, which is
    # off in what growkit writes. See growkit.training.router_loss.
    router_aux_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    per_device_train_batch_size: Positive = 8
    per_device_eval_batch_size: Positive | None = None
    gradient_accumulation_steps: Positive = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    use_cpu: bool = False
    full_determinism: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    logging_steps: Positive = 10
    eval_steps: Positive = 100
    # 0: never; by default as often as evaluations. See growkit.training.growth.probes.
    probe_steps: Annotated[int, Field(ge=0)] | None = None
    save_steps: Positive = 100
    save_total_limit: Positive | None = 2
    save_dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    average_checkpoints: Positive = 1
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    report_to: list[str] = Field(default_factory=list)

    @field_validator("train", mode="before")
    @classmethod
    def _three_choices(cls, value: Any) -> Any:
        steps = value.get("new_then_all") if isinstance(value, dict) and len(value) == 1 else None
        number = isinstance(steps, int | float) and not isinstance(steps, bool) and steps > 0
        if value in ("new", "all") or number or isinstance(value, NewThenAll):
            return value
        raise ValueError(
            f"it is {value!r}; say new, all, or {{new_then_all: STEPS}} with STEPS > 0"
        )

    @model_validator(mode="after")
    def _one_budget(self) -> TrainingSection:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give exactly one of 'max_steps' and 'max_tokens'")
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> TrainingSection:
        if self.restarts and self.schedule != "wsd":
            raise ValueError(f"'restarts' belongs to schedule wsd, and schedule is {self.schedule}")
        if self.train == "new":
            for name in ("old_learning_rate_multiplier", "old_warmup_steps"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"'{name}' has no effect where 'train: new' freezes the old")
        if self.old_warmup_steps and self.train == "all":
            raise ValueError(
                "'old_warmup_steps' follows the thaw of 'train: {new_then_all: STEPS}'; a warm-up "
                "of everything is 'warmup_steps'"
            )
        return self

    @property
    def probe_interval(self) -> int:
        """Steps between probes; 0 for none."""
        return self.eval_steps if self.probe_steps is None else self.probe_steps

    @property
    def checkpoints_kept(self) -> int | None:
        """How many checkpoints stay on the disk, those to be averaged at least; None: all."""
        limit = self.save_total_limit
        return None if limit is None else max(limit, self.average_checkpoints)

    @property
    def uses_new_parameter_map(self) -> bool:
        """Some choice treats new and old slots differently."""
        names = (
            "train",
            "new_learning_rate_multiplier",
            "old_learning_rate_multiplier",
            "new_warmup_steps",
        )
        fields = type(self).model_fields
        return any(getattr(self, name) != fields[name].default for name in names)


class ParallelSection(Section):
    """How several processes train one model; the launcher says how many there are.

    The number of processes never changes what a recipe computes: the sequences of a step
    (``per_device_train_batch_size`` x ``gradient_accumulation_steps``) are shared among them.
    """

    # ddp: every process holds the model. fsdp: every process holds a part of it (FSDP2).
    strategy: Literal["ddp", "fsdp"] = "ddp"
    # When given, a launch with any other number of processes is refused.
    processes: Positive | None = None
    # fsdp with bf16: what travels between processes. bfloat16 halves the traffic; every parameter,
    # lambda vectors too, is then rounded where it is used (not where it is stored).
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    # A process that waits longer for another one ends the run.
    timeout_minutes: Annotated[float, Field(gt=0)] = 30
