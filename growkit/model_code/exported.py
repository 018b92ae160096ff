# SPDX-License-Identifier: Apache-2.0
"""What growkit uses of transformers beyond its documented interface, and where it was checked.

One list, so that a new release is looked through once: ``tests/test_transformers_internals.py``
holds every entry against the installed transformers, and CI runs it with the oldest, the pinned and
the newest version that pyproject.toml admits. No torch.

The code files that let a user without growkit load a folder of our model types. No torch.

The model's source files are copied next to the weights, flat, with their relative imports
rewritten; ``trust_remote_code=True`` loads them. They import nothing but torch, transformers,
huggingface_hub and each other.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from growkit import __version__
from growkit.core.writing import write_file
from growkit.variants.catalogue import attention_table

# The versions that the tests ran with; pyproject.toml admits no newer minor release.
CHECKED_VERSIONS = ("5.16.0", "5.23.0", "5.24.0")

# Private methods and hooks of transformers.Trainer that growkit.training overrides or calls, with
# their arguments after self.
TRAINER_METHODS: dict[str, tuple[str, ...]] = {
    "_move_model_to_device": ("model", "device"),
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
    "_save": ("output_dir", "state_dict"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_init_training_state": (
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "_get_train_sampler": ("train_dataset",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "create_optimizer": ("model",),
    "create_scheduler": ("num_training_steps", "optimizer"),
    "log": ("logs", "start_time"),
}

# Overridden where it exists: name -> a version that has it (5.16 has not).
NEWER_TRAINER_METHODS = {"_defer_fsdp_gradient_reduction": "5.23"}

# Attributes of a running Trainer that are read or set.
TRAINER_ATTRIBUTES = ("_tr_loss", "_globalstep_last_logged")

# Names that our models take from transformers' own: module under transformers -> names.
MODEL_NAMES: dict[str, tuple[str, ...]] = {
    "activations": ("ACT2FN",),
    "cache_utils": ("Cache", "EncoderDecoderCache"),
    "configuration_utils": ("PreTrainedConfig",),
    "conversion_mapping": ("get_checkpoint_conversion_mapping",),
    "initialization": ("constant_", "normal_", "zeros_"),
    "modeling_layers": ("GradientCheckpointingLayer",),
    "modeling_utils": ("ALL_ATTENTION_FUNCTIONS", "PreTrainedModel"),
    "models.llama.modeling_llama": (
        "LlamaAttention",
        "LlamaForCausalLM",
        "LlamaModel",
        "LlamaRMSNorm",
        "LlamaRotaryEmbedding",
        "apply_rotary_pos_emb",
        "eager_attention_forward",
        "repeat_kv",
    ),
    "models.t5.configuration_t5": ("T5Config",),
    "models.t5.modeling_t5": (
        "T5Attention",
        "T5ForConditionalGeneration",
        "T5Model",
        "T5PreTrainedModel",
        "T5Stack",
    ),
}


ROOT = Path(__file__).parents[1]
ATTENTIONS = ROOT / "variants" / "attentions.py"
# First line of every written file.
HEADER = (
    f"# Written by growkit {__version__}, checked with transformers {', '.join(CHECKED_VERSIONS)}; "
    "`growkit refresh FOLDER` renews it.\n"
)
MODEL_TYPES = ("gda", "growkit", "growkit_t5")
ENCODER_DECODERS = ("growkit_t5",)

_RELATIVE_IMPORT = re.compile(r"^(\s*from )(\.+)([\w.]+)(?= import )", re.MULTILINE)
_GROWKIT_IMPORT = re.compile(r"^\s*(?:from|import)\s+growkit\b", re.MULTILINE)


def auto_map(model_type: str) -> dict[str, str]:
    """Where transformers finds the classes: vLLM needs AutoModel, from_pretrained the others."""
    name = "".join(word.capitalize() for word in model_type.split("_"))
    language_model = ("AutoModelForCausalLM", "ForCausalLM")
    if model_type in ENCODER_DECODERS:
        language_model = ("AutoModelForSeq2SeqLM", "ForConditionalGeneration")
    return {
        "AutoConfig": f"configuration_{model_type}.{name}Config",
        "AutoModel": f"modeling_{model_type}.{name}Model",
        language_model[0]: f"modeling_{model_type}.{name}{language_model[1]}",
    }


def sources(model_type: str) -> list[Path]:
    """The model's file and every file that it imports, directly or not."""
    found = [ROOT / "modeling" / f"modeling_{model_type}.py"]
    for path in found:
        for match in _RELATIVE_IMPORT.finditer(text_of(path)):
            target = imported_file(path, match)
            if target not in found:
                found.append(target)
    return found


def text_of(path: Path) -> str:
    """Text of a source file; of the table of attentions that with every import written out."""
    return attention_table() if path == ATTENTIONS else path.read_text("utf-8")


def exported_name(path: Path) -> str:
    """Name in a folder, without ending: ``variants/gda/attention.py`` is ``gda`` there."""
    if path == ATTENTIONS:
        return "variants"
    if path.parent.parent != ROOT / "variants" or path.parent.name == "shared":
        return path.stem
    part = "" if path.stem == "attention" else f"_{path.stem}"
    return path.parent.name + part


def imported_file(path: Path, found: re.Match[str]) -> Path:
    """The file that a relative import in ``path`` names."""
    _, dots, module = found.groups()
    return path.parents[len(dots) - 1].joinpath(*module.split(".")).with_suffix(".py")


def flattened(source: str, path: Path) -> str:
    """Text of the source file ``path`` with every relative import made one of a sibling file."""

    def sibling(found: re.Match[str]) -> str:
        return f"{found[1]}.{exported_name(imported_file(path, found))}"

    return _RELATIVE_IMPORT.sub(sibling, source)


def code_files(model_type: str) -> dict[str, str]:
    """File name -> text of every file of a self-contained folder."""
    paths = sources(model_type)
    files = {f"{exported_name(path)}.py": HEADER + flattened(text_of(path), path) for path in paths}
    assert len(files) == len(paths), "two files of one name"
    for name, text in files.items():
        assert not _GROWKIT_IMPORT.search(text), f"{name} must not import growkit"
    return files


def export_code(folder: str | os.PathLike[str], model_type: str) -> dict[str, str]:
    """Write the code files into ``folder`` (made if missing); returns the ``auto_map``."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in code_files(model_type).items():
        write_file(target / name, text)
    return auto_map(model_type)
