"""What every section of a recipe is made of.

From a recipe that cannot be used to one sentence: which key, on which line, and what instead.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from growkit.core.errors import UsageError, nearest

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


Recipe = TypeVar("Recipe", bound=BaseModel)

# What other trainers and papers call a key, by ours.
SPELLINGS = {
    "training.learning_rate": "lr max_lr peak_lr base_lr learningrate",
    "training.min_learning_rate_ratio": "min_lr min_lr_ratio lr_min final_lr end_lr",
    "training.schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule",
    "training.warmup_steps": "warmup warmup_ratio num_warmup_steps warmup_iters warmup_fraction",
    "training.decay_steps": "decay cooldown cooldown_steps lr_decay_steps num_decay_steps",
    "training.optimizer": "optim",
    "training.weight_decay": "wd decay_rate",
    "training.adam_beta1": "beta1 betas",
    "training.adam_beta2": "beta2",
    "training.adam_epsilon": "eps epsilon adam_eps",
    "training.max_grad_norm": "clip grad_clip gradient_clip clip_grad_norm gradient_clip_val",
    "training.per_device_train_batch_size": "batch_size bs micro_batch_size train_batch_size "
    "mbs device_batch_size",
    "training.per_device_eval_batch_size": "eval_batch_size val_batch_size",
    "training.gradient_accumulation_steps": "grad_accum accumulation gradient_accumulation "
    "grad_accum_steps accumulate_grad_batches accumulation_steps",
    "training.max_steps": "epochs num_epochs num_train_epochs steps num_steps train_steps "
    "max_iters iterations total_steps",
    "training.max_tokens": "tokens token_budget num_tokens total_tokens",
    "training.bf16": "fp16 precision mixed_precision amp",
    "training.gradient_checkpointing": "activation_checkpointing recompute remat",
    "training.torch_compile": "compile",
    "training.logging_steps": "log_interval log_every log_steps",
    "training.eval_steps": "eval_interval eval_every val_interval validation_steps",
    "training.save_steps": "save_interval save_every checkpoint_interval checkpoint_every",
    "training.save_total_limit": "keep_checkpoints max_checkpoints",
    "training.dataloader_num_workers": "num_workers",
    "training.report_to": "wandb tracker logger tensorboard",
    "training.seed": "random_seed rng_seed",
    "data.sequence_length": "seq_len seqlen seq_length max_length max_seq_len max_seq_length "
    "block_size context_length context context_size n_ctx",
    "data.files": "train_files text corpus path paths data_path train_data dataset_path",
    "data.tokens": "token_files bin_files data_prefix train_bin",
    "data.eval_tokens": "val_bin",
    "data.eval_files": "val_files validation_files test_files eval_data",
    "data.eval_fraction": "val_fraction validation_split val_split test_size",
    "data.cache_dir": "cache",
    "model.checkpoint": "model_name_or_path pretrained init_from name_or_path pretrained_model",
    "model.dtype": "torch_dtype",
    "model.attn_implementation": "attn attention attention_implementation flash_attention",
    "parallel.strategy": "ddp fsdp",
    "parallel.tensor": "tp tp_size tensor_parallel tensor_parallel_size parallelism",
    "parallel.context": "cp cp_size context_parallel context_parallel_size sp sp_size "
    "sequence_parallel sequence_parallel_size ulysses",
    "parallel.processes": "world_size nproc gpus num_gpus devices num_processes",
    "out": "output_dir out_dir save_dir output",
}
_OURS = {other: ours for ours, others in SPELLINGS.items() for other in others.split()}


def nearest_key(word: str, valid: Iterable[str]) -> str:
    """:func:`nearest` for a key of a recipe; knows what others call it, wherever it stands."""
    ours = _OURS.get(word.lower().replace("-", "_"))
    if ours is None:
        return nearest(word, valid)
    last = ours.rpartition(".")[2]
    where = repr(last) if last in valid else repr(ours)
    more = " (steps count here, not epochs)" if "epochs" in word else ""
    return f"Did you mean {where}{more}? "


def _line(text: str, location: tuple[int | str, ...]) -> str:
    """``" line 7"`` of a key in the YAML text, or nothing when it is not in the text."""
    node = yaml.compose(text, Loader=yaml.SafeLoader) if text else None
    line = None
    for step in location:
        if isinstance(node, yaml.MappingNode):
            pair = next((p for p in node.value if p[0].value == str(step)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step] if step < len(node.value) else None
        else:
            break
    return "" if line is None else f" line {line}"


def _sections_in(annotation: object) -> list[type[BaseModel]]:
    """The section classes that a field's type names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _sections_in(part)]


def _section_of(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section class in which the last key of ``location`` stands."""
    for step in location[:-1]:
        field = model.model_fields.get(str(step))
        found = _sections_in(field.annotation) if field is not None else []
        if found:
            model = found[0]
    return model


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def by_override(location: Sequence[int | str], overrides: Sequence[str]) -> str | None:
    """The last ``--set`` that gave the value at ``location``, or a mapping that it is in."""
    at = [str(step) for step in location]
    for override in reversed(overrides):
        key = override.partition("=")[0].split(".")
        if at[: len(key)] == key:
            return f"--set {override}"
    return None


def explain(
    error: ValidationError,
    model: type[BaseModel],
    source: str,
    text: str,
    overrides: Sequence[str] = (),
) -> UsageError:
    """The first problem of a validation error as a usage error."""
    # An unknown key is the likeliest reason for whatever else is reported (a missing one, say).
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    location = problem["loc"]
    where = by_override(location, overrides) or f"{source}{_line(text, location)}"
    dotted = ".".join(str(step) for step in location)
    if problem["type"] == "extra_forbidden":
        valid = _keys(_section_of(model, location))
        prefix = ".".join(str(step) for step in location[:-1])
        place = f"section {prefix!r}" if prefix else "the recipe"
        return UsageError(
            f"{where}: unknown key {str(location[-1])!r} in {place}.",
            f"{nearest_key(str(location[-1]), valid)}Valid keys: {', '.join(valid)}.",
        )
    if problem["type"] == "missing":
        return UsageError(f"{where}: {dotted!r} is missing.", "Add it to the recipe.")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        place = f"section {dotted!r}" if dotted else "the recipe"
        return UsageError(
            f"{where}: {place} cannot be used.", message[:1].upper() + message[1:] + "."
        )
    return UsageError(f"{where}: {dotted} is {problem['input']!r}.", f"{message}.")


def validated(
    model: type[Recipe], values: object, source: str, text: str, overrides: Sequence[str] = ()
) -> Recipe:
    """A mapping as a recipe of class ``model``.

    Args:
        text: the YAML it came from, for line numbers in errors.
        overrides: ``key.path=value`` of ``--set``, already applied, to be named in errors.

    Raises:
        UsageError: naming the key, its line, and the nearest valid key of an unknown one.
    """
    if not isinstance(values, dict):
        raise UsageError(
            f"{source} does not hold a YAML mapping.",
            f"Its sections are {', '.join(model.model_fields)}.",
        )
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model, source, text, overrides) from None
