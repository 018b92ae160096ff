"""One of two ranks: loads a folder over both, compares with a stored one-process run."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import growkit.modeling  # noqa: F401  (registers our model types)

folder = sys.argv[1]
expected = torch.load(f"{folder}/expected.pt")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


dist.init_process_group("gloo", timeout=timedelta(minutes=3))  # transformers would wait two hours
model = AutoModelForCausalLM.from_pretrained(
    folder, distributed_config=DistributedConfig(tp_size=2)
)
out = model(expected["tokens"], labels=expected["tokens"])
out.loss.backward()
errors = {"logits": (whole(out.logits) - expected["logits"]).abs().max().item()}
for name, parameter in model.named_parameters():
    errors[name] = (whole(parameter.grad) - expected["gradients"][name]).abs().max().item()
torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
with torch.no_grad():
    errors["after a step"] = (
        (whole(model(expected["tokens"]).logits) - expected["after"]).abs().max().item()
    )
shards = {
    name: tuple(parameter.to_local().shape)
    for name, parameter in model.named_parameters()
    if hasattr(parameter, "to_local")
}
if dist.get_rank() == 0:
    torch.save({"errors": errors, "shards": shards}, f"{folder}/found.pt")
dist.barrier()
dist.destroy_process_group()
