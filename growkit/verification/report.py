"""What a verification found, as plain values: for the terminal, the manifest and the card."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from growkit.core.errors import VerificationFailed

SCHEMA = 1


@dataclass(frozen=True)
class Generation:
    """Greedy generation of both folders from one prompt.

    A disagreement is explained when the two best logits there are closer than twice the
    tolerance: then rounding alone decides which token is the greedy one. ``max_cache_difference``
    is between the logits that B chose from, with its cache, and those without. ``as_in_a``: A's
    class has the same fault, and A with its cache generates what B does.
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
    max_cache_difference: float
    cache_tolerance: float
    as_in_a: bool = False


@dataclass(frozen=True)
class CachedSteps:
    """Logits of decoding with a KV cache, against one forward pass over the same tokens.

    A prefill of ``prefill_tokens``, then ``steps`` single tokens. ``folder`` is ``a`` or ``b``,
    ``cache`` is ``dynamic`` or ``static``; ``max_difference`` is None where the model raised
    ``error``. ``as_in_a``: A's class has the same fault, and B decodes as A does.
    """

    folder: str
    cache: str
    prefill_tokens: int
    steps: int
    max_difference: float | None
    tolerance: float
    error: str = ""
    as_in_a: bool = False

    @property
    def within(self) -> bool:
        return self.max_difference is not None and self.max_difference <= self.tolerance


@dataclass(frozen=True)
class LongWindow:
    """The one window that is longer than what the configs say about lengths; its last ``compared``
    positions are compared. ``boundary`` names the config field that asked for it."""

    tokens: int
    compared: int
    max_difference: float
    tolerance: float
    boundary: str

    @property
    def within(self) -> bool:
        return self.max_difference <= self.tolerance


@dataclass(frozen=True)
class TableRows:
    """Embeddings and output matrix, row by row, on the stored values.

    ``against`` is ``plan`` (what growkit.json's plan makes of A), ``a`` (A's own rows) or empty:
    then only the rows that the text reads are verified. ``rows`` of ``total`` are verified.
    """

    against: str
    rows: int
    total: int
    tensors: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConfigFields:
    """Config fields of B against those that the plan writes (``against`` is ``plan``) or A's own
    (``a``); empty where they cannot be compared. ``judged`` where no window was long enough."""

    against: str
    differing: tuple[str, ...] = ()
    judged: bool = False


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
class VocabularyFigures:
    """Vocabularies that differ: ``common`` tokens are compared.

    ``new_token_share`` is the mean probability that B gives to rows that A does not have, and
    ``kl_of_old_tokens`` what that costs the others, in nats per token. ``bits_per_byte_a`` and
    ``_b`` are of one text, each in its own tokens: perplexities of two tokenizers cannot be
    compared.
    """

    rows_a: int
    rows_b: int
    common: int
    new: int
    dropped: int
    new_token_share: float
    largest_new_token_share: float
    kl_of_old_tokens: float
    bits_per_byte_a: float | None = None
    bits_per_byte_b: float | None = None

    @property
    def summary(self) -> str:
        """A part of the report's one line."""
        parts = [
            f"{self.common:,} common tokens of {self.rows_a:,} and {self.rows_b:,}",
            f"{self.new_token_share:.2%} of the probability on new ones",
        ]
        if self.bits_per_byte_a is not None and self.bits_per_byte_b is not None:
            both = f"{self.bits_per_byte_a:.3f} -> {self.bits_per_byte_b:.3f}"
            parts.append(f"{both} bits per byte, each in its own tokens")
        return ", ".join(parts)


@dataclass(frozen=True)
class VerificationReport:
    """Figures of one comparison. Differences are absolute, in logits; KL is in nats per token.

    ``passed`` is None when growth is declared not exact: the figures then inform, and judge
    nothing. ``cause`` is one sentence, empty unless ``passed`` is False.

    ``tokens`` are compared in windows of ``window``; ``verified_length`` is the longest text on
    which the logits are. ``amplification`` is 1 unless the tolerance was widened because A itself
    amplifies rounding (see :mod:`growkit.verification.amplification`). ``shared_layers``: so many
    layers of B are layers of A, by bytes and by a window, and were computed once for both
    (:mod:`growkit.verification.shared_layers`). ``output``: what an encoder gives, which predicts
    no next token: then KL and perplexities are 0 and say nothing.
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
    window: int
    verified_length: int
    long_window: LongWindow | None
    rows: TableRows
    config: ConfigFields
    cached: tuple[CachedSteps, ...]
    amplification: float
    shared_layers: int = 0
    vocabulary: VocabularyFigures | None = None
    output: str = ""

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
        figures["cached"] = [{**asdict(steps), "within": steps.within} for steps in self.cached]
        figures["compared"] = self.compared
        del figures["shared_layers"]  # said in "compared"
        if self.vocabulary is None:
            del figures["vocabulary"]
        if not self.output:
            del figures["output"]
        figures["perplexity_difference"] = self.perplexity_b - self.perplexity_a
        return {"schema": SCHEMA, "status": self.status, **figures}

    def summary(self) -> str:
        """One line for the model card."""
        jump = ""
        if self.passed is None and self.perplexity_a > 0.0 < self.perplexity_b:
            nats = math.log(self.perplexity_b / self.perplexity_a)
            jump = f" (the loss jumps by {nats:+.4f} nats per token)"
        if self.output:
            return (
                f"{self.status}: max |d| {self.max_difference:.3g} of {self.output} (tolerance "
                f"{self.tolerance:.3g}), {self.compute_dtype} compute; compared: {self.compared}"
            )
        return (
            f"{self.status}: max |d logit| {self.max_difference:.3g} "
            f"(tolerance {self.tolerance:.3g}), mean KL {self.kl_mean:.3g}, "
            f"top-1 agreement {self.top1_agreement:.2%}, perplexity {self.perplexity_a:.4f} -> "
            f"{self.perplexity_b:.4f}{jump}, {self.tokens} tokens, {self.compute_dtype} compute; "
            f"compared: {self.compared}"
        )

    @property
    def compared(self) -> str:
        """What was compared: "512 tokens in windows of 128 and one of 4,200; all 49,152 rows"."""
        long = f" and one of {self.long_window.tokens:,}" if self.long_window else ""
        read = "tokens" if self.rows.total else "numbers that make the noise"
        rows = "all" if self.rows.against else f"{self.rows.rows:,} of"
        against = {"plan": " (bytes, by the plan)", "a": " (values of A)"}
        parts = [
            f"{self.tokens:,} {read} in windows of {self.window:,}{long}",
        ]
        if self.rows.total:
            said = against.get(self.rows.against, " (those read)")
            parts.append(f"{rows} {self.rows.total:,} rows{said}")
        if self.shared_layers:
            of = f"{self.shared_layers} of {self.layers_b}"
            parts.append(f"{of} layers computed once for both (same bytes)")
        if self.cached:
            kinds = " and ".join(dict.fromkeys(steps.cache for steps in self.cached))
            prefill = self.cached[0].prefill_tokens
            parts.append(f"{kinds} cache behind {prefill:,} tokens{self._own_faults}")
        else:
            parts.append("no cache")
        if self.vocabulary is not None:
            parts.append(self.vocabulary.summary)
        return "; ".join(parts)

    @property
    def _own_faults(self) -> str:
        """For the line of whoever reads no notes."""
        made = self.generation
        off = any(steps.as_in_a for steps in self.cached) or (made is not None and made.as_in_a)
        return " (against A's own: its class decodes otherwise than it computes)" if off else ""

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
