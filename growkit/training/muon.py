"""torch's Muon, with the Newton-Schulz iteration of equal matrices in one chain of products.

``torch.optim.Muon`` orthogonalises one matrix after the other. A transformer has dozens of the same
few shapes, and small ones leave a processor waiting for the next call: 24 matrices of 128 x 128
take a third of the time as one batch. The arithmetic is the same, in the same order; what might
round differently is the kernel that torch takes for a batch (on the CPU tried: the same bits).
Larger matrices are faster alone on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

# Entries of a matrix up to which a batch is faster than one after the other.
SMALL_ON_CPU = 3 << 14
# Entries of a batch: three such arrays of bfloat16 are alive at once.
BATCH = 1 << 26


class BatchedMuon(torch.optim.Muon):
    """Takes the arguments of ``torch.optim.Muon`` and has its state."""

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torch's; parameters that torch would treat in a way of their own are left to it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        alone: list[dict[str, Any]] = []
        for group in groups:
            shapes: dict[Any, list[Tensor]] = {}
            rest: list[Tensor] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["nesterov"] and _batches(parameter):
                    key = (parameter.shape, parameter.dtype, parameter.grad.dtype, parameter.device)
                    shapes.setdefault(key, []).append(parameter)
                else:
                    rest.append(parameter)
            for same in shapes.values():
                size = max(1, BATCH // same[0].numel())
                for first in range(0, len(same), size):
                    part = same[first : first + size]
                    if len(part) > 1:
                        self._together(group, part)
                    else:
                        rest += part
            if rest:
                alone.append({**group, "params": rest})
        if alone:
            self.param_groups = alone
            try:
                super().step()
            finally:
                self.param_groups = groups
        return loss

    def _together(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """One step of parameters of one shape."""
        rate, momentum = float(group["lr"]), group["momentum"]
        updates = []
        for parameter in parameters:
            gradient = cast(Tensor, parameter.grad)
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(
                    gradient, memory_format=torch.preserve_format
                )
            buffer = state["momentum_buffer"]
            buffer.lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(buffer, momentum))
        settings = (group["ns_coefficients"], group["ns_steps"], group["eps"])
        whole = orthogonalised(torch.stack(updates), *settings)
        rows, columns = parameters[0].shape
        ratio = 1.0
        if group["adjust_lr_fn"] in (None, "original"):
            ratio = max(1, rows / columns) ** 0.5
        elif group["adjust_lr_fn"] == "match_rms_adamw":
            ratio = 0.2 * max(rows, columns) ** 0.5
        for parameter, update in zip(parameters, whole, strict=True):
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.add_(update, alpha=-rate * ratio)


def _batches(parameter: Tensor) -> bool:
    """A plain matrix of a size that gains from company; sharded ones are not plain."""
    plain = type(parameter) in (Tensor, torch.nn.Parameter) and type(parameter.grad) is Tensor
    small = parameter.device.type != "cpu" or parameter.numel() <= SMALL_ON_CPU
    return plain and parameter.ndim == 2 and small and not parameter.is_complex()


def orthogonalised(
    updates: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Newton-Schulz of ``updates`` [matrices, rows, columns], each by itself; bfloat16."""
    a, b, c = coefficients
    tall = updates.shape[1] > updates.shape[2]
    x = updates.bfloat16()
    if tall:
        x = x.mT
    norms = torch.stack([matrix.norm() for matrix in x])
    x = x / norms.clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x
