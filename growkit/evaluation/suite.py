"""The attention suite: what loss does not show, on any causal language model that loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from growkit.core.errors import CheckpointError, UsageError, nearest
from growkit.core.progress import Progress, SilentProgress
from growkit.evaluation.attention_maps import AttentionEntropy, measure_entropy
from growkit.evaluation.context_noise import ContextNoise, measure_context_noise
from growkit.evaluation.model import LoadedModel, check_causal
from growkit.evaluation.needles import (
    CITIES,
    FORMS,
    Haystacks,
    haystack_count,
    make_haystacks,
    plain_encoder,
)
from growkit.evaluation.outliers import ActivationOutliers, measure_outliers
from growkit.evaluation.retrieval import Retrieval, measure_retrieval
from growkit.samples import sample_text
from growkit.verification.windows import token_windows

Result = TypeVar("Result")


@dataclass(frozen=True)
class SuiteOptions:
    """What is measured; every figure is a function of these, the text and the checkpoint.

    Attributes:
        forms: of needles, see :mod:`growkit.evaluation.needles`.
        lengths: tokens of prompts; longer ones than the model's ``max_position_embeddings`` become
            that. The noise in context is measured at the longest, entropy and outliers on windows
            of the longest.
        depths: where a needle stands, 0 (the beginning of the context) to 1.
        needles: in a context.
        queries: needles of a context that are asked for.
        samples: questions at each length and depth.
        prompts: prompts at each depth of which the attention is measured.
        windows: windows of text of which entropy and outliers are measured.
        seed: of needles and their places.
    """

    forms: tuple[str, ...] = FORMS
    lengths: tuple[int, ...] = (128, 256)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needles: int = 4
    queries: int = 2
    samples: int = 20
    prompts: int = 4
    windows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for form in self.forms:
            if form not in FORMS:
                raise UsageError(
                    f"Needles of the form {form!r} are not known.",
                    f"{nearest(form, FORMS)}Valid values: {', '.join(FORMS)}.",
                )
        if not self.forms or not self.lengths or min(self.lengths) < 16:
            raise UsageError(
                f"Lengths of {list(self.lengths)} tokens and forms {list(self.forms)} measure "
                "nothing.",
                "Give at least one form and lengths of at least 16 tokens.",
            )
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise UsageError(
                f"Depths {list(self.depths)} are not in the context.", "Give numbers from 0 to 1."
            )
        if "city" in self.forms and self.needles > len(CITIES):
            raise UsageError(
                f"{self.needles} needles of the form 'city' are more than there are cities.",
                f"Give at most {len(CITIES)} needles, or the form 'copy' alone.",
            )
        if self.needles < 2 or not 1 <= self.queries <= min(self.needles, len(set(self.depths))):
            raise UsageError(
                f"{self.queries} queries of {self.needles} needles at {len(set(self.depths))} "
                "depths cannot be asked.",
                "Give at least 2 needles, and no more queries than needles or depths.",
            )
        for name in ("samples", "prompts", "windows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)} measures nothing.", "Give >= 1.")

    @property
    def passes(self) -> int:
        """Units of the progress bar: at most so many contexts, prompts and windows."""
        depths = len(set(self.depths))
        asked = len(self.lengths) * haystack_count(self.samples, depths, self.queries)
        return len(self.forms) * (asked + depths * self.prompts) + 2 * self.windows


@dataclass(frozen=True)
class AttentionSuite:
    """All figures of the suite.

    Attributes:
        settings: as they were used (lengths cut to what the model can do).
        context_noise: a form and depth each; the one of all depths has ``depth`` None.
        retrieval: a form, length and depth each; the one of all depths has ``depth`` None.
        entropy: None where the model shows no attention maps.
        outliers: None where the model has no list of layers.
        notes: what could not be measured, and why.
    """

    settings: SuiteOptions
    context_noise: tuple[ContextNoise, ...]
    retrieval: tuple[Retrieval, ...]
    entropy: AttentionEntropy | None
    outliers: ActivationOutliers | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The documented JSON (docs/evaluation.md); tuples become lists when it is written."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """The main figures under flat names, for tables that compare many models.

        ``retrieval_ranked.copy.256``, ``retrieval_exact.copy.256`` (all depths),
        ``attention_answer.copy``, ``attention_noise.copy``, ``best_head_answer.copy`` (effective
        maps), ``entropy_normalised.effective``, ``attention_logits.top_1``,
        ``attention_logits.median``, ``hidden_states.top_1``, ``hidden_states.median``,
        ``hidden_kurtosis.max``. What was not measured is absent.
        """
        found: dict[str, float | None] = {}
        for result in self.retrieval:
            if result.depth is None:
                place = f"{result.form}.{result.length}"
                found[f"retrieval_ranked.{place}"] = result.ranked.accuracy
                found[f"retrieval_exact.{place}"] = result.exact.accuracy
        for noise in self.context_noise:
            if noise.depth is None:
                effective = noise.maps["effective"]
                found[f"attention_answer.{noise.form}"] = effective.shares.answer
                found[f"attention_noise.{noise.form}"] = effective.shares.noise
                found[f"best_head_answer.{noise.form}"] = max(effective.answer_of_best_head)
        if self.entropy is not None:
            for name, entropy in self.entropy.mean.items():
                found[f"entropy_normalised.{name}"] = entropy.normalised
        if self.outliers is not None:
            for kind in ("attention_logits", "hidden_states"):
                values = getattr(self.outliers, kind)
                if values is not None:
                    found[f"{kind}.top_1"], found[f"{kind}.median"] = values.top_1, values.median
            known = [value for value in self.outliers.hidden_kurtosis if value is not None]
            found["hidden_kurtosis.max"] = max(known, default=None)
        return {name: value for name, value in found.items() if value is not None}


def attention_suite(
    loaded: LoadedModel,
    *,
    text: str | None = None,
    options: SuiteOptions | None = None,
    progress: Progress | None = None,
) -> AttentionSuite:
    """Measure noise in context, multi-needle retrieval, attention entropy and outliers.

    The model is left as it was; no random number of torch is drawn.

    Args:
        text: what needles stand in and windows are taken from; best one that the model was not
            trained on. Default: the built-in sample.
        progress: a bar of ``options.passes``.

    Raises:
        UsageError: an encoder-decoder, or a text too short for the lengths.
    """
    options = options or SuiteOptions()
    model: Any = loaded.model
    check_causal(model)
    text = sample_text() if text is None else text
    bar = progress or SilentProgress()
    notes: list[str] = []
    options = _fitting(options, model, notes)
    longest = max(options.lengths)
    windows = token_windows(
        text,
        plain_encoder(loaded),
        tokens=options.windows * longest,
        window=longest,
        vocab_size=int(model.config.get_text_config(decoder=True).vocab_size),
    )
    if windows.shape[1] < longest:
        raise UsageError(
            f"The text gives {windows.shape[1]} tokens, and prompts have {longest}.",
            "Give a longer --text, or shorter --lengths.",
        )
    found = _haystacks(loaded, text, options, notes)

    def attempt(what: str, measure: Callable[[], Result]) -> Result | None:
        """A measure that this class of model does not allow is noted; the others continue."""
        bar.describe(what)
        try:
            return measure()
        except CheckpointError as error:
            notes.append(f"{what} not measured: {error.cause}")
            return None

    noise: list[ContextNoise] = []
    for haystacks in found:
        if haystacks.length == longest:
            measure = partial(
                measure_context_noise, loaded, haystacks, prompts=options.prompts, progress=bar
            )
            noise += attempt(f"attention to {haystacks.form} needles", measure) or []
    entropy = attempt("entropy", lambda: measure_entropy(loaded, windows, progress=bar))
    outliers = attempt("outliers", lambda: measure_outliers(loaded, windows, progress=bar))
    retrieval: list[Retrieval] = []
    asked = haystack_count(options.samples, len(options.depths), options.queries)
    for haystacks in found:
        haystacks = replace(haystacks, items=haystacks.items[:asked])
        bar.describe(f"retrieval of {haystacks.form} needles from {haystacks.length} tokens")
        retrieval += measure_retrieval(loaded, haystacks, progress=bar)
    return AttentionSuite(options, tuple(noise), tuple(retrieval), entropy, outliers, tuple(notes))


def _fitting(options: SuiteOptions, model: Any, notes: list[str]) -> SuiteOptions:
    """Lengths in order, none beyond what the model can do; depths in order, each once."""
    limit = getattr(model.config, "max_position_embeddings", None) or max(options.lengths)
    if max(options.lengths) > limit:
        notes.append(f"lengths above {limit} are cut to max_position_embeddings = {limit}")
    lengths = sorted({min(length, int(limit)) for length in options.lengths})
    return replace(options, lengths=tuple(lengths), depths=tuple(sorted(set(options.depths))))


def _haystacks(
    loaded: LoadedModel, text: str, options: SuiteOptions, notes: list[str]
) -> list[Haystacks]:
    """Those that fit into their length; the others are noted."""
    found = []
    for form in options.forms:
        for length in options.lengths:
            try:
                haystacks = make_haystacks(
                    loaded,
                    text,
                    form=form,
                    length=length,
                    depths=options.depths,
                    samples=max(options.samples, options.prompts),
                    needles=options.needles,
                    queries=options.queries,
                    seed=options.seed,
                )
            except UsageError as error:
                notes.append(f"{form} needles in {length} tokens not measured: {error.cause}")
                continue
            found.append(haystacks)
    return found
