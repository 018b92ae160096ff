"""What the literature (or arithmetic) says about *this* growth and *this* recipe; no torch.

One function a finding: it returns the sentence when it applies. Every finding names its source;
``derived`` means that it follows from the operators' algebra, ``measured`` that growkit's authors
ran it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from growkit.advice.budget import OPTIMAL_TOKENS_PER_PARAMETER, settled_tokens, tokens_per_parameter
from growkit.advice.facts import Facts

HEADS = {"signal_heads", "noise_heads", "uniform_heads", "heads", "query_heads", "kv_heads"}
WIDTH = HEADS | {"ffn", "hidden"}
HIGH_FROZEN_RATE = 2e-4


@dataclass(frozen=True)
class Finding:
    """One piece of advice that applies.

    Attributes:
        name: stable, for programs.
        text: one or two sentences.
        source: paper, repository issue, ``derived`` or ``measured``.
    """

    name: str
    text: str
    source: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def _shared(facts: Facts) -> list[int]:
    """Numbers of copies that share the weight of what reads them."""
    return list(facts.growth.get("shared_copies", ())) if facts.growth else []


def identical_copies(facts: Facts) -> str | None:
    if not _shared(facts) or facts.growth is None or facts.growth["symmetry"] != "even":
        return None
    return (
        "copies with even shares get equal gradients and stay equal for ever (no dropout): growth "
        "that is paid for and never used; --symmetry split keeps the function and parts them"
    )


def equal_copies(facts: Facts) -> str | None:
    if not _shared(facts) or facts.growth is None or facts.growth["symmetry"] != "rms":
        return None
    if facts.recipe is None or facts.optimizer_goes_on:
        return None
    section = facts.recipe.training
    if section.uses_new_parameter_map:
        return None
    return (
        "copies of --symmetry rms begin equal, and this run has neither the optimizer state of the "
        "run before nor a rate of its own for new slots: nothing parts them; set "
        "training.new_warmup_steps, or grow with the optimizer state"
    )


def over_trained(facts: Facts) -> str | None:
    ratio = tokens_per_parameter(facts)
    if ratio is None or ratio <= OPTIMAL_TOKENS_PER_PARAMETER or facts.growth is None:
        return None
    return (
        f"the base has seen {ratio:,.0f} tokens per parameter, {ratio / 20:,.1f} times the "
        "compute-optimal 20: the longer a base was trained, the less its reuse gains (log-like); "
        "yet a 410M base at 750B tokens (1,800 a parameter) still gained 31% by stacking"
    )


def width_evidence(facts: Facts) -> str | None:
    if not facts.operators & {"ffn", "hidden"} or "layers" in facts.operators:
        return None
    return (
        "in the controlled study (Llama, 400M to 1.1B) width growth by direct copy gave -0.7% "
        "speed against training from scratch, and depth stacking +49.1%; HyperCloning reports 2 to "
        "4 times faster training for width growth"
    )


def head_evidence(facts: Facts) -> str | None:
    if not facts.operators or not facts.operators <= HEADS:
        return None
    return (
        "no published result grows only the heads of a pretrained RoPE + GQA model; group-"
        "differentiated growth is published without a parameter-matched study of ratios: compare "
        "with an ungrown run of the same compute"
    )


def loss_jump(facts: Facts) -> str | None:
    if facts.growth is None or facts.growth["exactness"] != "not-exact":
        return None
    return (
        "the loss will jump: growing 24 to 32 layers, AquilaMoE went from 2.97 to 3.31 by "
        "interpolation and 4.30 by stacking; stacking won the controlled study all the same"
    )


def closed_norm(facts: Facts) -> str | None:
    if facts.growth is None or not facts.growth["tensors"].get("closed"):
        return None
    return (
        "this family ends its blocks with a norm, and growkit closes that norm's gain in the "
        "inserted blocks; zeroed projections before such a norm are exact too and cannot be "
        "trained (the first gradient of o_proj was 4e3, the first step a jump at any rate)"
    )


def frozen_rate(facts: Facts) -> str | None:
    recipe = facts.recipe
    if recipe is None or recipe.training.train != "new":
        return None
    rate = recipe.training.learning_rate * recipe.training.new_learning_rate_multiplier
    if rate < HIGH_FROZEN_RATE:
        return None
    return (
        f"training the new part alone at {rate:.1e}: a Qwen grown from 32 to 40 layers plateaued, "
        "which its authors put down to 2e-4; try a tenth, or new_then_all"
    )


def frozen_width(facts: Facts) -> str | None:
    recipe = facts.recipe
    if recipe is None or recipe.training.train != "new" or not facts.operators & WIDTH:
        return None
    return (
        "freezing the old part was published for inserted layers; for width growth no evidence was "
        "found, and HyperCloning, LEMON and G_stack train everything"
    )


def no_warmup(facts: Facts) -> str | None:
    recipe = facts.recipe
    if recipe is None or facts.growth is None or facts.optimizer_goes_on:
        return None
    section = recipe.training
    if section.warmup_steps or section.new_warmup_steps:
        return None
    return (
        "no warm-up after the growth, with a fresh optimizer: staged training re-warms for 200 "
        "steps, LEMON for 5,000, and SPARKLING names re-warm-up as one of its parts"
    )


def short_run(facts: Facts) -> str | None:
    recipe, settled = facts.recipe, settled_tokens(facts)
    if recipe is None or settled is None:
        return None
    tokens = recipe.total_steps * recipe.tokens_per_step
    if tokens >= settled:
        return None
    return (
        f"the run ends after {tokens:,} tokens, before warm-ups, thaw and Adam's moments are "
        f"behind it ({settled:,}): its last loss says little about the growth"
    )


def clipping(facts: Facts) -> str | None:
    recipe = facts.recipe
    if recipe is None or not recipe.training.max_grad_norm or not _shared(facts):
        return None
    return (
        "clipping at the same norm is tighter after width growth: r copies of a reader add r times "
        "its squared gradient norm; watch grad_norm, grad_norm_old and grad_norm_new"
    )


def reader_rate(facts: Facts) -> str | None:
    recipe = facts.recipe
    if recipe is None or recipe.training.train == "new" or not _shared(facts):
        return None
    return (
        "Adam moves every entry alike, so weights that read r copies move the function r times as "
        "far at the same rate; a rate nearer to learning_rate / r is nearer to the ungrown run"
    )


def bfloat16_weights(facts: Facts) -> str | None:
    recipe = facts.recipe
    if recipe is None or facts.setup.dtype not in ("bfloat16", "BF16"):
        return None
    return (
        "bfloat16 weights round updates below 1/256 of a weight away; model.dtype float32 with "
        "training.bf16 true computes in bfloat16 and keeps them"
    )


def noise(facts: Facts) -> str | None:
    if facts.growth is None or facts.growth["symmetry"] != "noise":
        return None
    return (
        "20% noise on an exact width growth improved perplexity by 0.27 after 40B tokens in the "
        "controlled study; whether perturbed copies beat equal ones is unsettled"
    )


_Rule = tuple[str, Callable[[Facts], str | None], str]
RULES: tuple[_Rule, ...] = (
    ("identical-copies", identical_copies, "Net2Net arXiv:1511.05641; measured"),
    ("equal-copies", equal_copies, "SPARKLING arXiv:2602.02472"),
    (
        "over-trained",
        over_trained,
        "arXiv:2510.06548; G_stack arXiv:2405.15319; Chinchilla arXiv:2203.15556",
    ),
    ("width-evidence", width_evidence, "G_stack arXiv:2405.15319; HyperCloning arXiv:2409.12903"),
    ("head-evidence", head_evidence, "GDA arXiv:2510.06949 (abstract)"),
    ("loss-jump", loss_jump, "AquilaMoE arXiv:2408.06567; G_stack arXiv:2405.15319"),
    ("closed-norm", closed_norm, "measured on Gemma-3 shapes"),
    ("frozen-rate", frozen_rate, "TencentARC/LLaMA-Pro issue 29"),
    ("frozen-width", frozen_width, "LLaMA-Pro arXiv:2401.02415"),
    (
        "no-warm-up",
        no_warmup,
        "arXiv:2203.06211; LEMON arXiv:2310.07999; SPARKLING arXiv:2602.02472",
    ),
    ("short-run", short_run, "derived"),
    ("clipping", clipping, "derived"),
    ("reader-rate", reader_rate, "derived"),
    ("bfloat16-weights", bfloat16_weights, "arXiv:2010.06192"),
    ("noise", noise, "G_stack arXiv:2405.15319"),
)


def findings(facts: Facts) -> list[Finding]:
    """Those that apply, in the order of the table."""
    found = []
    for name, rule, source in RULES:
        text = rule(facts)
        if text is not None:
            found.append(Finding(name, text, source))
    return found
