"""The comparison of two written checkpoint folders, from loading to verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from growkit.core.progress import Progress, SilentProgress
from growkit.verification import affordable as memory
from growkit.verification import loading
from growkit.verification import model_inputs as inputs
from growkit.verification.caches import compare_caches, generate
from growkit.verification.long_window import plan_reach
from growkit.verification.own_faults import notes_of
from growkit.verification.pair import Pair, common_vocabulary
from growkit.verification.report import CachedSteps, LayerDifference, VerificationReport
from growkit.verification.shared_layers import SharedLayers
from growkit.verification.steps import (
    compare_long,
    compare_residuals,
    compare_sight,
    compare_stored,
    compare_towers,
    compare_windows,
    half_precision,
    layer_batches,
    ordinary_window,
)
from growkit.verification.verdict import (
    COMPUTE_DTYPES,
    Outcome,
    check_long_window,
    check_options,
    promised_exactness,
    verdict,
    widest_dtype,
)
from growkit.verification.windows import comparison_windows, one_window
from growkit.verification.written_folder import dtype_name, open_folder


@torch.inference_mode()
def verify_checkpoints(
    a: Path,
    b: Path,
    *,
    text: str | None = None,
    tokens: int = 512,
    window: int = 128,
    batch_size: int = 1,
    compute_dtype: str = "auto",
    tolerance: float | None = None,
    exactness: str | None = None,
    layerwise: str = "auto",
    generate_tokens: int = 16,
    all_layers: bool = False,
    long_window: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> VerificationReport:
    """Compare two written folders, loaded through transformers alone, on real text.

    An encoder-decoder reads half of each window and is given the other half to predict.

    Args:
        a: the folder that is taken to be right.
        b: the folder that must compute the same.
        text: what to compare on; the built-in English sample by default.
        tokens: about how many tokens, in windows of ``window`` spread evenly over the text.
        batch_size: windows that run at once (layer by layer: all of them).
        compute_dtype: ``auto`` is float32, and float64 for float64 checkpoints.
        tolerance: overrides the rule of :mod:`growkit.verification.tolerance`, in logits.
        exactness: what the plan promises: ``bit-exact`` and ``exact`` are held to the compute
            dtype's tolerance, ``rounded`` also to the storage dtype's, ``not-exact`` to none.
            Default: what growkit.json of ``b`` says, else ``exact``.
        layerwise: ``on`` reads one decoder layer at a time; ``auto`` does so when both models
            would need more than 60 % of the available memory.
        generate_tokens: greedy tokens to compare with and without a KV cache; 0 for none, and then
            no cache is compared at all. Layer by layer there is neither, since every token would
            read both folders again.
        long_window: tokens of one further window; 0 for none. By default it is longer than every
            sliding window, attention chunk and rotary scaling of the two configs, where the
            ordinary windows are not and :mod:`growkit.verification.affordable` allows it.
        all_layers: compare every layer even when the logits agree.
        trust_remote_code: run model code that a folder brings along.
        progress: receives percent done.

    Returns:
        The report. A difference above the tolerance gives ``passed`` False, not an exception.

    Raises:
        UsageError: not a checkpoint folder, different vocabularies, a bad option or text.
        CheckpointError: a folder that transformers cannot load.
        VerificationFailed: tensors that are missing or not expected, logits that are not finite,
            a model that cannot generate.
    """
    check_options(tokens, window, batch_size, compute_dtype, tolerance, layerwise, exactness)
    check_long_window(long_window)
    progress = progress or SilentProgress()
    folder_a, folder_b = open_folder(a), open_folder(b)
    notes: list[str] = []
    exactness = exactness or promised_exactness(folder_b, notes)
    compute = COMPUTE_DTYPES[compute_dtype] or widest_dtype(folder_a, folder_b)
    by_layer = layerwise == "on" or (
        layerwise == "auto" and not memory.both_fit(folder_a, folder_b, compute)
    )
    pair = Pair(
        folder_a,
        folder_b,
        compute,
        by_layer,
        trust_remote_code,
        exactness == "rounded",
        exactness != "not-exact",
        given=tolerance,
        notes=notes,
    )

    progress.describe("load")
    pair.load_both()
    part = folder_b.manifest.get("request", {}).get("part")
    if part not in (None, "text"):
        notes.append(compare_towers(pair, part))
    elif seen := compare_sight(pair):
        notes.append(seen)
    tokenizers = loading.load_tokenizers(folder_a, folder_b, trust_remote_code=trust_remote_code)
    vocab_size = common_vocabulary(pair)
    if pair.view is not None:
        pair.view.start((pair.model_a, pair.model_b), tokenizers, text, tokens, window)
    windows, source = comparison_windows(
        text,
        tokenizers if pair.view is None else tokenizers[:1],
        tokens=tokens,
        window=ordinary_window(pair, window),
        vocab_size=vocab_size,
        notes=notes,
        only=(lambda encode: encode) if pair.view is None else pair.view.encoder,
    )
    pair.sample = windows.split(len(windows) if by_layer else batch_size)
    if not by_layer and (len(pair.sample) > 1 or generate_tokens):
        pair.shared = SharedLayers((pair.model_a, pair.model_b))
    progress.advance(20)

    if not inputs.reads_tokens(pair.model_a):
        notes.append(f"{inputs.main_input(pair.model_a)} of noise, made from the text's bytes")
    progress.describe("compare logits")
    figures = compare_windows(pair, lambda: progress.advance(25 / len(pair.sample)))
    reach = plan_reach(pair, windows.shape[1], long_window)
    notes.extend([reach.note] if reach.note else [])
    long_ids = one_window(source.text, source.encode, reach.tokens) if reach.tokens else None
    long, whole = compare_long(pair, long_ids, reach)
    progress.advance(10)

    progress.describe("compare rows")
    rows, config = compare_stored(pair, windows, judged=not reach.whole)
    progress.advance(5)

    progress.describe("decode")
    cached: tuple[CachedSteps, ...] = ()
    generation = None
    if by_layer:
        notes.append(
            "caches and generation not compared: layer by layer, every token would read it all "
            "again"
        )
    elif not inputs.can_generate(pair.model_a):
        notes.append(f"{inputs.described(pair.model_a)}: no next token, so no perplexity, no cache")
    elif generate_tokens:
        cached = compare_caches(pair, windows, long_ids if reach.with_cache else None, whole, reach)
        del whole
        generation = generate(pair, windows, generate_tokens, pair.allowed(figures.logit_rms))
        notes.extend(notes_of(pair, cached, generation))
    progress.advance(15)

    rule = pair.allowed(figures.logit_rms)
    exceeds = figures.max_difference > rule or (long is not None and not long.within)
    amplification = 1.0
    if exactness != "not-exact" and exceeds:
        amplification = pair.amplification("a")
        long = long and replace(long, tolerance=long.tolerance * amplification)
    allowed = rule * amplification
    outcome = Outcome(exactness, figures, allowed, long, rows, config, cached, generation)
    compared: list[LayerDifference] = []
    if all_layers or (exactness != "not-exact" and not outcome.same_logits):
        progress.describe("compare layers")
        where = layer_batches(pair, long_ids, figures.max_difference <= allowed, notes)
        compared = compare_residuals(pair, where, amplification)
    progress.advance(10)
    names = (type(pair.model_a).__name__, type(pair.model_b).__name__)
    if names[0] != names[1]:
        notes.append(f"model classes differ: {names[0]} and {names[1]}")
    output = "" if inputs.can_generate(pair.model_a) else inputs.described(pair.model_a)
    depths = (inputs.depth(pair.model_a), inputs.depth(pair.model_b))
    shared = len(pair.shared.proven)
    pair.model_a = pair.model_b = None
    pair.shared = SharedLayers()

    progress.describe("16-bit compute")
    half = half_precision(pair, pair.sample[0])
    progress.advance(15)

    passed, cause = verdict(outcome, compared, names)
    first = next((entry for entry in compared if not entry.within), None)
    return VerificationReport(
        passed=passed,
        cause=cause,
        a=folder_a.name,
        b=folder_b.name,
        exactness=exactness,
        tokens=windows.numel(),
        windows=len(windows),
        text="built-in sample" if text is None else "given text",
        tokenizer=source.name,
        storage_dtype_a=dtype_name(folder_a.storage_dtype),
        storage_dtype_b=dtype_name(folder_b.storage_dtype),
        compute_dtype=dtype_name(compute),
        layers_a=depths[0],
        layers_b=depths[1],
        layerwise=by_layer,
        tolerance=allowed,
        logit_rms=figures.logit_rms,
        logit_max=figures.logit_max,
        max_difference=figures.max_difference,
        mean_difference=figures.mean_difference,
        kl_mean=figures.kl_mean,
        kl_max=figures.kl_max,
        top1_agreement=figures.top1_agreement,
        perplexity_a=figures.perplexity_a,
        perplexity_b=figures.perplexity_b,
        generation=generation,
        half_precision=half,
        first_differing_layer=None if first is None else first.layer,
        layers=tuple(compared),
        notes=tuple(notes),
        window=windows.shape[1],
        verified_length=reach.verified,
        long_window=long,
        rows=rows,
        config=config,
        cached=cached,
        amplification=amplification,
        shared_layers=shared,
        output=output,
        vocabulary=None if pair.view is None else pair.view.figures(),
    )
