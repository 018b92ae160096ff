"""What vLLM's transformers backend (0.32, 0.33) asks of a model, checked without vLLM.

Imports nothing of growkit: it runs in the process of a user who has only the folder. Source:
vllm-project/vllm, ``vllm/model_executor/models/transformers`` (``base.py``,
``fusers/attention.py``).
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attention_calls(forward: Any) -> list[ast.Call]:
    """Calls in the source of ``forward`` of a local variable that was read out of the literal name
    ``ALL_ATTENTION_FUNCTIONS``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    variables = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        read = node.value.func if isinstance(node.value, ast.Call) else node.value
        if not isinstance(read, (ast.Attribute, ast.Subscript)):
            continue
        if getattr(read.value, "id", None) != "ALL_ATTENTION_FUNCTIONS":
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        variables |= {target.id for target in targets if isinstance(target, ast.Name)}
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in variables
    ]


def scale_of(call: ast.Call, module: nn.Module) -> Any:
    """The value of ``scaling=``, which must be a literal or an attribute of self."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "scaling"]
    if len(given) != 1:
        return None
    if isinstance(given[0], ast.Constant):
        return given[0].value
    if isinstance(given[0], ast.Attribute) and getattr(given[0].value, "id", None) == "self":
        return getattr(module, given[0].attr, None)
    return None


def unmet(folder: str) -> list[str]:
    """Names of the demands that a folder does not meet; [] if vLLM's backend can serve it."""
    config_file = json.loads(Path(folder, "config.json").read_text())
    failed = set()
    if "AutoModel" not in config_file.get("auto_map", {}):
        return ["auto_map.AutoModel"]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    config = model.config
    attentions = [layer.self_attn for layer in model.layers]
    for index, module in enumerate(attentions):
        calls = attention_calls(type(module).forward)
        if len(calls) != 1:
            failed.add("one attention call in forward")
            continue
        scale = scale_of(calls[0], module)
        if not isinstance(scale, float):
            failed.add("scaling is a literal or self.x")
        if not any(keyword.arg is None for keyword in calls[0].keywords):
            failed.add("kwargs reach the attention call")
        if module.layer_idx != index:
            failed.add("integer layer_idx")
    if not type(model)._supports_attention_backend:
        failed.add("_supports_attention_backend")
    if not linear_layers_are_only_called(model):
        failed.add("linear layers are only called")
    if not shapes_fit(model, len(attentions)):
        failed.add("head counts and widths of the config")
    if get_checkpoint_conversion_mapping(config.model_type):
        failed.add("no weight conversion")
    stored: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= set(tensors.keys())
    expected = {f"model.{name}" for name in model.state_dict()}
    if stored - {"lm_head.weight"} != expected:
        failed.add("names on disk are names of modules")
    modules = {name for name, _ in model.named_modules()}
    plan = config.base_model_tp_plan or {}
    if not plan or not {name.replace("*", "0") for name in plan} <= modules:
        failed.add("base_model_tp_plan")
    return sorted(failed)


class Opaque(nn.Module):
    """A linear layer of an engine: its weight may be packed, split or fused with others."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.call = linear.forward

    def forward(self, x: Any) -> Any:
        return self.call(x)


def linear_layers_are_only_called(model: nn.Module) -> bool:
    """Whether the model runs when nobody can read the weights of its linear layers."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, module in linear:
        model.set_submodule(name, Opaque(module))
    try:
        model(torch.tensor([[5, 9, 3]]), use_cache=False)
    except AttributeError:
        return False
    finally:
        for name, module in linear:
            model.set_submodule(name, module)
    return True


def shapes_fit(model: nn.Module, layers: int) -> bool:
    """Whether every layer makes one call with the head counts and widths that the config says."""
    config, seen = model.config, []

    def recording(
        module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        seen.append((query.shape, key.shape, value.shape))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("recording", recording)
    config._attn_implementation = "recording"
    model(torch.tensor([[5, 9, 3]]), use_cache=False)
    wanted = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return len(seen) == layers and all(
        tuple(shape[1] for shape in shapes) == wanted
        and shapes[0][-1] == shapes[1][-1] == config.head_dim >= shapes[2][-1]
        for shapes in seen
    )
