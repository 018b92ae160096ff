"""Experts chosen by a hair: where two models round differently, a router may choose another expert.

Top-k routing jumps: when the k-th and the next router logit are closer than rounding, models that
are equal in real arithmetic choose different experts, and their logits differ by far more than
rounding. With many experts, layers and tokens that happens. So the comparison decides such a tie in
B as A decided it. A choice that is no tie stays B's own: a wrong router still shows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from growkit.verification.layers import layer_stacks
from growkit.verification.tolerance import tolerance
from growkit.verification.written_folder import Folder

Allowed = Callable[[float], float]  # root mean square of router logits -> gap that is a tie


@dataclass
class Ties:
    """What :func:`same_choices` did.

    Attributes:
        choices: (token, layer) pairs that were compared.
        settled: pairs in which B would have chosen other experts, within rounding.
        largest_gap: between the router logits of an expert that was put in and one left out.
    """

    choices: int = 0
    settled: int = 0
    largest_gap: float = 0.0
    _chosen: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """A sentence for the report; empty when nothing was a tie."""
        if not self.settled:
            return ""
        return (
            f"{self.settled} of {self.choices} choices of experts are ties within rounding (router "
            f"logits at most {self.largest_gap:.2g} apart): decided in B as in A"
        )


@contextlib.contextmanager
def same_choices(
    model_a: Any,
    model_b: Any,
    b: Folder,
    *,
    compute: torch.dtype,
    storage_rounding: bool,
) -> Iterator[Ties]:
    """While open, every forward pass of B follows one of A on the same tokens.

    The experts of B are those of A, copied ``r`` times one whole set after the other, and B chooses
    ``r`` times as many; otherwise nothing is done (as without experts in A).
    """
    ties, handles = Ties(), []
    routers_a, routers_b = routers(model_a), routers(model_b)
    for layer, router in routers_a.items():
        handles.append(router.register_forward_hook(_recorder(ties, layer)))
    for layer, source in _sources(b, model_a, model_b).items():
        if source in routers_a and layer in routers_b:

            def allowed(rms: float, depth: int = layer + 1) -> float:
                return tolerance(
                    rms,
                    depth,
                    compute,
                    storage=b.storage_dtype,
                    storage_rounding=storage_rounding,
                )

            hook = _decider(ties, source, allowed)
            handles.append(routers_b[layer].register_forward_hook(hook))
    try:
        yield ties
    finally:
        for handle in handles:
            handle.remove()


def routers(model: Any) -> dict[int, nn.Module]:
    """Layer -> its router, of models whose routers return (logits, weights, experts)."""
    found = {}
    for layer, block in enumerate(layer_stacks(model).get("", ())):
        for module in block.modules():
            if type(module).__name__.endswith("TopKRouter"):
                found[layer] = module
    return found


def _sources(b: Folder, model_a: Any, model_b: Any) -> dict[int, int]:
    """Layer of B -> the layer of A that it is."""
    count_a, count_b = (len(layer_stacks(m).get("", ())) for m in (model_a, model_b))
    sources = b.plan.get("layer_sources")
    if isinstance(sources, list) and len(sources) == count_b:
        return {
            layer: entry["source"]
            for layer, entry in enumerate(sources)
            if entry.get("kind") in ("kept", "copy")
        }
    return {i: i for i in range(count_b)} if count_a == count_b else {}


def _recorder(ties: Ties, layer: int) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        logits, _, experts = output
        ties._chosen[layer] = (experts, logits.shape[-1])

    return record


def _decider(ties: Ties, source: int, allowed: Allowed) -> Any:
    def decide(module: nn.Module, args: Any, output: Any) -> Any:
        if source not in ties._chosen:
            return None
        chosen, count = ties._chosen[source]
        return _settled(ties, module, output, chosen, count, allowed)

    return decide


def _settled(
    ties: Ties, module: nn.Module, output: Any, chosen: Tensor, count: int, allowed: Allowed
) -> Any:
    """What a router says, ties decided as ``chosen`` [tokens, experts per token] among ``count``
    experts says; None where nothing is a tie."""
    logits, weights, experts = output
    copies, uneven = divmod(logits.shape[-1], count)
    if uneven or len(chosen) != len(experts) or experts.shape[-1] != chosen.shape[-1] * copies:
        return None
    wanted = torch.zeros(len(chosen), count, dtype=torch.bool, device=chosen.device)
    wanted = wanted.scatter(1, chosen, True).repeat(1, copies)
    own = torch.zeros_like(wanted).scatter(1, experts, True)
    gap = logits.masked_fill(wanted, -torch.inf).amax(-1) - logits.masked_fill(
        ~wanted, torch.inf
    ).amin(-1)
    rms = float(logits.double().square().mean().sqrt())
    settled = (wanted != own).any(-1) & (gap <= allowed(rms))
    ties.choices += len(chosen)
    if not bool(settled.any()):
        return None
    ties.settled += int(settled.sum())
    ties.largest_gap = max(ties.largest_gap, float(gap[settled].max()))
    others = logits.masked_fill(~wanted, -torch.inf).topk(experts.shape[-1]).indices
    new = torch.softmax(logits.float(), -1).gather(1, others)
    if getattr(module, "norm_topk_prob", True):  # Mixtral always does
        new = new / new.sum(-1, keepdim=True)
    place = settled[:, None]
    return (
        logits,
        torch.where(place, new.to(weights.dtype), weights),
        torch.where(place, others, experts),
    )


class RepeatedChoices:
    """Experts that a model chose for the tokens of a text, for later passes over the same tokens.

    Passes over one row of tokens are recorded one behind the other, until ``following`` says with
    which token of the record the next pass begins; ties are then decided as in the record.
    """

    def __init__(self, model: Any, compute: torch.dtype | None) -> None:
        """``compute`` says what a tie is; None: every choice of the record holds."""
        self.following: int | None = None
        self._model, self._compute, self._ties = model, compute, Ties()

    def forget(self) -> None:
        """Begin a new record."""
        self.following = None
        self._ties._chosen.clear()

    @contextlib.contextmanager
    def watched(self, model: Any = None) -> Iterator[RepeatedChoices]:
        """Record and follow while open; in another model of the same layers, if one is given."""
        handles = []
        for layer, router in routers(model or self._model).items():

            def allowed(rms: float, depth: int = layer + 1) -> float:
                return tolerance(rms, depth, self._compute) if self._compute else math.inf

            handles.append(router.register_forward_hook(self._hook(layer, allowed)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int, allowed: Allowed) -> Any:
        chosen = self._ties._chosen

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            logits, _, experts = output
            if self.following is None:
                before = [chosen[layer][0]] if layer in chosen else []
                chosen[layer] = (torch.cat([*before, experts]), logits.shape[-1])
                return None
            whole, count = chosen[layer]
            part = whole[self.following : self.following + len(experts)]
            return _settled(self._ties, module, output, part, count, allowed)

        return hook
