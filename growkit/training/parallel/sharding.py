"""FSDP2: every process holds a part of each parameter, of its gradient and optimizer state.

This is torch's own ``fully_shard``, the same code on GPUs (NCCL) and on CPUs (gloo), where the
tests run it. accelerate's FSDP is not used: it is left out on a CPU, silently.

Each decoder layer is gathered for its own forward and backward pass, embeddings and final norm stay
gathered in between. Gradients are averaged and scattered after every micro-batch, so that they
never exist whole.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.names import GENERATION_CONFIG
from growkit.training.models import (
    build_model,
    check_attention,
    check_folder,
    check_vocabulary,
    class_of_folder,
    options,
    scale_starts,
)
from growkit.training.parallel.processes import Processes, on_cpu
from growkit.training.parallel.sharded_files import read_model, write_model
from growkit.training.parallel.tensor_parallel import split_layers, tensor_config
from growkit.training.recipe import ModelSection, Recipe
from growkit.verification.loading import reason, register_own_models


class ShardedModel:
    """A model of which this process holds a part.

    Attributes:
        model: the module to train; its class is one that ``fully_shard`` made.
        model_class: the class it had before, which is the one to save.
    """

    def __init__(self, model: Any, model_class: type[Any], processes: Processes) -> None:
        self.model, self.model_class, self.processes = model, model_class, processes

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that ``from_pretrained`` loads; every process writes its own rows."""
        self.reshard()
        self.processes.from_first(lambda: self._save_config(folder))
        write_model(self.model, folder, self.processes)

    def reshard(self) -> None:
        """Give back what a forward pass without a backward pass (evaluation) left gathered."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _save_config(self, folder: Path) -> None:
        # save_pretrained of the sharded class would copy torch's code in place of the model's, and
        # name a class in config.json that nobody can load.
        shell = self._shell()
        folder.mkdir(parents=True, exist_ok=True)
        shell.save_pretrained(folder, state_dict={})

    def _shell(self) -> Any:
        with torch.device("meta"):
            shell = self.model_class(self.model.config)
        shell.generation_config = self.model.generation_config
        return shell

    def load(self, folder: Path) -> None:
        """Read the weights of a folder, each process its own rows."""
        self.reshard()
        read_model(self.model, folder)


def build_sharded(recipe: Recipe, tokenizer: Any, processes: Processes) -> ShardedModel:
    """The model of a run, sharded over all processes.

    A checkpoint is read part by part: no process holds the whole model at any time. A model from
    scratch is made whole in every process first, so that it is the one that a single process makes.

    Raises:
        UsageError: the model cannot be sharded.
    """
    section = recipe.model
    tensor = recipe.parallel.tensor
    if section.checkpoint is not None:
        split = tensor_config(tensor) if tensor > 1 else None
        model = empty_model(section.checkpoint, section, split)
        check_vocabulary(model, tokenizer, section.checkpoint)
    else:
        model = build_model(section, tokenizer, recipe.training.seed)
        scale_starts(model, recipe)
    if on_cpu(recipe):
        _give_memory_back()
    mesh = None
    if tensor > 1:
        model, mesh = split_layers(model, recipe, processes)
    sharded = ShardedModel(model, type(model), processes)
    if recipe.parallel.strategy == "fsdp":
        _check_one_dtype(model)
        _shard(model, recipe, processes, mesh)
    if section.checkpoint is not None:
        _allocate(model, "cpu" if on_cpu(recipe) else torch.accelerator.current_accelerator())
        sharded.load(section.checkpoint)
    return sharded


def empty_model(path: Path, section: ModelSection, split: Any = None) -> Any:
    """The model of a folder without memory for its parameters; its buffers have their values.

    ``split`` is told to the class before it is made: how layers will be shared (our own check it).

    Buffers that no file stores (rotary frequencies) would be garbage in a model that is made on the
    meta device as a whole and allocated later, and nothing would complain.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    register_own_models()
    check_folder(path)
    config = AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=section.trust_remote_code
    )
    if split is not None:
        config.distributed_config = split
    dtype = config.dtype or torch.float32
    if section.dtype != "auto":
        dtype = getattr(torch, section.dtype)
    try:
        with init_empty_weights(include_buffers=False):
            auto = class_of_folder(path, section)
            model = auto.from_config(config, dtype=dtype, **options(section))
    except (ValueError, ImportError) as error:
        check_attention(section, error)
        raise CheckpointError(
            f"transformers cannot make the model of {str(path)!r}: {reason(error)}.",
            "Check it with: growkit inspect.",
        ) from error
    model.tie_weights()
    if (path / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def _check_one_dtype(model: nn.Module) -> None:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if len(dtypes) > 1:
        raise UsageError(
            f"parallel.strategy fsdp needs parameters of one dtype, and these are "
            f"{' and '.join(sorted(dtypes))} (lambda vectors stay in float32).",
            "Set model.dtype: float32 and training.bf16: true (bfloat16 computation on float32 "
            "parameters).",
        )


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated blocks of a model, in order: what its class says must not be split.

    Raises:
        UsageError: it has none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UsageError(
            f"{type(model).__name__} does not say what its layers are (_no_split_modules).",
            "Set parallel.strategy: ddp.",
        )
    return layers


def _shard(model: nn.Module, recipe: Recipe, processes: Processes, mesh: Any = None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh is None:
        device = "cpu"
        if not on_cpu(recipe):
            accelerator = torch.accelerator.current_accelerator()
            assert accelerator is not None
            device = accelerator.type
        mesh = init_device_mesh(device, (processes.count,))
    policy = MixedPrecisionPolicy()
    if recipe.training.bf16 and recipe.parallel.gather_dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _give_memory_back() -> None:
    """Let glibc return large freed blocks to the system at once.

    Otherwise it keeps the memory of gathered layers for later, in pieces that the next layer does
    not fit into: measured, twice the whole model after one step. A GPU has torch's allocator.
    """
    import ctypes

    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)


def _allocate(model: Any, device: Any) -> None:
    """Memory for this process's part of the parameters; buffers keep their values."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
