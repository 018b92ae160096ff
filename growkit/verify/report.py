"""What a verification found, as plain values: for the terminal, the manifest and the card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from growkit.errors import VerificationFailed

SCHEMA = 1


@dataclass(frozen=True)
class Generation:
    """Greedy generation of both folders from one prompt.

    A disagreement is explained when the two best logits there are closer than twice the
    tolerance: then rounding alone decides which token is the greedy one.
    """

    prompt_tokens: int
    tokens: int
    cached_equals_uncached: bool
    equals_a: bool
    first_cache_disagreement: int | None
    first_disagreement: int | None
    margin: float | None
    cache_explained: bool
    explained: bool


@dataclass(frozen=True)
class LayerDifference:
    """The residual stream after one layer of B, against the layer of A that it continues.

    ``layer`` and ``source`` are -1 for the embeddings, before the first layer; ``stack`` is
    ``encoder`` or ``decoder`` where there are two, else empty. Trained models
    have a few elements thousands of times larger than the rest, whose rounding alone exceeds any
    absolute limit. So what is judged is ``relative_difference``: each ``|d|`` over the element's
    own size plus the root mean square of its position, which is what the next norm divides by.
    """

    layer: int
    source: int
    max_difference: float
    relative_difference: float
    tolerance: float
    stack: str = ""

    @property
    def within(self) -> bool:
        return self.relative_difference <= self.tolerance

    @property
    def place(self) -> str:
        """``layer 3``, ``decoder layer 3``."""
        return f"{self.stack} layer {self.layer}".strip()


@dataclass(frozen=True)
class HalfPrecision:
    """Effect of computing in the checkpoint's own 16-bit dtype; informational.

    ``max_difference`` is between A and B, both computed in ``dtype``; ``noise_floor`` is between
    A computed in the compute dtype and A computed in ``dtype``.
    """

    dtype: str
    max_difference: float
    noise_floor: float


@dataclass(frozen=True)
class VerificationReport:
    """Figures of one comparison. Differences are absolute, in logits; KL is in nats a token.

    ``passed`` is None when growth is declared not exact: the figures then inform, and judge
    nothing. ``cause`` is one sentence, empty unless ``passed`` is False.
    """

    passed: bool | None
    cause: str
    a: str
    b: str
    exactness: str
    tokens: int
    windows: int
    text: str
    tokenizer: str
    storage_dtype_a: str
    storage_dtype_b: str
    compute_dtype: str
    layers_a: int
    layers_b: int
    layerwise: bool
    tolerance: float
    logit_rms: float
    logit_max: float
    max_difference: float
    mean_difference: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    perplexity_a: float
    perplexity_b: float
    generation: Generation | None
    half_precision: HalfPrecision | None
    first_differing_layer: int | None
    layers: tuple[LayerDifference, ...]
    notes: tuple[str, ...]

    @property
    def status(self) -> str:
        """``passed``, ``failed`` or ``not exact (informational)``."""
        names = {True: "passed", False: "failed", None: "not exact (informational)"}
        return names[self.passed]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able figures; folders by name only, so that the manifest holds no local path."""
        figures = asdict(self)
        figures["layers"] = [{**asdict(layer), "within": layer.within} for layer in self.layers]
        figures["notes"] = list(self.notes)
        figures["perplexity_difference"] = self.perplexity_b - self.perplexity_a
        return {"schema": SCHEMA, "status": self.status, **figures}

    def summary(self) -> str:
        """One line for the model card."""
        return (
            f"{self.status}: max |d logit| {self.max_difference:.3g} "
            f"(tolerance {self.tolerance:.3g}), mean KL {self.kl_mean:.3g}, "
            f"top-1 agreement {self.top1_agreement:.2%}, perplexity {self.perplexity_a:.4f} -> "
            f"{self.perplexity_b:.4f}, {self.tokens} tokens, {self.compute_dtype} compute"
        )

    def raise_if_failed(self) -> None:
        """Raises:
        VerificationFailed: when ``passed`` is False.
        """
        if self.passed is False:
            raise VerificationFailed(
                self.cause,
                "Do not use the second folder as a function-preserving copy of the first; "
                "--verbose lists every layer, --report-only prints figures without failing.",
            )
