"""The main job on the text that comes with growkit: train, grow, verify, train on, compare.

Folders, each whole or absent, so that a second call continues where the first one stopped::

    OUT/base/        a small GDA model, 3 signal heads to 1 noise head, trained from scratch
    OUT/grown/       its signal heads doubled (6 to 1), verified by grow itself
    OUT/continued/   base, trained on                  } the same tokens in the same order,
    OUT/grown-trained/  grown, trained on              } the same schedule, a fresh optimizer each
    OUT/loss.png, OUT/demo.json

A run this short shows that the loss continues without a jump. It does not show which model is
better: that takes more tokens, several seeds, and the same compute rather than the same tokens.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError, VerificationFailed
from growkit.core.json_files import read_json_object
from growkit.core.progress import Reporter, Silent
from growkit.training.metrics import draw_losses, read_metrics
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe

# Largest difference of held-out losses (nats per token) that float32 rounding explains.
JUMP = 1e-5
GROWTH = "x2"


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo. The defaults take about three minutes on two CPU cores."""

    steps: int = 300
    continue_steps: int = 150
    hidden_size: int = 128
    layers: int = 4
    sequence_length: int = 128
    batch_size: int = 8
    vocab_size: int = 1024
    eval_tokens: int = 16384
    seed: int = 0


@dataclass(frozen=True)
class DemoModel:
    """One row of the result. Losses in nats per held-out token."""

    name: str
    folder: Path
    parameters: int
    tokens: int
    loss_before_growth: float | None
    loss_at_start: float
    loss_at_end: float
    perplexity: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; ``jump`` is the loss of the grown model minus that of its source."""

    out: Path
    models: tuple[DemoModel, ...]
    jump: float
    verification: dict[str, Any]
    plot: Path | None
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return values


def base_recipe(settings: DemoSettings, cache: Path) -> Recipe:
    """From scratch, at a constant rate: what follows decays it."""
    warmup = min(20, settings.steps // 2)
    return _recipe(
        settings,
        cache,
        model={
            "config": {
                "model_type": "gda",
                "hidden_size": settings.hidden_size,
                "intermediate_size": 3 * settings.hidden_size,
                "num_hidden_layers": settings.layers,
                "num_attention_heads": 8,
                "num_noise_heads": 2,
                "num_key_value_heads": 4,
                "head_dim": 16,
                "noise_keys": "own",
                "sub_layer_norm": True,
                "max_position_embeddings": 4 * settings.sequence_length,
                "tie_word_embeddings": True,
                # transformers' 0.02 is made for wide models; this one learns faster so.
                "initializer_range": 0.06,
            }
        },
        tokenizer={"train_bpe": settings.vocab_size},
        training={"max_steps": settings.steps, "schedule": "constant", "warmup_steps": warmup},
    )


def continue_recipe(settings: DemoSettings, cache: Path, checkpoint: Path) -> Recipe:
    """Train on: short warm-up (the optimizer is new), then decay."""
    steps = settings.continue_steps
    return _recipe(
        settings,
        cache,
        model={"checkpoint": str(checkpoint)},
        tokenizer=None,
        training={
            "max_steps": steps,
            "schedule": "wsd",
            "warmup_steps": min(10, steps // 4),
            "decay_steps": steps // 2,
            # Another order than the base saw.
            "seed": settings.seed + 1,
        },
    )


def _recipe(
    settings: DemoSettings,
    cache: Path,
    *,
    model: dict[str, Any],
    tokenizer: dict[str, Any] | None,
    training: dict[str, Any],
) -> Recipe:
    every = max(training["max_steps"] // 10, 1)
    return make_recipe(
        {
            "model": model,
            **({} if tokenizer is None else {"tokenizer": tokenizer}),
            "data": {
                "files": "sample",
                "sequence_length": settings.sequence_length,
                "max_eval_tokens": settings.eval_tokens,
                "cache_dir": str(cache),
                **({"start": "beginning"} if "checkpoint" in model else {}),
            },
            "training": {
                "learning_rate": 4e-3,
                "per_device_train_batch_size": settings.batch_size,
                "logging_steps": max(every // 4, 1),
                "eval_steps": every,
                "save_steps": max(training["max_steps"] // 2, 1),
                "save_total_limit": 1,
                "use_cpu": True,
                "seed": settings.seed,
                **training,
            },
        },
        "the demo's recipe",
    )


def run_demo(
    out: Path,
    settings: DemoSettings | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> DemoResult:
    """Run what is not there yet, and compare.

    Raises:
        UsageError: ``out`` holds a demo of other settings, or something else.
        VerificationFailed: the grown model does not compute what its source does.
    """
    from growkit.training.run import TrainingResult, train

    settings, reporter, out = settings or DemoSettings(), reporter or Silent(), out.resolve()
    _claim(out, settings, overwrite)
    cache = out / "data"
    seconds: dict[str, float] = {}

    def run(step: str, name: str, recipe: Recipe) -> TrainingResult:
        reporter.note(step)
        result = train(recipe, out / name, overwrite=overwrite, reporter=reporter)
        seconds[name] = result.seconds
        return result

    base = run(
        f"1/4 Train a small GDA model from scratch, {settings.steps} steps",
        "base",
        base_recipe(settings, cache),
    )
    reporter.note(f"2/4 Grow its signal heads {GROWTH} and verify the written files")
    verification = _grow(base.out, out / "grown", overwrite, reporter)
    reporter.note(f"      {verification['summary']}")
    jump = _check_no_jump(base.out, out / "grown", continue_recipe(settings, cache, base.out))
    reporter.note(f"      held-out loss after growth minus before: {jump:+.1e}")
    steps = f"{settings.continue_steps} steps"
    continued = run(
        f"3/4 Train the ungrown model on, {steps}",
        "continued",
        continue_recipe(settings, cache, base.out),
    )
    grown = run(
        f"4/4 Train the grown model on, {steps}",
        "grown-trained",
        continue_recipe(settings, cache, out / "grown"),
    )

    rows = {r.out.name: read_metrics(r.metrics) for r in (base, continued, grown)}
    plotted = draw_losses(
        [
            ("before growth", rows["base"], 0),
            ("trained on without growth", rows["continued"], base.tokens),
            (f"signal heads {GROWTH}", rows["grown-trained"], base.tokens),
        ],
        out / "loss.png",
        reporter,
        title=f"Held-out loss before and after growing signal heads {GROWTH}",
        marks=[(base.tokens, "growth")],
    )
    models = tuple(
        DemoModel(
            name=name,
            folder=result.out,
            parameters=result.parameters,
            tokens=result.tokens + (0 if result is base else base.tokens),
            loss_before_growth=None if result is base else base.eval_loss,
            loss_at_start=rows[result.out.name][0]["eval_loss"],
            loss_at_end=_known(result.eval_loss),
            perplexity=_known(result.perplexity),
        )
        for name, result in (
            ("base", base),
            ("no growth, trained on", continued),
            (f"signal heads {GROWTH}, trained on", grown),
        )
    )
    found = DemoResult(
        out=out,
        models=models,
        jump=jump,
        verification=verification,
        plot=out / "loss.png" if plotted else None,
        seconds=seconds,
    )
    (out / "demo.json").write_text(
        json.dumps({"settings": asdict(settings), **found.to_dict()}, indent=2) + "\n"
    )
    return found


def _known(value: float | None) -> float:
    assert value is not None, "the demo always holds text out"
    return value


def _claim(out: Path, settings: DemoSettings, overwrite: bool) -> None:
    """Mark the folder as this demo's, or refuse it."""
    marker = out / "settings.json"
    wanted = asdict(settings)
    if marker.is_file():
        if read_json_object(marker) != wanted and not overwrite:
            raise UsageError(
                f"{str(out)!r} holds a demo with other settings.",
                "Choose another --out, or replace it with --overwrite.",
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{str(out)!r} exists and holds no demo.", "Choose another folder with --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(wanted, indent=2) + "\n")


