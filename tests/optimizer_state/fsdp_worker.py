"""One of two ranks: FSDP2 over two gloo processes, saved by accelerate and by plain DCP.

argv: checkpoint folder, output folder, [grown folder whose state is loaded into sharded parameters]
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import save_fsdp_optimizer
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from growkit.optimizer_state.load import load_into
from growkit.optimizer_state.store import FOLDER, read_store
from growkit.verification.loading import register_own_models

dist.init_process_group("gloo")
PartialState(cpu=True)
register_own_models()


def sharded(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


source, out = sys.argv[1], Path(sys.argv[2])
model = sharded(source)
matrices = [p for p in model.parameters() if p.ndim > 1]
vectors = [p for p in model.parameters() if p.ndim < 2]
optimizer = torch.optim.AdamW(
    [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.98)
)
generator = torch.Generator().manual_seed(dist.get_rank())
for _ in range(3):
    ids = torch.randint(256, (2, 8), generator=generator)
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()

accelerator = SimpleNamespace(process_index=dist.get_rank())
for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(out / kind))
both = {
    "model": get_model_state_dict(model),
    "optim": get_optimizer_state_dict(model, optimizer),
}
dcp.save(both, checkpoint_id=out / "PLAIN")
dcp.save({"model": both["model"]}, checkpoint_id=out / "WEIGHTS" / "pytorch_model_fsdp_0")

options = StateDictOptions(full_state_dict=True, cpu_offload=True)
whole = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
loaded: dict[str, Any] = {}
if len(sys.argv) > 3:
    grown = sharded(sys.argv[3])
    fresh = torch.optim.AdamW(grown.parameters(), lr=1e-2)
    result = load_into(fresh, grown, read_store(Path(sys.argv[3]) / FOLDER))
    assert not result.fresh and not result.unused
    loaded = get_optimizer_state_dict(grown, fresh, options=options).get("state", {})
    part = next(iter(fresh.state.values()))["exp_avg"]
    assert part.to_local().numel() < part.numel()
    fresh.step()
if dist.get_rank() == 0:
    torch.save({"whole": whole, "loaded": loaded}, out / "found.pt")
dist.barrier()
dist.destroy_process_group()
