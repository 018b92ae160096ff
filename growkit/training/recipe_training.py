"""The ``training`` section of a recipe: optimizer, schedule, what is trained, what is saved.

No torch here. docs/training.md says which to choose when.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from growkit.recipe.section import Fraction, Positive, Section, Steps

Multiplier = Annotated[float, Field(gt=0)]


class NewThenAll(Section):
    """``train: {new_then_all: 500}``: the new slots alone for so many steps, then everything.

    Attributes:
        new_then_all: steps (below 1: a fraction of all steps) before the old slots thaw.
    """

    new_then_all: Annotated[float, Field(gt=0)]


class LoraSection(Section):
    """Adapters of low rank on the old weights, by peft (``pip install 'growkit[lora]'``).

    Attributes:
        r: rank of an adapter.
        alpha: an adapter's product is scaled by this over ``r``; absent: twice ``r``.
        dropout: of an adapter's input.
        target_modules: names of linear layers, ``q_proj`` say; absent: all but the output
            projection.
    """

    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Fraction = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None


class SamplesSection(Section):
    """Texts that the model writes at every evaluation, greedily.

    Attributes:
        prompts: what they begin with, the same ones at every evaluation.
        max_new_tokens: the longest continuation.
    """

    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    max_new_tokens: Positive = 64


class EarlyStoppingSection(Section):
    """End the run when the held-out loss does not fall (transformers' EarlyStoppingCallback).

    Attributes:
        patience: after so many evaluations without a lower loss.
        threshold: a loss counts as lower when it is lower by more than this, in nats per token.
    """

    patience: Positive
    threshold: Annotated[float, Field(ge=0)] = 0.0


class EvalTasksSection(Section):
    """Tasks of lm-evaluation-harness at evaluations (``pip install 'growkit[eval]'``).

    Attributes:
        tasks: their names.
        every: at every so many evaluations.
        limit: examples a task; absent: all.
        fewshot: examples in the prompt; absent: as the task says.
        include_path: folder with tasks of one's own, as YAML files.
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    every: Positive = 1
    limit: Positive | None = None
    fewshot: Annotated[int, Field(ge=0)] | None = None
    include_path: Path | None = None


class TrainingSection(Section):
    """The optimization, in the names that transformers' TrainingArguments use.

    *New* are the parameters, and the rows and columns of parameters, that the new-parameter map of
    the checkpoint's growkit.json lists; all others are *old*. Steps are whole numbers, or fractions
    of all steps when they are below 1.

    Attributes:
        max_steps: optimizer steps of the whole run; this or ``max_tokens``.
        max_tokens: tokens of the whole run, rounded up to whole steps.
        train: ``all``, ``new`` (old slots keep their bytes) or ``{new_then_all: STEPS}``.
        lora: adapters on the old weights, which stand still; new slots train fully.
        new_learning_rate_multiplier: of the rate of new slots.
        old_learning_rate_multiplier: of the rate of old slots.
        lambda_learning_rate_multiplier: of everything that makes lambda, besides the other two.
        new_warmup_steps: the new slots rise over so many steps from the start, as a factor.
        old_warmup_steps: the old slots rise over so many steps from their thaw.
        learning_rate: the peak of the schedule.
        rate_rule: ``mup`` and ``completep`` give every tensor the rate (and, from scratch, the
            start) that its size asks for, relative to a base model; ``standard``: one rate.
        rate_base: config fields of the model at which ``learning_rate`` is right, ``{hidden_size:
            128}`` say; absent: the model that the stages start from, or the parent of a growth.
        schedule: ``cosine``, ``wsd`` (warm-up, stable, decay), ``inverse_sqrt`` or ``constant``.
        warmup_steps: linear warm-up from 0 at the start.
        decay_steps: length of the decay of ``wsd``.
        decay_type: shape of the decay of ``wsd``.
        restarts: steps at which a decay of ``wsd`` ends and the rate rises to the peak again.
        restart_warmup_steps: length of that rise.
        min_learning_rate_ratio: where ``cosine`` and ``wsd`` end, as a part of the peak.
        optimizer: ``adamw``, or ``muon`` for hidden matrices with AdamW for everything else.
        weight_decay: decoupled, of matrices only; biases, norms and lambda have none.
        decay_embeddings: whether embeddings decay too (a tied output projection is one).
        adam_beta1: decay of AdamW's first moment.
        adam_beta2: decay of AdamW's second moment.
        adam_epsilon: added to the root of AdamW's second moment.
        muon_learning_rate_multiplier: of the rate of the matrices that Muon updates.
        muon_momentum: of Muon.
        muon_adjust: ``match_rms_adamw`` lets Muon use AdamW's rate and decay; ``original`` is the
            scale of Muon's author.
        max_grad_norm: gradients are clipped to this norm; 0: not at all.
        router_aux_loss: coefficient of the loss that balances experts, 0: off; absent: as
            config.json says, which is off in what growkit writes.
        per_device_train_batch_size: sequences of one forward pass. Times
            ``gradient_accumulation_steps`` it is one optimizer step, over all processes together.
        per_device_eval_batch_size: sequences of one evaluating pass; absent: as in training.
        gradient_accumulation_steps: forward passes of one optimizer step, over all processes.
        bf16: compute in bfloat16, with float32 weights and moments.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping
            them (activation checkpointing): less memory, a third more FLOPs.
        torch_compile: compile the model by torch; ``auto``: where the first steps of a long run
            show that it pays (:mod:`growkit.training.compiling`).
        use_cpu: train on the CPU although there is a GPU.
        full_determinism: ask torch for deterministic kernels (slower).
        seed: random seed of initial weights, sample order and dropout.
        logging_steps: steps between log lines (``metrics.jsonl``, trackers).
        eval_steps: steps between evaluations on the held-out text.
        probe_steps: steps between probes of the grown parts, 0: never; absent: as ``eval_steps``.
        save_steps: steps between checkpoints.
        save_total_limit: checkpoints kept, the newest; ``null``: all.
        save_dtype: dtype of the final folder; ``source``: every tensor as in the source.
        average_checkpoints: the final folder is the mean of so many last checkpoints; 1: the last.
        dataloader_num_workers: processes that read batches ahead.
        report_to: experiment trackers of transformers, ``[tensorboard]`` or ``[wandb]`` say.
        samples: texts that the model writes at every evaluation.
        early_stopping: end the run when the held-out loss does not fall any more.
        eval_tasks: tasks of lm-evaluation-harness at evaluations.
        callbacks: TrainerCallbacks by import path, ``module:Class`` or ``{module:Class: {argument:
            value}}``.
        peak_flops_per_second: of one device, for MFU; absent: of its data sheet, where that is
            known (A100, H100, H200, B200, L40S, L4, A10, V100).
    """

    max_steps: Positive | None = None
    max_tokens: Positive | None = None

    train: Literal["new", "all"] | NewThenAll = "all"
    lora: LoraSection | None = None
    new_learning_rate_multiplier: Multiplier = 1.0
    old_learning_rate_multiplier: Multiplier = 1.0
    lambda_learning_rate_multiplier: Multiplier = 1.0
    new_warmup_steps: Steps = 0
    old_warmup_steps: Steps = 0

    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    rate_rule: Literal["standard", "mup", "completep"] = "standard"
    rate_base: dict[str, Any] | None = None
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
    router_aux_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    per_device_train_batch_size: Positive = 8
    per_device_eval_batch_size: Positive | None = None
    gradient_accumulation_steps: Positive = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool | Literal["auto"] = "auto"
    use_cpu: bool = False
    full_determinism: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    logging_steps: Positive = 10
    eval_steps: Positive = 100
    probe_steps: Annotated[int, Field(ge=0)] | None = None
    save_steps: Positive = 100
    save_total_limit: Positive | None = 2
    save_dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    average_checkpoints: Positive = 1
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    report_to: list[str] = Field(default_factory=list)
    samples: SamplesSection | None = None
    early_stopping: EarlyStoppingSection | None = None
    eval_tasks: EvalTasksSection | None = None
    callbacks: list[str | dict[str, dict[str, Any] | None]] | None = None
    peak_flops_per_second: Annotated[float, Field(gt=0)] | None = None

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

    @field_validator("callbacks")
    @classmethod
    def _import_paths(cls, entries: list[Any] | None) -> list[Any] | None:
        for entry in entries or []:
            path = entry if isinstance(entry, str) else next(iter(entry), "")
            module, colon, name = path.partition(":")
            if not (module and colon and name) or (isinstance(entry, dict) and len(entry) != 1):
                raise ValueError(
                    f"it has {entry!r}; say module:Class, or {{module:Class: {{argument: value}}}}"
                )
        return entries

    @model_validator(mode="after")
    def _one_budget(self) -> TrainingSection:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give exactly one of 'max_steps' and 'max_tokens'")
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> TrainingSection:
        if self.rate_base is not None and self.rate_rule == "standard":
            raise ValueError("'rate_base' has no effect with rate_rule standard")
        if self.restarts and self.schedule != "wsd":
            raise ValueError(f"'restarts' belongs to schedule wsd, and schedule is {self.schedule}")
        if self.train == "new":
            for name in ("old_learning_rate_multiplier", "old_warmup_steps"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"'{name}' has no effect where 'train: new' freezes the old")
        if self.lora is not None:
            for name in ("train", "old_learning_rate_multiplier", "old_warmup_steps", "rate_rule",
                         "optimizer", "average_checkpoints"):  # fmt: skip
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"'{name}' does not go with 'lora', which trains adapters and new slots by "
                        "AdamW"
                    )
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

    Attributes:
        strategy: ``ddp``: every process holds the model; ``fsdp``: a part of it (FSDP2).
        tensor: so many neighbouring processes share every layer and read the same sequences
            (tensor parallelism by the model's own ``tp_plan``); more processes than that divide
            the data, which needs ``fsdp``.
        context: so many neighbouring processes divide the tokens of every sequence (context
            parallelism, for sequences whose activations no process holds), and the heads of its
            attention; it divides ``sequence_length`` and the number of query heads.
        processes: a launch with any other number of processes is refused.
        gather_dtype: what travels between processes under ``fsdp`` with ``bf16``. ``bfloat16``
            halves the traffic; every parameter, lambda too, is then rounded where it is used (not
            where it is stored).
        timeout_minutes: a process that waits longer for another one ends the run.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    tensor: Positive = 1
    context: Positive = 1
    processes: Positive | None = None
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    timeout_minutes: Annotated[float, Field(gt=0)] = 30

    @property
    def sharded(self) -> bool:
        """Whether a process holds a part of the model: checkpoints are then written by all."""
        return self.strategy == "fsdp" or self.tensor > 1

    def readers(self, processes: int) -> int:
        """How many groups of processes read sequences of their own."""
        return processes // (self.tensor * self.context)
