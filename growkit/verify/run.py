"""The comparison of two written checkpoint folders, from loading to verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from growkit.errors import UsageError, VerificationFailed
from growkit.progress import Progress, SilentProgress
from growkit.verify import inputs, layers, loading, memory
from growkit.verify.figures import LogitFigures
from growkit.verify.folder import Folder, dtype_name, open_folder
from growkit.verify.generation import compare_generation
from growkit.verify.layerwise import load_layerwise
from growkit.verify.options import COMPUTE_DTYPES, check_options, promised_exactness, widest_dtype
from growkit.verify.report import HalfPrecision, LayerDifference, VerificationReport
from growkit.verify.routing import same_choices
from growkit.verify.tolerance import tolerance as tolerance_rule
from growkit.verify.verdict import verdict
from growkit.verify.windows import comparison_windows


@dataclass
class _Run:
    """The two folders, their models and how they are run."""

    a: Folder
    b: Folder
    compute: torch.dtype
    layerwise: bool
    trust_remote_code: bool

    def load(self, folder: Folder, dtype: torch.dtype) -> Any:
        load = load_layerwise if self.layerwise else loading.load_model
        return load(folder, dtype, trust_remote_code=self.trust_remote_code)


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
        tolerance: overrides the rule of :mod:`growkit.verify.tolerance`, in logits.
        exactness: what the plan promises: ``bit-exact`` and ``exact`` are held to the compute
            dtype's tolerance, ``rounded`` also to the storage dtype's, ``not-exact`` to none.
            Default: what growkit.json of ``b`` says, else ``exact``.
        layerwise: ``on`` reads one decoder layer at a time; ``auto`` does so when both models
            would need more than 60 % of the available memory.
        generate_tokens: greedy tokens to compare with and without a KV cache; 0 for none. Layer
            by layer there is no generation, since every token would read both folders again.
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
    progress = progress or SilentProgress()
    folder_a, folder_b = open_folder(a), open_folder(b)
    notes: list[str] = []
    exactness = exactness or promised_exactness(folder_b, notes)
    compute = COMPUTE_DTYPES[compute_dtype] or widest_dtype(folder_a, folder_b)
    by_layer = layerwise == "on" or (
        layerwise == "auto" and not memory.both_fit(folder_a, folder_b, compute)
    )
    run = _Run(folder_a, folder_b, compute, by_layer, trust_remote_code)

    progress.describe("load")
    model_a = run.load(folder_a, compute)
    model_b = run.load(folder_b, compute)
    vocab_size = _common_vocabulary(model_a, model_b)
    windows, tokenizer = comparison_windows(
        text,
        [
            loading.load_tokenizer(folder, trust_remote_code=trust_remote_code)
            for folder in (folder_a, folder_b)
        ],
        tokens=tokens,
        window=window,
        vocab_size=vocab_size,
        notes=notes,
    )
    batches = list(windows.split(len(windows) if by_layer else batch_size))
    progress.advance(20)

    progress.describe("compare logits")
    figures, rounding = LogitFigures(), exactness == "rounded"
    choices = partial(
        same_choices, model_a, model_b, folder_b, compute=compute, storage_rounding=rounding
    )
    with choices() as ties:
        for ids in batches:
            logits_a = _logits(model_a, ids, folder_a, batches)
            logits_b = _logits(model_b, ids, folder_b, batches)
            figures.add(logits_a, logits_b, inputs.predicted_ids(model_a, ids))
            progress.advance(40 / len(batches))
    notes.extend([ties.note] if ties.note else [])

    depth = max(inputs.depth(model_a), inputs.depth(model_b))
    allowed = tolerance
    if allowed is None:
        allowed = tolerance_rule(
            figures.logit_rms,
            depth,
            compute,
            storage=folder_b.storage_dtype,
            storage_rounding=rounding,
        )

    progress.describe("generate")
    generation = None
    if by_layer:
        notes.append("generation not compared: layer by layer, every token would read it all again")
    elif generate_tokens:
        prompt = windows[:1, : min(32, windows.shape[1])]
        generation = compare_generation(model_a, model_b, prompt, generate_tokens, allowed)
    progress.advance(15)

    same = figures.max_difference <= allowed and (generation is None or generation.explained)
    compared: list[LayerDifference] = []
    if all_layers or (exactness != "not-exact" and not same):
        progress.describe("compare layers")
        with choices():
            compared, note = layers.compare_layers(
                model_a,
                model_b,
                batches,
                folder_b,
                compute=compute,
                storage=folder_b.storage_dtype,
                storage_rounding=rounding,
            )
        notes.extend([note] if note else [])
    progress.advance(10)
    names = (type(model_a).__name__, type(model_b).__name__)
    if names[0] != names[1]:
        notes.append(f"model classes differ: {names[0]} and {names[1]}")
    depths = (inputs.depth(model_a), inputs.depth(model_b))
    del model_a, model_b

    progress.describe("16-bit compute")
    half = _half_precision(run, batches[0], notes)
    progress.advance(15)

    passed, cause = verdict(exactness, figures, allowed, generation, compared)
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
        tokenizer=tokenizer,
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
    )


def _common_vocabulary(model_a: Any, model_b: Any) -> int:
    size_a, size_b = (
        int(model.config.get_text_config(decoder=True).vocab_size) for model in (model_a, model_b)
    )
    if size_a != size_b:
        raise UsageError(
            f"The vocabularies differ: {size_a} and {size_b} tokens.",
            "Only checkpoints with the same vocabulary can be compared.",
        )
    return size_a


def _logits(
    model: Any, ids: torch.Tensor, folder: Folder, batches: list[torch.Tensor]
) -> torch.Tensor:
    """Logits ``[batch, length, vocab]``.

    Raises:
        VerificationFailed: some are NaN or infinite.
    """
    logits: torch.Tensor = model(**inputs.arguments(model, ids)).logits
    wrong = int((~torch.isfinite(logits)).sum())
    if wrong:
        layer = layers.first_non_finite(model, batches)
        where = f", from {layer} on" if layer else ""
        raise VerificationFailed(
            f"{wrong} of {logits.numel()} logits of {folder.name} are not finite{where}.",
            "Its weights hold NaN or infinity, or overflow in this compute dtype.",
        )
    return logits


def _half_precision(run: _Run, ids: torch.Tensor, notes: list[str]) -> HalfPrecision | None:
    """What computing in the checkpoint's own 16-bit dtype does, on the first batch."""
    half = run.b.storage_dtype
    if half.itemsize != 2 or half == run.compute:
        return None
    if run.layerwise:
        notes.append(f"effect of {dtype_name(half)} compute not measured layer by layer")
        return None
    logits = []
    for folder, dtype in ((run.a, run.compute), (run.a, half), (run.b, half)):
        model = run.load(folder, dtype)
        logits.append(model(**inputs.arguments(model, ids)).logits.double())
    exact, half_a, half_b = logits
    effect = HalfPrecision(
        dtype=dtype_name(half),
        max_difference=float((half_a - half_b).abs().max()),
        noise_floor=float((exact - half_a).abs().max()),
    )
    if not (math.isfinite(effect.max_difference) and math.isfinite(effect.noise_floor)):
        notes.append(f"logits overflow in {dtype_name(half)} compute")
        return None
    return effect
