"""The model of a run: loaded from a folder or made from a config, and published at the end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from growkit.checkpoint import open_checkpoint
from growkit.checkpoint.side_files import copy_side_files
from growkit.core.errors import CheckpointError, UsageError, nearest
from growkit.core.names import MANIFEST, README, TRAINING_RECORD
from growkit.data.tokenizer import copy_tokenizer
from growkit.families import check_trainable
from growkit.families.differential import is_lambda_vector
from growkit.training.adapters import save_adapter
from growkit.training.data_position import POSITION
from growkit.training.final_dtype import store_in
from growkit.training.leftovers import remove
from growkit.training.published import move_into
from growkit.training.rate_rule import Factors, rate_factors
from growkit.training.recipe import ModelSection, Recipe
from growkit.verification.loading import class_of, reason, register_own_models
from growkit.vocabulary.tokenizer_files import TOKENIZER_FILES
from growkit.vocabulary.tokenizer_size import resize_remedy


def build_model(section: ModelSection, tokenizer: Any, seed: int) -> Any:
    """The causal language model in training precision, on the CPU.

    Raises:
        UsageError: unknown model type or config key, or a vocabulary smaller than the tokenizer's.
        CheckpointError: the folder is damaged or transformers cannot load it.
    """
    register_own_models()
    if section.checkpoint is not None:
        model = _load(section.checkpoint, section)
    else:
        assert section.config is not None
        model = _from_scratch(section.config, section, tokenizer, seed)
    _keep_lambda_in_float32(model, section.checkpoint)
    check_vocabulary(model, tokenizer, section.checkpoint)
    return model


def scale_starts(model: Any, recipe: Recipe) -> None:
    """Give the random start of every tensor the spread that ``training.rate_rule`` asks for.

    A trained checkpoint is left as it is.
    """
    if recipe.model.config is None:
        return
    import torch

    factors = rate_factors(recipe, model.config.to_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = factors.get(name, Factors()).start
            if start != 1.0:
                parameter.mul_(start)


def check_vocabulary(model: Any, tokenizer: Any, folder: Path | None = None) -> None:
    """Raises:
    UsageError: the tokenizer makes ids that the model does not have.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        remedy = "Leave vocab_size out of model.config, or set it to at least the first of them."
        if folder is not None:
            remedy = (
                f"Use the model's own tokenizer, if it was another one. {resize_remedy(folder)}"
            )
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} tokens and the model's vocabulary {vocabulary}.",
            remedy,
        )


def check_attention(section: ModelSection, error: Exception) -> None:
    """Raises:
    UsageError: ``error`` says that the recipe's attention implementation is not to be had.
    """
    name = section.attn_implementation
    text = str(error).lower().replace(" ", "")
    if name is not None and any(s in text for s in ("attn_implementation", "flashattention")):
        raise UsageError(
            f"model.attn_implementation {name!r} cannot be used: {reason(error)}.",
            "Install what it needs, or say sdpa or eager.",
        ) from error


def check_folder(path: Path) -> None:
    """Let the folder's own checks name what is wrong with a file.

    Raises:
        CheckpointError: the folder is damaged.
        UsageError: it holds no decoder-only model.
    """
    with open_checkpoint(path) as folder:
        check_trainable(folder.config, path)


def _keep_lambda_in_float32(model: Any, source: Path | None) -> None:
    """Lambda vectors of bfloat16 models as the source stores them, in float32.

    Our own model class asks transformers for that; others do not, and none does from scratch.
    """
    import torch

    rounded = {
        name: parameter
        for name, parameter in model.named_parameters()
        if is_lambda_vector(name, parameter.ndim)
        and parameter.dtype in (torch.bfloat16, torch.float16)
    }
    if not rounded:
        return
    stored: dict[str, Any] = {}
    if source is not None:
        with open_checkpoint(source) as checkpoint:
            stored = {
                name: checkpoint.read(name).astype("float32")
                for name in rounded
                if name in checkpoint.tensors
            }
    for name, parameter in rounded.items():
        value = parameter.detach().float()
        parameter.data = torch.from_numpy(stored[name]) if name in stored else value


def options(section: ModelSection) -> dict[str, Any]:
    """What from_pretrained and from_config are told besides the dtype."""
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    return options


def class_of_folder(path: Path, section: ModelSection) -> Any:
    """What loads a folder for training: AutoModelForCausalLM, or of a model with towers beside its
    language model the class that its config names, so that they are kept."""
    from transformers import AutoConfig, AutoModelForCausalLM

    code = section.trust_remote_code
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=code)
    wraps = config.get_text_config(decoder=True) is not config
    return (class_of(config) if wraps and not code else None) or AutoModelForCausalLM


