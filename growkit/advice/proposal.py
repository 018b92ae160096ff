"""What to train under a budget: start depth, time of growth, method, rates, and the recipe.

Two cases. A folder with a config.json alone (or a config that is to be trained from scratch) is the
*target*: almost none of its layers are trained for most of the steps, then all. A folder with
weights is the *small model*, whose compute is spent: it grows once, after the warm-up.

Every choice names its source: a paper, or a committed study of ``benchmarks/studies``, whose words
a test compares with the table there. What is a guess is called one. No torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from growkit.advice.budget import OPTIMAL_TOKENS_PER_PARAMETER
from growkit.advice.memory import TrainingSetup, training_memory
from growkit.advice.new_run import (
    FEWEST_STEPS,
    LARGEST_STEP,
    LONGEST,
    SPARE,
    activation_bytes,
    learning_rate,
)
from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.core.quantities import counted, human_count
from growkit.core.yaml_files import parse_yaml
from growkit.families import family_of
from growkit.record.cost import cost_of, training_flops_of
from growkit.surgery.plan import declare_tensors, plan_growth
from growkit.surgery.request import GrowthRequest
from growkit.training.read_recipe import make_recipe
from growkit.vocabulary.tokenizer_files import tokenizer_files

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
BUDGET = re.compile(
    r"([0-9]{1,30}(?:\.[0-9]{0,30})?(?:e[+-]?[0-9]{1,2})?)\s*([kMGBTPE]?)\s*(tokens|flops)",
    re.IGNORECASE,
)
FEWEST = 50  # steps of a run in which a growth may stand

# Words of the committed studies: (folder of benchmarks/studies, what its table says).
STUDIES = {
    "late": ("progressive", "2 -> 16 at 70 %, random against from scratch, 1.67 x the FLOPs, at "
             "0.6 x its FLOPs, equal parameters: lower by 0.041 (95 % CI 0.013 to 0.068, 3 seeds)"),
    "time": ("progressive-choices", "1 -> 16 at 50 %, random against 1 -> 16 at 70 %, random, at "
             "equal FLOPs, equal parameters: higher by 0.101 (95 % CI 0.096 to 0.107, 3 seeds)"),
    "start": ("progressive-choices", "0 -> 16 at 70 %, random against 1 -> 16 at 70 %, random, at "
              "equal FLOPs, equal parameters: higher by 0.212 (95 % CI 0.192 to 0.232, 3 seeds)"),
    "side by side": ("progressive-choices", "2 -> 16 at 70 %, copies side by side against 2 -> 16 "
                     "at 70 %, random, at equal FLOPs, equal parameters: higher by 0.029 (95 % CI "
                     "0.023 to 0.035, 3 seeds)"),
    "late width": ("late-width", "split against from scratch, at equal FLOPs, equal parameters: "
                   "lower by 0.076 (95 % CI 0.049 to 0.102, 3 seeds)"),
    "width": ("plateau", "hidden and FFN x2 against hidden and FFN x2 from scratch, at equal "
              "FLOPs, equal parameters: higher by 0.140 (95 % CI 0.124 to 0.156, 3 seeds)"),
    "train-on": ("growth-1m", "depth x2 stacked against no growth, at equal FLOPs: higher by 0.018 "
                 "(95 % CI 0.011 to 0.025, 3 seeds)"),
    "depth": ("plateau", "depth x2 stacked against no growth, at equal FLOPs: lower by 0.047 (95 % "
              "CI 0.020 to 0.074, 3 seeds); not shown any more when corrected for 7 comparisons"),
    "moments": ("optimizer", "moments grown against moments reset, at equal FLOPs, equal "
                "parameters: no difference shown (+0.00023, 95 % CI -0.00021 to +0.00066, 3 "
                "seeds)"),
    "re-warm-up": ("optimizer", "moments grown, re-warm-up against moments grown, at equal FLOPs, "
                   "equal parameters: higher by 0.00207 (95 % CI 0.00161 to 0.00254, 3 seeds)"),
}  # fmt: skip
EXPANSION = "zero/one-layer expansion, arXiv:2511.04981 (abstract)"


@dataclass(frozen=True)
class Choice:
    """One line of a proposal.

    Attributes:
        what: ``start depth``, ``growth at`` ...
        choice: the value.
        why: one sentence.
        source: paper or study; ``rule`` for arithmetic, ``guess`` for what nobody measured.
    """

    what: str
    choice: str
    why: str
    source: str


@dataclass(frozen=True)
class Proposal:
    """What to train, and the recipe that does it.

    Attributes:
        tokens, flops: of the whole run, as growkit counts them.
        scratch_flops: of the target from scratch at as many tokens; None for a trained checkpoint.
        recipe: text of the staged recipe.
    """

    choices: tuple[Choice, ...]
    tokens: int
    flops: float
    scratch_flops: float | None
    recipe: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self) | {"recipe": parse_yaml(self.recipe, "recipe")}


def read_budget(text: str) -> tuple[float, str]:
    """``2e9tokens``, ``3.5e17 FLOPs``, ``20M tokens``: (number, ``tokens`` or ``flops``).

    Raises:
        UsageError: it says neither, or no number above 0.
    """
    found = BUDGET.fullmatch(text.strip())
    number = 0.0
    if found is not None:
        number = float(found[1]) * UNITS[found[2].upper()]
    if found is None or not 0 < number < 1e30:
        raise UsageError(
            f"--budget {text!r} is no budget.",
            "Give tokens or training FLOPs, for example 2e9tokens, 20Mtokens or 3e17flops.",
        )
    return number, found[3].lower()


@dataclass(frozen=True)
class _Model:
    """What is known of a folder."""

    folder: Path
    config: dict[str, Any]
    family: Any
    sizes: dict[str, int]
    trained: bool

    def flops(self, layers: int, length: int) -> float:
        """Of a training step a token, with so many layers."""
        sizes = {**self.sizes, "layer": layers}
        return training_flops_of(self.family, sizes, length)

    def parameters(self, layers: int) -> int:
        return cost_of(self.family, {**self.sizes, "layer": layers}, "F32", 1).parameters


def propose(
    folder: Path, budget: str, text: Path | None = None, memory: int = 24 * 10**9
) -> Proposal:
    """Choose by the budget.

    Args:
        folder: the target's config.json without weights, or a trained checkpoint.
        budget: see :func:`read_budget`.
        text: a file or folder of text; None: the text that comes with growkit.
        memory: bytes of the accelerator, for the batch.

    Raises:
        UsageError: the budget is none, or too small; a model with two stacks of layers; an unknown
            family.
    """
    number, unit = read_budget(budget)
    model = _read(folder)
    layers = model.sizes["layer"]
    start, target = (layers, 2 * layers) if model.trained else (2 if layers >= 8 else 1, layers)
    method = _method(model, start, target)
    context = model.config.get("max_position_embeddings") or model.config.get("n_positions")
    length = min(int(context or LONGEST), LONGEST)
    parameters = model.parameters(target)
    small, large = model.flops(start, length), model.flops(target, length)

    def spent(share: float) -> float:
        return share * small + (1 - share) * large

    share, decay = _time(number / (parameters if unit == "tokens" else parameters * spent(0.7)))
    if model.trained:
        share, decay = 0.05, 0.2
    tokens = number if unit == "tokens" else number / spent(share)
    while length > 128 and length * FEWEST_STEPS > tokens:
        length //= 2
    step = int(min(max(tokens // FEWEST_STEPS, length), LARGEST_STEP))
    batch, accumulation = _batch(model, target, length, step, memory)
    steps = math.ceil(tokens / (batch * accumulation * length))
    if steps < FEWEST:
        least = FEWEST * batch * accumulation * length
        raise UsageError(
            f"--budget {budget!r} is {counted(steps, 'step')} of {length} tokens, too few to "
            "train, grow and decay.",
            f"Give {human_count(least)} tokens or more.",
        )
    grow_at = max(round(share * steps), 1)
    warmup = max(round((0.05 if model.trained else 0.02) * steps), 1)
    tokens = steps * batch * accumulation * length
    flops = tokens * spent(grow_at / steps)
    ratio = tokens / parameters
    choices = _of_checkpoint if model.trained else _of_target
    lines = (
        *choices(model, start, target, method, share, ratio),
        *_rates(model, decay),
    )
    recipe = _recipe(
        model, start, target, method, lines, text,
        length=length, batch=batch, accumulation=accumulation, steps=steps, grow_at=grow_at,
        warmup=warmup, decay=decay,
    )  # fmt: skip
    make_recipe(parse_yaml(recipe, "recipe"), "the proposed recipe")
    scratch = None if model.trained else tokens * large
    return Proposal(lines, tokens, flops, scratch, recipe)


def _read(folder: Path) -> _Model:
    with open_checkpoint(folder, require_tensors=False) as found:
        trained = bool(found.tensors)
        config = dict(found.config)
        family = family_of(config, found.tensors)
        sizes = family.sizes_of(config, found.tensors)
    if len(family.stacks) > 1 or "layer" not in sizes:
        raise UsageError(
            f"{str(folder)!r} is a {family.name} with two stacks of layers, for which no growth "
            "was measured.",
            "Write the stages yourself: docs/growth-schedules.md.",
        )
    if sizes["layer"] < (1 if trained else 2):
        raise UsageError(
            f"{str(folder)!r} has {counted(sizes['layer'], 'layer')}, which leaves nothing to grow "
            "late.",
            "Give the config.json of the model that is wanted in the end.",
        )
    return _Model(folder, config, family, sizes, trained)


def _with_layers(model: _Model, layers: int) -> dict[str, Any]:
    """config.json of the same model with fewer layers; lists by layer are cut."""
    before = model.family.config_fields(model.sizes)
    after = model.family.config_fields({**model.sizes, "layer": layers})
    old = model.sizes["layer"]
    config = {
        key: value[:layers] if isinstance(value, list) and len(value) == old else value
        for key, value in model.config.items()
    }
    return config | {k: v for k, v in after.items() if v != before.get(k)}


def _method(model: _Model, start: int, target: int) -> str:
    """Random layers where the class's start is known; copies elsewhere, and of a checkpoint."""
    if model.trained:
        return "interposed"
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(_with_layers(model, start)))
        with open_checkpoint(Path(place), require_tensors=False) as checkpoint:
            declare_tensors(checkpoint)
            try:
                plan_growth(checkpoint, GrowthRequest(layers=target, new_layers="random"))
            except UsageError:
                return "copy"
    return "random"


