# SPDX-License-Identifier: Apache-2.0
"""LoRA on a grown model (``training.lora``), by ``peft``: adapters on old weights, new slots whole.

* A linear layer whose weights are all old gets an adapter of low rank; the weights themselves stay.
* A module with new slots, a layer of a growth in depth say, becomes one of peft's
  ``modules_to_save``: a copy that is trained and saved whole. Where only some of its slots are new
  (a wider FFN), the old ones keep their bytes in the copy; it gets no adapter.
* Everything else stands still.

So what is saved is what peft saves, a folder with ``adapter_config.json`` that names the model it
belongs to, and loading and merging are peft's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.checkpoint.header import read_header
from growkit.checkpoint.hub import origin
from growkit.core.errors import CheckpointError, UsageError, require_extra
from growkit.core.names import README

if TYPE_CHECKING:
    from growkit.training.growth.slots import SlotMap
    from growkit.training.recipe import Recipe

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _COPY = "base_model.model.", ".modules_to_save.default"


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_adapter(folder: Path) -> None:
    """Raises CheckpointError for an adapter whose weights are missing or cut off."""
    if not (folder / ADAPTER).is_file():
        raise CheckpointError(f"{str(folder)!r} has no {ADAPTER}.", "Repeat the run.")
    read_header(folder / ADAPTER)


def with_adapters(model: Any, recipe: Recipe) -> Any:
    """The model with adapters, and copies of the modules that have new slots.

    Raises:
        UsageError: new slots lie where peft cannot save them, or nothing is left for adapters.
    """
    require_extra("peft", "peft", "lora", "training.lora")
    import peft
    import torch
    from transformers import set_seed

    from growkit.training.growth.trainer_hooks import slots_of

    section = recipe.training.lora
    assert section is not None
    slots = slots_of(model, recipe)
    modules = dict(model.named_modules())
    copied = sorted(
        {
            name.rpartition(".")[0]
            for name, _ in model.named_parameters()
            if slots.part(name) != "old"
        }
    )
    for name in copied:
        if any(True for _ in modules[name].children()):
            raise UsageError(
                f"New slots of {name!r} stand beside modules of its own, which peft cannot save "
                "apart.",
                "Train without training.lora: train: new moves the new slots alone.",
            )
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and any(isinstance(modules[name], torch.nn.Embedding) for name in copied):
        raise UsageError(
            "The embedding has new rows and is the output projection too, and peft would save a "
            "copy of one of them.",
            "Grow with --untie-embeddings, or train without training.lora.",
        )
    targets = _targets(model, modules, set(copied), section.target_modules)
    config = peft.LoraConfig(
        r=section.r,
        lora_alpha=2 * section.r if section.alpha is None else section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        modules_to_save=copied or None,
        task_type="CAUSAL_LM",
    )
    source = recipe.model.checkpoint
    assert source is not None  # the recipe is checked
    parent, revision = origin(source)
    set_seed(recipe.training.seed)  # adapters begin at random, whatever ran before
    adapted = peft.get_peft_model(model, config)
    config.base_model_name_or_path = parent if revision else str(source.resolve())
    config.revision = revision
    return adapted


def _targets(
    model: Any, modules: dict[str, Any], copied: set[str], wanted: list[str] | None
) -> list[str]:
    """Full names of the linear layers that get an adapter: all but the output projection."""
    import torch

    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in modules.items()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not head
    ]
    last = {name.rpartition(".")[2] for name in linear}
    for name in wanted or ():
        if name not in last:
            raise UsageError(
                f"training.lora.target_modules names {name!r}, which is no linear layer of the "
                "model.",
                f"Its linear layers: {', '.join(sorted(last))}.",
            )
    found = [
        name
        for name in linear
        if name not in copied and (wanted is None or name.rpartition(".")[2] in wanted)
    ]
    if not found:
        raise UsageError(
            "No linear layer with old weights alone is left for training.lora.",
            "Leave out target_modules, or train with train: new.",
        )
    return found


def adapter_slots(model: Any, recipe: Recipe) -> SlotMap:
    """What is trained of a model with adapters, as new slots: these, and the copies' new ones."""
    from growkit.training.growth.slots import SlotMap
    from growkit.training.growth.trainer_hooks import slots_of

    slots = slots_of(model.get_base_model(), recipe, named=_own_name)
    found: dict[str, Any] = {}
    for name, _ in model.named_parameters():
        if ".lora_" in name:
            found[name] = None
        elif _COPY in name:
            own = _own_name(name)
            part = slots.part(own)
            if part != "old":
                found[name] = slots.slots(own) if part == "mixed" else None
    return SlotMap(found)


def _own_name(name: str) -> str:
    """The name that a parameter had before peft wrapped its module."""
    plain = name.removeprefix(_PREFIX).replace(_COPY, "").replace(".original_module", "")
    return plain.replace(".base_layer.", ".")


def save_adapter(model: Any, folder: Path) -> None:
    """Save as peft does, without the empty card that it adds."""
    model.save_pretrained(folder)
    (folder / README).unlink(missing_ok=True)
