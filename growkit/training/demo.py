"""The main job on the text that comes with growkit: train almost nothing, grow late, compare.

Folders, each whole or absent, so that a second call continues where the first one stopped::

    OUT/base/           one layer of GDA, 3 signal heads to 1 noise head, trained from scratch
    OUT/grown/          six layers and twice the signal heads, verified by grow itself
    OUT/grown-trained/  grown, trained on with the optimizer state grown along
    OUT/scratch/        the grown shape from scratch, for the training FLOPs of both together
    OUT/loss.png, OUT/demo.json

After zero/one-layer expansion (arXiv:2511.04981); new layers are identities here, so that the
growth is exact. One seed shows one difference; docs/results.md has the studies.
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


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo. The defaults take under four minutes on two CPU cores.

    Attributes:
        steps: of the one-layer model.
        grown_steps: after the growth.
        grown_layers: layers of the grown model.
        decay_steps: at the end of the grown model's training and of that from scratch.
    """

    steps: int = 600
    grown_steps: int = 120
    decay_steps: int = 60
    hidden_size: int = 128
    grown_layers: int = 6
    sequence_length: int = 128
    batch_size: int = 8
    vocab_size: int = 1024
    eval_tokens: int = 16384
    learning_rate: float = 4e-3
    seed: int = 0