def _time(tokens_per_parameter: float) -> tuple[float, float]:
    """(share of the steps before the growth, share of the decay), from the length of the run."""
    return (0.7, 0.2) if tokens_per_parameter < OPTIMAL_TOKENS_PER_PARAMETER else (0.8, 0.1)


def _batch(model: _Model, layers: int, length: int, step: int, memory: int) -> tuple[int, int]:
    shapes = dict(model.family.declared({**model.sizes, "layer": layers}))
    fixed = training_memory(shapes, {}, TrainingSetup(bf16_autocast=True)).total
    room = int((SPARE * memory - fixed) / activation_bytes(model.config, length))
    batch = 1 << max(min(room, step // length, 64), 1).bit_length() - 1
    return batch, max(round(step / (batch * length)), 1)


def _cited(key: str) -> tuple[str, str]:
    study, words = STUDIES[key]
    return words, f"benchmarks/studies/{study}"


def _of_target(
    model: _Model, start: int, target: int, method: str, share: float, ratio: float
) -> list[Choice]:
    why, source = "late, inside the stable phase", EXPANSION
    if share < 0.8:
        words, study = _cited("late")
        earlier, other = _cited("time")
        why = (
            "the paper grows at about 80 %; below 20 tokens a parameter earlier, but not much: "
            f"{words}; {earlier}"
        )
        source = f"{EXPANSION}; {study}; {other}"
    side, choices = _cited("side by side")
    methods = {
        "random": "a class's own start makes no jump of the loss; identities and stacked copies "
        f"end alike, but {side}",
        "copy": f"growkit does not know how the {model.family.name} class starts a layer; random "
        "layers and copies stacked end alike",
    }
    none, study = _cited("start")
    width, other = _cited("late width")
    return [
        Choice(
            "start depth", counted(start, "layer"),
            f"almost no layers for most of the steps, then all {target} in one step; several "
            f"stages do worse, and so do 0 layers: {none}", f"{EXPANSION}; {study}",
        ),
        Choice("growth at", f"{share:.0%} of the steps", why, source),
        Choice("new layers", method, methods[method], f"{EXPANSION}; {choices}"),
        Choice("width", "not grown", f"it pays, but less than depth: {width}", other),
        Choice(
            "length", f"{ratio:.3g} tokens a parameter of the target",
            "reuse gains most below 20 tokens a parameter", "arXiv:2605.13405 (abstract)",
        ),
    ]  # fmt: skip


def _of_checkpoint(
    model: _Model, start: int, target: int, method: str, share: float, ratio: float
) -> list[Choice]:
    return [
        Choice(
            "start", f"the checkpoint, {counted(start, 'layer')}",
            "its compute is spent: it grows once, as soon as the rate has warmed up", "rule",
        ),
        Choice("alternative", "train on without growth", *_cited("train-on")),
        Choice(
            "growth", f"layers x2, to {target}",
            "a factor of about 2 is the reliable one", "arXiv:2605.13405 (abstract)",
        ),
        Choice("depth", "rather than width", *_cited("depth")),
        Choice("width", "not grown", *_cited("width")),
        Choice(
            "new layers", method, "every layer's copy beside it, of a model that converged",
            "orthogonal growth, arXiv:2510.08008 (abstract)",
        ),
        Choice("growth at", f"{share:.0%} of the steps", "at the end of the warm-up", "guess"),
        Choice(
            "length", f"{ratio:.3g} tokens a parameter of the grown model",
            "reuse gains most below 20 tokens a parameter, less the longer the base was trained",
            "arXiv:2605.13405, arXiv:2510.06548 (abstracts)",
        ),
    ]  # fmt: skip


def _rates(model: _Model, decay: float) -> list[Choice]:
    if model.trained:
        peak = learning_rate(model.parameters(model.sizes["layer"]))
        rate = Choice(
            "rate", f"{peak:.1e}, AdamW", "half of GPT-3's peak at this size: it warms up again",
            "arXiv:2005.14165 table 2.1; arXiv:2308.04014",
        )  # fmt: skip
    else:
        rate = Choice(
            "rate", "Muon 2.0e-02, AdamW 4.0e-03 for the rest",
            "best of four for one layer of hidden size 128, used for two as well, half of it after "
            "the growth: try half and twice; Muon's spectral scale needs no factor across width",
            "benchmarks/studies/progressive; arXiv:2310.17813",
        )  # fmt: skip
    return [
        rate,
        Choice(
            "schedule", f"wsd, decay over the last {decay:.0%}",
            "the growth stands in the stable phase", EXPANSION,
        ),
        Choice("moments", "of what existed go on", *_cited("moments")),
        Choice("warm-up after the growth", "none", *_cited("re-warm-up")),
    ]  # fmt: skip


def _recipe(
    model: _Model,
    start: int,
    target: int,
    method: str,
    lines: tuple[Choice, ...],
    text: Path | None,
    *,
    length: int,
    batch: int,
    accumulation: int,
    steps: int,
    grow_at: int,
    warmup: int,
    decay: float,
) -> str:
    def quoted(value: Any) -> str:
        return json.dumps(value if not isinstance(value, Path) else str(value), ensure_ascii=False)

    head = [
        "# growkit train THIS --dry-run      what it comes to; writes nothing",
        "# growkit train THIS --out RUN      the run; the same command continues it",
        "#",
        "# Proposed by growkit advise, to be edited. Why:",
        *(f"# * {line.what}: {line.choice}. {line.why} [{line.source}]" for line in lines),
    ]
    if model.trained:
        body = ["model:", f"  checkpoint: {quoted(model.folder)}", "  dtype: float32"]
    else:
        drop = {"architectures", "auto_map", "torch_dtype", "dtype", "transformers_version"}
        config = {k: v for k, v in _with_layers(model, start).items() if k not in drop}
        body = ["model:", "  config:"]
        listed = yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=1000)
        body += [f"    {line}" for line in listed.splitlines()]
        if tokenizer_files(model.folder):
            body += ["tokenizer:", f"  path: {quoted(model.folder)}"]
        else:
            vocabulary = int(model.config.get("vocab_size") or 0)
            body += ["tokenizer:"] + (
                [f"  train_bpe: {vocabulary}"] if vocabulary >= 512 else ["  bytes: true"]
            )
    body += [
        "data:",
        f"  files: {'sample' if text is None else f'[{quoted(text)}]'}"
        + ("            # <- your text" if text is None else ""),
        f"  sequence_length: {length}",
        "training:",
        f"  max_steps: {steps}",
        f"  per_device_train_batch_size: {batch}",
        f"  gradient_accumulation_steps: {accumulation}",
        "  schedule: wsd",
        f"  warmup_steps: {warmup}",
        f"  decay_steps: {decay:g}",
        "  bf16: true",
    ]
    if model.trained:
        body += [f"  learning_rate: {learning_rate(model.parameters(start)):.1e}"]
    else:
        body += [
            "  decay_type: linear",
            "  optimizer: muon",
            "  muon_adjust: original",
            "  learning_rate: 4.0e-3                # of AdamW: embedding, norms, output",
            "  muon_learning_rate_multiplier: 5.0   # 0.02 for the matrices",
        ]
    body += [
        f"  eval_steps: {max(steps // 20, 1)}",
        f"  save_steps: {max(steps // 10, 1)}",
        "stages:",
        f"  - at: {{steps: {grow_at}}}",
        f"    grow: {{layers: {target}, new_layers: {method}}}",
    ]
    return "\n".join([*head, *body]) + "\n"


def proposal_lines(proposal: Proposal) -> list[str]:
    """The proposal as text, a line a choice with its source."""
    lines = [
        f"- {line.what}: {line.choice}. {line.why} [{line.source}]" for line in proposal.choices
    ]
    total = f"{human_count(proposal.tokens)} tokens, {proposal.flops:.3e} training FLOPs"
    if proposal.scratch_flops:
        part = proposal.flops / proposal.scratch_flops
        total += f", {part:.0%} of {proposal.scratch_flops:.3e} from scratch at as many tokens"
    return [*lines, total]


def save_proposal(proposal: Proposal, out: Path) -> None:
    """Write the recipe as a new file. Raises UsageError where there is one, or it cannot be."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(proposal.recipe)
    except FileExistsError:
        raise UsageError(
            f"{str(out)!r} exists already.", "Give the name of a new file; nothing is lost."
        ) from None
    except OSError as error:
        raise UsageError(
            f"{str(out)!r} cannot be written: {error.strerror}.",
            "Give a file in a folder that exists.",
        ) from None


def as_mapping(proposal: Proposal, out: Path | None) -> Mapping[str, Any]:
    """What ``--json`` prints."""
    return proposal.to_dict() | ({"out": str(out)} if out else {})