def _load(path: Path, section: ModelSection) -> Any:
    check_folder(path)
    try:
        model, info = class_of_folder(path, section).from_pretrained(
            path,
            dtype=section.dtype,
            local_files_only=True,
            output_loading_info=True,
            **options(section),
        )
    except Exception as error:  # whatever transformers objects to, the folder does not load
        check_attention(section, error)
        remedy = "Check it with: growkit inspect."
        if "trust_remote_code" in str(error):
            remedy = "Read the code that it brings, then set model.trust_remote_code: true."
        raise CheckpointError(
            f"transformers cannot load {str(path)!r}: {reason(error)}.", remedy
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise CheckpointError(
                f"{str(path)!r} does not fit its config.json: {problem.replace('_', ' ')} "
                f"{', '.join(map(str, sorted(info[problem])[:3]))}.",
                "Its config.json and its safetensors files do not belong together.",
            )
    return model


def _from_scratch(values: dict[str, Any], section: ModelSection, tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    config = make_config(values, tokenizer)
    set_seed(seed)
    dtype = torch.bfloat16 if section.dtype == "bfloat16" else torch.float32
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options(section))
    except (ValueError, KeyError, ImportError) as error:
        check_attention(section, error)
        raise UsageError(
            f"No model can be made from model.config: {reason(error)}.",
            "See the config class of its model_type for fields that go together.",
        ) from error


def make_config(values: dict[str, Any], tokenizer: Any) -> Any:
    """A transformers config from a recipe's mapping; unknown keys are refused.

    The vocabulary size and the special token ids are the tokenizer's unless they are given.
    """
    from transformers import CONFIG_MAPPING

    fields = dict(values)
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"model.config.model_type is {model_type!r}, which transformers does not know.",
            f"{nearest(str(model_type), CONFIG_MAPPING.keys())}For example: gda, llama, qwen3.",
        )
    config_class = CONFIG_MAPPING[model_type]
    fields.setdefault("vocab_size", len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name, None) is not None:
            fields.setdefault(name, getattr(tokenizer, name))
    valid = {field.name for field in dataclasses.fields(config_class) if field.init}
    valid |= {"rope_theta", *getattr(config_class, "attribute_map", {})}
    for name in fields:
        if name not in valid:
            shown = ", ".join(sorted(n for n in valid if not n.startswith("_")))
            raise UsageError(
                f"model.config has the unknown key {name!r} for model_type {model_type!r}.",
                f"{nearest(name, valid)}Valid keys: {shown}.",
            )
    try:
        return config_class(**fields)
    except Exception as error:  # strict configs raise several types of their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UsageError(
            f"model.config is not a valid {model_type} config: {' '.join(lines)}",
            "Change the fields that it names.",
        ) from error


def copy_lineage(source: Path | None, target: Path) -> None:
    """Take growkit.json of a grown source along, so that a later growth knows its ancestors."""
    if source is not None and (source / MANIFEST).is_file():
        shutil.copyfile(source / MANIFEST, target / MANIFEST)


def publish_model(
    model: Any,
    out: Path,
    staging: Path,
    *,
    tokenizer_folder: Path,
    source: Path | None,
    record: dict[str, Any],
    save_dtype: str = "source",
    position: str | None = None,
    card: str = "",
    adapter: bool = False,
) -> None:
    """Write the trained model beside ``out`` and move it there (:mod:`growkit.training.published`).

    growkit.json of a grown source (its lineage) goes along as bytes, and its ``growkit`` block in
    config.json stays.

    Args:
        model: None when the weights and config are in ``staging`` already.
        staging: a folder on the same file system, removed afterwards.
        record: what the run was; becomes ``growkit_training.json``.
        save_dtype: see :func:`growkit.training.final_dtype.store_in`.
        position: content of ``data_position.json``.
        card: text of README.md.
        adapter: the model has adapters, which are all that is written.
    """
    if model is not None:
        remove(staging)
        staging.mkdir(parents=True)
        (save_adapter if adapter else type(model).save_pretrained)(model, staging)
    if not adapter:
        store_in(staging, save_dtype, source)
        copy_lineage(source, staging)
    copy_tokenizer(tokenizer_folder, staging)
    if source is not None and not adapter:  # licence, notice, what else stays valid
        written = {path.name for path in staging.iterdir()}
        copy_side_files(source, staging, leave_out={*written, *TOKENIZER_FILES, POSITION})
    if card:
        if adapter:
            card = card.replace("library_name: transformers", "library_name: peft", 1)
        (staging / README).write_text(card, encoding="utf-8")
    if position is not None:
        (staging / POSITION).write_text(position)
    (staging / TRAINING_RECORD).write_text(json.dumps(record, indent=2) + "\n")
    move_into(staging, out)