@dataclass(frozen=True)
class DemoModel:
    """One row of the result. Losses in nats per held-out token; FLOPs and tokens count from the
    first step of the first model."""

    name: str
    folder: Path
    parameters: int
    tokens: int
    flops: float
    loss_at_start: float
    loss_at_end: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        models: the small one, the grown one, and the grown shape from scratch.
        jump: held-out loss of the grown model minus that of its source, before a step.
        difference: final loss of the grown model minus that of the one from scratch.
    """

    out: Path
    models: tuple[DemoModel, ...]
    jump: float
    difference: float
    verification: dict[str, Any]
    plot: Path | None
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return values


def growth(settings: DemoSettings) -> dict[str, Any]:
    """What is asked of ``growkit grow``."""
    return {"layers": settings.grown_layers, "new_layers": "identity", "signal_heads": "x2"}


def base_recipe(settings: DemoSettings, cache: Path) -> Recipe:
    """One layer from scratch, at a constant rate: what follows decays it."""
    config = {
        "model_type": "gda",
        "hidden_size": settings.hidden_size,
        "intermediate_size": 3 * settings.hidden_size,
        "num_hidden_layers": 1,
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
    return _recipe(
        settings,
        cache,
        model={"config": config},
        tokenizer={"train_bpe": settings.vocab_size},
        training={"max_steps": settings.steps, "schedule": "constant"},
    )


def grown_recipe(settings: DemoSettings, cache: Path, checkpoint: Path) -> Recipe:
    """Train the grown model on, where its source stopped reading, and decay."""
    return _recipe(
        settings,
        cache,
        model={"checkpoint": str(checkpoint)},
        training={
            "max_steps": settings.grown_steps,
            "schedule": "wsd",
            "warmup_steps": 0,
            "decay_steps": settings.decay_steps,
        },
    )


def scratch_recipe(
    settings: DemoSettings, cache: Path, config: dict[str, Any], tokenizer: Path, steps: int
) -> Recipe:
    """The grown shape with new weights, the same tokens from the beginning, the same decay."""
    return _recipe(
        settings,
        cache,
        model={"config": config},
        tokenizer={"path": str(tokenizer)},
        training={
            "max_steps": steps,
            "schedule": "wsd",
            "decay_steps": min(settings.decay_steps, steps // 2),
        },
    )


def _recipe(
    settings: DemoSettings,
    cache: Path,
    *,
    model: dict[str, Any],
    training: dict[str, Any],
    tokenizer: dict[str, Any] | None = None,
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
            },
            "training": {
                "learning_rate": settings.learning_rate,
                "warmup_steps": min(20, training["max_steps"] // 2),
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
        f"1/4 Train one layer from scratch, {settings.steps} steps",
        "base",
        base_recipe(settings, cache),
    )
    reporter.note(
        f"2/4 Grow it to {settings.grown_layers} layers and twice the signal heads, and verify the "
        "written files"
    )
    verification = _grow(base.out, out / "grown", settings, overwrite, reporter)
    reporter.note(f"      {verification['summary']}")
    recipe = grown_recipe(settings, cache, out / "grown")
    jump = _check_no_jump(base.out, out / "grown", recipe)
    reporter.note(f"      held-out loss after growth minus before: {jump:+.1e}")
    grown = run(
        f"3/4 Train the grown model on, {settings.grown_steps} steps", "grown-trained", recipe
    )
    small, large = (flops_per_token(folder, settings) for folder in (base.out, out / "grown"))
    spent = base.tokens * small + grown.tokens * large
    steps = max(int(spent / large / (settings.batch_size * settings.sequence_length)), 2)
    config = read_json_object(out / "grown" / "config.json")
    scratch = run(
        f"4/4 Train the grown shape from scratch for the same {spent:.3g} FLOPs, {steps} steps",
        "scratch",
        scratch_recipe(settings, cache, _untrained(config), base.out, steps),
    )

    rows = {r.out.name: read_metrics(r.metrics) for r in (base, grown, scratch)}
    plotted = draw_losses(
        [
            ("1 layer", _by_flops(rows["base"], small, 0.0), 0),
            (
                f"grown to {settings.grown_layers} layers",
                _by_flops(rows["grown-trained"], large, base.tokens * small),
                0,
            ),
            (
                f"{settings.grown_layers} layers from scratch",
                _by_flops(rows["scratch"], large, 0.0),
                0,
            ),
        ],
        out / "loss.png",
        reporter,
        title="Loss against compute: grown late beside from scratch",
        marks=[(round(base.tokens * small), "growth")],
        unit="training FLOPs",
    )
    models = tuple(
        DemoModel(
            name=name,
            folder=result.out,
            parameters=result.parameters,
            tokens=tokens,
            flops=flops,
            loss_at_start=rows[result.out.name][0]["eval_loss"],
            loss_at_end=_known(result.eval_loss),
        )
        for name, result, tokens, flops in (
            ("1 layer", base, base.tokens, base.tokens * small),
            ("grown, trained on", grown, base.tokens + grown.tokens, spent),
            ("from scratch", scratch, scratch.tokens, scratch.tokens * large),
        )
    )
    found = DemoResult(
        out=out,
        models=models,
        jump=jump,
        difference=models[1].loss_at_end - models[2].loss_at_end,
        verification=verification,
        plot=out / "loss.png" if plotted else None,
        seconds=seconds,
    )
    (out / "demo.json").write_text(
        json.dumps({"settings": asdict(settings), **found.to_dict()}, indent=2) + "\n"
    )
    return found


def flops_per_token(folder: Path, settings: DemoSettings) -> float:
    """Of training, as a plan and a study count them."""
    from growkit.checkpoint import open_checkpoint
    from growkit.families import family_of
    from growkit.record.cost import training_flops_of

    with open_checkpoint(folder) as checkpoint:
        family = family_of(checkpoint.config, checkpoint.tensors)
        sizes = family.sizes_of(checkpoint.config, checkpoint.tensors)
        return training_flops_of(family, sizes, settings.sequence_length, checkpoint.config)


def _untrained(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a grown folder as a recipe takes it: nothing about its code or its past."""
    left_out = ("auto_map", "growkit", "architectures", "dtype", "transformers_version")
    return {key: value for key, value in config.items() if key not in left_out}


def _by_flops(rows: list[dict[str, Any]], per_token: float, before: float) -> list[dict[str, Any]]:
    """Metrics with training FLOPs where the plot has tokens."""
    return [row | {"tokens": before + row["tokens"] * per_token} for row in rows if "tokens" in row]


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


def _grow(
    source: Path, target: Path, settings: DemoSettings, overwrite: bool, reporter: Reporter
) -> dict[str, Any]:
    """Grow unless the folder is there (it is published only when verified)."""
    from growkit.growing import grow_checkpoint
    from growkit.record.manifest import read_manifest
    from growkit.surgery.request import GrowthRequest

    manifest = None if overwrite else read_manifest(target)
    if manifest is None:
        request = GrowthRequest.from_mapping(growth(settings))
        _, manifest = grow_checkpoint(
            source, target, request, overwrite=overwrite, reporter=reporter
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
