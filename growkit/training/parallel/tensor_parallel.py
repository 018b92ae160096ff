"""Tensor parallelism: every process holds a part of each layer and computes with it.

How a layer is cut is the class's ``base_model_tp_plan``, and transformers' own code applies it
(``maybe_distribute_model``); accelerate is not told, because it refuses tensor parallelism on a
CPU, where the tests run this very code. Neighbouring processes share a model and read the same
sequences. Under ``parallel.strategy: fsdp`` the parts are cut once more among those that read
others.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import transformers
from torch import Tensor, nn

from growkit.core.errors import UsageError
from growkit.training.parallel.processes import Processes
from growkit.training.recipe import Recipe

_OTHERWISE = "Set another parallel.tensor, or shard over the data: parallel.strategy: fsdp."
# Fields that count heads, of which a process takes whole ones, and the projections they belong to.
_HEADS = {
    "num_attention_heads": ("q_proj", "query_key_value", "qkv_proj", "c_attn"),
    "num_key_value_heads": ("k_proj",),
}


def tensor_config(size: int) -> Any:
    """transformers' description of the split, for a config before its model is made.

    Raises:
        UsageError: this transformers is too old.
    """
    from transformers import Trainer
    from transformers.distributed import DistributedConfig

    if not hasattr(Trainer, "_mixed_mesh_grad_norm"):
        raise UsageError(
            f"parallel.tensor is {size}, and transformers {transformers.__version__} cannot train "
            "a model whose layers are shared by processes.",
            f"Install transformers 5.23 or later. {_OTHERWISE}",
        )
    return DistributedConfig(tp_size=size)


def split_layers(model: Any, recipe: Recipe, processes: Processes) -> tuple[Any, Any]:
    """Cut the layers of a model, with or without memory, that is the same in every process.

    Returns:
        The model, and the mesh of the processes that read sequences of their own.

    Raises:
        UsageError: its class has no plan, or a size that the processes cannot share.
    """
    size = recipe.parallel.tensor
    config = tensor_config(size)
    _check_sizes(model, size)
    config.tp_plan = _summed_before_they_add_up(model.tp_plan)
    # The mesh of all dimensions; that of the data is used by fully_shard alone.
    _, _, meshes = type(model).prepare_distribute_model(
        type(config)(tp_size=size, fsdp_size=processes.readers)
    )
    _untie(model)
    model = type(model).maybe_distribute_model(model, config, meshes)
    model.tie_weights()
    # Said to transformers' Trainer, these would forbid checkpoints, and accelerate the CPU.
    model._is_distributed_loading_by_transformers, model._tp_size = False, None
    for part in {id(c): c for c in _configs(model)}.values():
        part.__dict__.pop("distributed_config", None)  # how it was trained is no part of a model
    return model, meshes.get_mesh("fsdp")


_PARTIAL = "replicated_with_grad_allreduce"
_SUMMED = f"growkit_{_PARTIAL}"


def _summed_before_they_add_up(plan: dict[str, str]) -> dict[str, str] | None:
    """The rules of a plan whose gradients are partial sums, under a style of our own.

    Of a norm between split layers a process has the gradient of its own heads. transformers (5.23,
    5.24) sums what has accumulated, again behind every micro-batch: with more than one in a step,
    the first ones would count several times. Ours sums each one's before it is added.
    """
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    class SummedGradient(TensorParallelLayer):
        def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
            original, hooked = module.forward, dict[str, nn.Parameter]()

            def summed(gradient: Tensor) -> Tensor:
                gradient = gradient.clone()
                dist.all_reduce(gradient, group=mesh.get_group())
                return gradient

            def forward(*arguments: Any, **options: Any) -> Any:
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.requires_grad and hooked.get(name) is not parameter:
                        parameter.register_hook(summed)
                        hooked[name] = parameter
                return original(*arguments, **options)

            module.forward = forward
            return module

    ALL_PARALLEL_STYLES[_SUMMED] = SummedGradient()
    # (None: an empty dict would mean no plan at all.)
    return {rule: _SUMMED for rule, style in plan.items() if style == _PARTIAL} or None


def _configs(model: Any) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


def _untie(model: Any) -> None:
    """Parameters of their own for tied ones, which transformers would look for by their names."""
    for name in getattr(model, "all_tied_weights_keys", None) or ():
        module_name, _, own = name.rpartition(".")
        module = model.get_submodule(module_name)
        module._parameters[own] = nn.Parameter(
            getattr(module, own).detach(), requires_grad=getattr(module, own).requires_grad
        )


def _check_sizes(model: Any, size: int) -> None:
    name = type(model).__name__
    plan = {rule.rpartition(".")[2]: style for rule, style in (model.tp_plan or {}).items()}
    if not plan:
        raise UsageError(f"{name} has no plan for tensor parallelism (tp_plan).", _OTHERWISE)
    config = model.config.get_text_config()
    for field, projections in _HEADS.items():
        counts = getattr(config, field, None)
        cut = any(plan.get(projection) == "colwise" for projection in projections)
        for count in counts if isinstance(counts, list | tuple) else [counts]:
            if cut and isinstance(count, int) and count % size:
                raise UsageError(
                    f"parallel.tensor {size} does not divide the model's {count} heads ({field}).",
                    f"{_OTHERWISE} (Or grow the heads to a multiple.)",
                )
