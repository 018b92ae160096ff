"""The learning rate of a step as a factor of ``training.learning_rate``; no torch.

Every schedule begins with a linear warm-up from 0 over ``warmup_steps``, and counts steps from 0
(the factor of the first step is that of step 0). They are those of transformers
(``get_scheduler``; the tests compare them), and WSD with restarts besides:

* ``constant``;
* ``cosine``: half a cosine from 1 to ``min_learning_rate_ratio`` (SGDR, arXiv:1608.03983);
* ``wsd``: warm-up, stable, decay (MiniCPM, arXiv:2404.06395). With ``restarts``, a decay ends at
  each of them, and the rate rises to the peak again over ``restart_warmup_steps`` (WSD-S,
  arXiv:2410.05192): one run, with a decayed model to compare at every restart;
* ``inverse_sqrt``: ``sqrt(t0 / (t0 + t))`` after the warm-up, with t0 its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from growkit.training.recipe import Recipe

INVERSE_SQRT_TIMESCALE = 10_000


def ramp(step: int, steps: int) -> float:
    """Linear from 0 at step 0 to 1 at ``steps``; 1 where there is no warm-up."""
    return min(step / steps, 1.0) if steps else 1.0


def _decayed(kind: str, progress: float, floor: float) -> float:
    """From 1 to ``floor`` while ``progress`` goes from 0 to 1."""
    curve = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "1-sqrt": 1.0 - math.sqrt(progress),
    }[kind]
    return floor + (1.0 - floor) * curve


def cycles(recipe: Recipe) -> list[tuple[int, int, int, int]]:
    """The WSD cycles of a run as (first step, end, warm-up steps, decay steps)."""
    section = recipe.training
    edges = [0, *(recipe.steps(step) for step in section.restarts), recipe.total_steps]
    decay = recipe.steps(section.decay_steps)
    warmups = [section.warmup_steps, *[section.restart_warmup_steps] * len(section.restarts)]
    return [
        (first, end, recipe.steps(warmup), decay)
        for (first, end), warmup in zip(pairwise(edges), warmups, strict=True)
    ]


def learning_rate_factor(recipe: Recipe) -> Callable[[int], float]:
    """The factor as a function of the number of optimizer steps already taken.

    A stage counts its own steps: they continue with the schedule of the whole run, which a stage
    may warm up once more.
    """
    section, total = recipe.training, recipe.total_steps
    warmup, floor = recipe.steps(section.warmup_steps), section.min_learning_rate_ratio

    parts = cycles(recipe)

    def wsd(step: int) -> float:
        first, end, rise, decay = next((part for part in parts if step < part[1]), parts[-1])
        if step < first + rise:
            return floor + (1.0 - floor) * ramp(step - first, rise)
        start = end - decay
        if step < start:
            return 1.0
        if step >= end:
            return floor
        return _decayed(section.decay_type, (step - start) / decay, floor)

    def factor(step: int) -> float:
        if section.schedule == "wsd":
            return wsd(step)
        if step < warmup:
            return ramp(step, warmup)
        if section.schedule == "inverse_sqrt":
            timescale = warmup or INVERSE_SQRT_TIMESCALE
            return 1.0 / math.sqrt((step - warmup + timescale) / timescale)
        if section.schedule == "cosine":
            progress = (step - warmup) / max(1, total - warmup)
            return max(0.0, _decayed("cosine", progress, floor))
        return 1.0

    first = recipe.first_step
    rewarmup = recipe.position.warmup_steps if recipe.position is not None else 0

    def of_stage(step: int) -> float:
        # The first step after a growth moves already, as in the rates of new slots.
        rise = ramp(step + 1, rewarmup + 1) if rewarmup else 1.0
        return rise * factor(first + step)

    return of_stage if recipe.position is not None else factor
