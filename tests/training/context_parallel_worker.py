"""One of two ranks: what the check before the first step says of each model, and its gradients."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import growkit.modeling  # noqa: F401  (registers our model types)
from growkit.core.errors import GrowkitError
from growkit.training.parallel.context_parallel import ContextCheck, SplitSequences
from growkit.training.parallel.processes import Processes

folder = Path(sys.argv[1])
# Documents that end inside of the first stretch, on the border, and inside of the second.
LENGTHS = ([7, 13, 12], [16, 3, 13])


def build(values: dict[str, Any]) -> Any:
    values = {"vocab_size": 64, "initializer_range": 0.3, **values}
    kernel = values.pop("attn_implementation", "sdpa")
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=kernel)


def gradients(model: Any, batch: dict[str, torch.Tensor], **more: Any) -> list[torch.Tensor]:
    output = model(**batch, **more, use_cache=False)
    used = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(output.loss, used, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(used, found, strict=True)]


def error_of_gradients(model: Any, split: SplitSequences) -> float:
    """Largest difference of a gradient, over the largest gradient; of joined and of separate."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    ids = (positions * 5 + torch.arange(positions.shape[1]) // 3) % 61
    errors = []
    for batch in ({"input_ids": ids, "labels": ids},
                  {"input_ids": ids, "labels": ids, "position_ids": positions}):  # fmt: skip
        expected = gradients(model, batch)
        with split.applied(model, batch) as own:
            found = gradients(model, own, num_items_in_batch=ids.numel() - len(LENGTHS))
        for gradient in found:
            dist.all_reduce(gradient)
        largest = max(float(gradient.abs().max()) for gradient in expected)
        pairs = zip(found, expected, strict=True)
        errors += [float((f - e).abs().max()) / largest for f, e in pairs]
    return max(errors)


dist.init_process_group("gloo", timeout=timedelta(minutes=3))
group = dist.group.WORLD
processes = Processes(dist.get_rank(), 2, (group, group, group), context=2)
split = SplitSequences(processes)
result: dict[str, Any] = {}
for name, values in json.loads((folder / "models.json").read_text()).items():
    model = build(values)
    check = ContextCheck(split, processes, 64, lambda: None)
    try:
        check.on_train_begin(SimpleNamespace(bf16=False), None, None, model=model)
        result[name] = error_of_gradients(model.train(), split)
    except GrowkitError as error:
        result[name] = f"{error.exit_code}: {error}"
if dist.get_rank() == 0:
    (folder / "found.json").write_text(json.dumps(result))
dist.barrier()
dist.destroy_process_group()