def _grow(source: Path, target: Path, overwrite: bool, reporter: Reporter) -> dict[str, Any]:
    """Grow unless the folder is there (it is published only when verified)."""
    from growkit.growing import grow_checkpoint
    from growkit.record.manifest import read_manifest
    from growkit.surgery.request import GrowthRequest

    manifest = None if overwrite else read_manifest(target)
    if manifest is None:
        _, manifest = grow_checkpoint(
            source,
            target,
            # The ungrown model beside it continues with a fresh optimizer too.
            GrowthRequest(signal_heads=GROWTH, optimizer_state="reset"),
            overwrite=overwrite,
            reporter=reporter,
        )
    verification: dict[str, Any] = manifest["verification"]
    return verification


def _check_no_jump(before: Path, after: Path, recipe: Recipe) -> float:
    """Held-out loss of the grown folder minus that of its source; must be rounding only."""
    jump = held_out_loss(after, recipe) - held_out_loss(before, recipe)
    if not abs(jump) <= JUMP:
        raise VerificationFailed(
            f"The held-out loss changed by {jump:+.3g} when the model was grown "
            f"(at most {JUMP:g} is rounding).",
            f"Compare the folders with: growkit verify {before} {after}",
        )
    return jump


def held_out_loss(checkpoint: Path, recipe: Recipe) -> float:
    """Loss of a folder on the held-out text of a recipe."""
    from growkit.data.packing import datasets, pack
    from growkit.data.sources import corpus_of
    from growkit.data.tokenizer import load_tokenizer, tokenizer_fingerprint
    from growkit.training.evaluate import evaluate
    from growkit.training.models import build_model
    from growkit.training.recipe import ModelSection
    from growkit.verification.loading import quiet_transformers

    with quiet_transformers():
        tokenizer = load_tokenizer(checkpoint)
        model = build_model(ModelSection(checkpoint=checkpoint), tokenizer, 0)
        assert recipe.data.cache_dir is not None
        packed = pack(
            corpus_of(recipe.data),
            tokenizer,
            tokenizer_fingerprint(checkpoint),
            recipe.data.cache_dir,
            Silent(),
        )
        _, held_out = datasets(packed, recipe.data)
        assert held_out is not None
        batch_size = recipe.training.per_device_train_batch_size
        return evaluate(model, held_out, batch_size=batch_size)["eval_loss"]
