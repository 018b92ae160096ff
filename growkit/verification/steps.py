"""The parts of a comparison: ordinary windows, the long one, stored rows, caches, layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import GrowkitError, VerificationFailed
from growkit.diff.recorded_plan import recorded_plan
from growkit.families.towers import tower_field
from growkit.verification import layers
from growkit.verification import model_inputs as inputs
from growkit.verification.logit_figures import LogitFigures
from growkit.verification.long_window import TAIL, Reach, position_limit, tail_logits
from growkit.verification.pair import Pair
from growkit.verification.report import (
    ConfigFields,
    HalfPrecision,
    LayerDifference,
    LongWindow,
    TableRows,
)
from growkit.verification.routing import RepeatedChoices, Ties, same_choices
from growkit.verification.sight import close_eyes, find_sight, open_eyes
from growkit.verification.stored_values import compare_configs, rows_by_plan, rows_of_a
from growkit.verification.written_folder import dtype_name

Whole = dict[str, tuple[torch.Tensor, RepeatedChoices]]
KEPT_BYTES = 1 << 28  # logits that are kept for what else is held to them
LAYER_BYTES = 1 << 30  # residual streams of a long window that are worth keeping to name a layer


def ordinary_window(pair: Pair, window: int) -> int:
    """The window, cut to the positions that both models have (halves, of an encoder-decoder)."""
    halves = 2 if inputs.is_encoder_decoder(pair.model_a) else 1
    if not inputs.has_vocabulary(pair.model_a):
        return min(window, 32)  # as many numbers make the noise of one input
    limits = [position_limit(model) for model in (pair.model_a, pair.model_b)]
    return min([window, *(halves * limit for limit in limits if limit is not None)])


def compare_windows(pair: Pair, advance: Callable[[], None]) -> LogitFigures:
    """Logits of A and B on the ordinary windows."""
    figures = LogitFigures()
    with _choices(pair) as ties:
        for ids in pair.sample:
            with pair.shared.pass_of("a", first=True):
                logits_a = pair.logits("a", ids)
            with pair.shared.pass_of("b", first=False):
                logits_b = pair.logits("b", ids)
            if not figures.positions and logits_a.nbytes <= KEPT_BYTES:
                pair.first = {"a": logits_a, "b": logits_b}
            follows = inputs.can_generate(pair.model_a)
            predicted = inputs.predicted_ids(pair.model_a, ids) if follows else None
            figures.add(logits_a, logits_b, predicted)
            advance()
    pair.notes.extend([ties.note] if ties.note else [])
    return figures


def compare_long(
    pair: Pair, ids: torch.Tensor | None, reach: Reach
) -> tuple[LongWindow | None, Whole]:
    """The last positions of the long window, and their logits for the caches to be held to."""
    if ids is None:
        return None, {}
    count = min(TAIL, inputs.predicted_ids(pair.model_a, ids).shape[1])
    with _choices(pair):
        whole = {folder: whole_pass(pair, folder, ids, count) for folder in ("a", "b")}
    logits_a, logits_b = whole["a"][0].double(), whole["b"][0].double()
    difference = torch.nan_to_num((logits_a - logits_b).abs(), nan=torch.inf)
    field = reach.boundary.field if reach.boundary else "--long-window"
    scale = float(logits_a.square().mean().sqrt())
    allowed = pair.allowed(scale)
    return LongWindow(reach.tokens, count, float(difference.max()), allowed, field), whole


def compare_towers(pair: Pair, part: str) -> str:
    """What the tower ``part`` of A and of B makes of the same noise, as a sentence.

    Raises:
        VerificationFailed: it differs by more than rounding, or the tower cannot be run alone.
    """
    field = tower_field(pair.b.config, part)
    towers = [inputs.tower_of(model, field) for model in (pair.model_a, pair.model_b)]
    if any(tower is None for tower in towers):
        raise VerificationFailed(
            f"The {part} tower of {pair.b.name} is no model of its own, so it cannot be compared.",
            "Grow the language model of this folder (--part text).",
        )
    ids = torch.arange(8).reshape(2, 4)
    pairs = ((pair.model_b, towers[1]), (pair.model_a, towers[0]))
    found, wanted = (inputs.features(model, tower, ids).double() for model, tower in pairs)
    if found.shape != wanted.shape:
        raise VerificationFailed(
            f"The {part} tower of {pair.b.name} makes features of shape {list(found.shape)}, that "
            f"of {pair.a.name} {list(wanted.shape)}.",
            "Grow another size of it.",
        )
    difference = float(torch.nan_to_num((found - wanted).abs(), nan=torch.inf).max())
    scale = float(wanted.square().mean().sqrt())
    allowed = pair.allowed(scale, inputs.depth(towers[1]))
    sentence = (
        f"{part} tower on noise: max |d| {difference:.3g} of features of size {scale:.3g} "
        f"(tolerance {allowed:.3g})"
    )
    if not difference <= allowed:
        raise VerificationFailed(
            f"{pair.b.name} computes another function than {pair.a.name}: {sentence}.",
            "Its weights are not what its plan says.",
        )
    return sentence


def compare_sight(pair: Pair) -> str:
    """The logits of A and B, multimodal models, on tokens beside noise for their towers, as a
    sentence; empty where no growth reached what the towers write.

    Raises:
        VerificationFailed: they differ by more than rounding, or nothing is accepted.
    """
    steps = pair.b.manifest.get("plan", {}).get("operators", ())
    reached = any(isinstance(step, dict) and step.get("operator") == "hidden" for step in steps)
    wraps = inputs.text_config(pair.model_a) is not pair.model_a.config
    # The text config of an encoder-decoder is its decoder's, which wraps nothing.
    if not (reached and wraps) or inputs.is_encoder_decoder(pair.model_a):
        return ""
    if pair.layerwise:
        return "no picture compared: layer by layer, towers are not run"
    ids = torch.arange(8, 32).reshape(2, 12)
    sight = find_sight(pair.model_a, ids)
    if sight is None:
        raise VerificationFailed(
            f"The towers of {pair.b.name} could not be run, and what they write has grown.",
            "No picture or sound that growkit can make is accepted by the class.",
        )
    for model in (pair.model_a, pair.model_b):
        open_eyes(model, sight)
    try:
        wanted, found = (pair.logits(folder, ids).double() for folder in ("a", "b"))
    finally:
        for model in (pair.model_a, pair.model_b):
            close_eyes(model)
    difference = float((found - wanted).abs().max())
    allowed = pair.allowed(float(wanted.square().mean().sqrt()), 2 * pair.depth)
    sentence = (
        f"{', '.join(sight.names)} of noise beside tokens: max |d logit| {difference:.3g} "
        f"(tolerance {allowed:.3g})"
    )
    if difference > allowed:
        raise VerificationFailed(
            f"{pair.b.name} computes another function than {pair.a.name}: {sentence}.",
            "Its weights are not what its plan says.",
        )
    return sentence


def compare_stored(
    pair: Pair, windows: torch.Tensor, *, judged: bool
) -> tuple[TableRows, ConfigFields]:
    """Rows of the vocabulary and config fields, by the plan that made B where there is one."""
    config_a, config_b = pair.model_a.config, pair.model_b.config
    vocab_size = 0
    if inputs.has_vocabulary(pair.model_a):
        vocab_size = int(inputs.text_config(pair.model_a).vocab_size)
    try:
        with open_checkpoint(pair.a.path) as a, open_checkpoint(pair.b.path) as b:
            plan = recorded_plan(a, b, pair.notes)
            rows = None if plan is None else rows_by_plan(plan, b, vocab_size)
    except GrowkitError:  # a family or a layout that growth does not know
        plan = rows = None
    if rows is None and not vocab_size:
        rows = TableRows("a", 0, 0)
    if rows is None:
        read = torch.unique(windows).tolist()
        rows = rows_of_a(pair.model_a, pair.model_b, read, vocab_size)
    config = compare_configs(pair.a, pair.b, config_a, config_b, plan)
    if config.against == "plan" or judged:
        pair.notes.extend(f"config.json: {sentence}" for sentence in config.differing)
    if judged and not config.against:
        pair.notes.append(
            "configs of two model types are not compared, and lengths beyond the longest window "
            "are not verified"
        )
    return rows, replace(config, judged=judged)


def layer_batches(
    pair: Pair, long: torch.Tensor | None, ordinary_agree: bool, notes: list[str]
) -> Sequence[torch.Tensor]:
    """The windows on which layers are compared: the long one where only that one differs."""
    if long is None or not ordinary_agree:
        return pair.sample
    hidden = int(inputs.text_config(pair.model_b).hidden_size)
    if 2 * long.numel() * hidden * (pair.depth + 1) * pair.compute.itemsize > LAYER_BYTES:
        notes.append("layers compared on the ordinary windows: the long one would fill the memory")
        return pair.sample
    return [long]


def compare_residuals(
    pair: Pair, batches: Sequence[torch.Tensor], amplification: float
) -> list[LayerDifference]:
    """The residual streams after every layer."""
    with _choices(pair):
        compared, note = layers.compare_layers(
            pair.model_a,
            pair.model_b,
            list(batches),
            pair.b,
            compute=pair.compute,
            storage=pair.b.storage_dtype,
            storage_rounding=pair.rounded,
            amplification=amplification,
        )
    pair.notes.extend([note] if note else [])
    return compared


def half_precision(pair: Pair, ids: torch.Tensor) -> HalfPrecision | None:
    """What computing in the checkpoint's own 16-bit dtype does, on the first batch."""
    half = pair.b.storage_dtype
    if half.itemsize != 2 or half == pair.compute:
        return None
    if pair.layerwise:
        pair.notes.append(f"effect of {dtype_name(half)} compute not measured layer by layer")
        return None
    passes = [(pair.a, half), (pair.b, half)]
    if "a" not in pair.first:
        passes.append((pair.a, pair.compute))
    logits = [inputs.outputs(pair.load(folder, dtype), ids).double() for folder, dtype in passes]
    half_a, half_b = logits[:2]
    exact = pair.first["a"].double() if "a" in pair.first else logits[2]
    effect = HalfPrecision(
        dtype=dtype_name(half),
        max_difference=float((half_a - half_b).abs().max()),
        noise_floor=float((exact - half_a).abs().max()),
    )
    if not (math.isfinite(effect.max_difference) and math.isfinite(effect.noise_floor)):
        pair.notes.append(f"logits overflow in {dtype_name(half)} compute")
        return None
    return effect


def _choices(pair: Pair) -> AbstractContextManager[Ties]:
    """Ties between experts, decided in B as in A."""
    return same_choices(
        pair.model_a,
        pair.model_b,
        pair.b,
        compute=pair.compute,
        storage_rounding=pair.rounded,
    )


def whole_pass(
    pair: Pair, folder: str, ids: torch.Tensor, count: int
) -> tuple[torch.Tensor, RepeatedChoices]:
    """Logits of the last positions without a cache, and the experts that were chosen."""
    model = pair.model(folder)
    choices = RepeatedChoices(model, pair.compute)
    with choices.watched():
        return tail_logits(model, ids, count), choices
