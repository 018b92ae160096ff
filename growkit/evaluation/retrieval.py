"""Multi-needle retrieval: how often the model gives the answer that stands in its context.

N needles stand in a text and R of them are asked for, each by a prompt of its own (the protocol of
arXiv:2410.05258, section 3.4, scaled down). Two measures of the same prompts:

* ``exact``: greedy decoding gives the answer, token for token. Read off one pass over the true
  answer: each of its tokens has the largest logit, which is when greedy decoding would give it.
* ``ranked``: the true answer has a larger log-likelihood than the answers of all other needles of
  the context; a tie is wrong. A model that only learned which numbers stand in the text is at
  chance, 1 / N, so this also works where a model is too small to be exact.

Intervals are Wilson's 95 % ones. They take the prompts for independent; those of one context share
a text, so with R > 1 they are a little too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from growkit.core.progress import Progress, SilentProgress
from growkit.evaluation.model import LoadedModel
from growkit.evaluation.needles import Haystack, Haystacks
from growkit.verification.model_inputs import cache_keyword

NORMAL_975 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """A part of trials.

    Attributes:
        low, high: Wilson's 95 % interval.
        chance: of a model that guesses evenly.
    """

    correct: int
    trials: int
    accuracy: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True)
class Retrieval:
    """Accuracy of one form, length and depth.

    Attributes:
        form: of the needles.
        length: tokens of a prompt with its answer.
        depth: of the needle that is asked for; None for all depths together.
        exact: greedy decoding gives the answer.
        ranked: the answer is likelier than those of the other needles.
    """

    form: str
    length: int
    depth: float | None
    exact: Accuracy
    ranked: Accuracy


def measure_retrieval(
    loaded: LoadedModel, haystacks: Haystacks, *, progress: Progress | None = None
) -> list[Retrieval]:
    """Ask all questions; the result of all depths together is last.

    Args:
        progress: advanced by 1 a haystack.
    """
    bar = progress or SilentProgress()
    results: dict[float, list[tuple[bool, bool]]] = {depth: [] for depth in haystacks.depths}
    for haystack in haystacks.items:
        for depth, answered in zip(haystack.depths, ask(loaded, haystack), strict=True):
            results[depth].append(answered)
        bar.advance(1)
    every = [pair for pairs in results.values() for pair in pairs]
    rank_chance = 1 / len(haystacks.items[0].needles)
    return [
        Retrieval(
            haystacks.form,
            haystacks.length,
            depth,
            accuracy([exact for exact, _ in pairs], haystacks.guess),
            accuracy([ranked for _, ranked in pairs], rank_chance),
        )
        for depth, pairs in [*results.items(), (None, every)]
    ]


def ask(loaded: LoadedModel, haystack: Haystack) -> list[tuple[bool, bool]]:
    """(exact, ranked) of each needle that is asked for."""
    count = len(haystack.needles)
    rows = [
        (needle.question, other.answer)
        for needle in haystack.needles[: len(haystack.depths)]
        for other in haystack.needles
    ]
    scores, greedy = continuation_scores(loaded, haystack.context, rows)
    result = []
    for query in range(len(haystack.depths)):
        own = scores[query * count : (query + 1) * count]
        others = [score for i, score in enumerate(own) if i != query]
        result.append((greedy[query * count + query], all(own[query] > score for score in others)))
    return result


@torch.no_grad()
def continuation_scores(
    loaded: LoadedModel,
    context: Sequence[int],
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> tuple[list[float], list[bool]]:
    """Log-likelihood in nats of each row's answer after context and question, and whether greedy
    decoding gives it.

    The context runs once: its cache is repeated for the rows. A model without a cache that can be
    repeated runs whole rows.

    Args:
        rows: (question, answer), each of at least one token.
    """
    model: Any = loaded.model
    seen = model.base_model(input_ids=_row(context, loaded), use_cache=True)
    keyword = cache_keyword(model)
    past: Any = getattr(seen, keyword, None)
    kept: dict[str, Any] = {}
    before: Sequence[int] = context
    if _repeats(past):
        past.batch_repeat_interleave(len(rows))
        kept, before = {keyword: past, "use_cache": True}, ()
    tokens = [[*before, *question, *answer] for question, answer in rows]
    longest = max(len(row) for row in tokens)
    # Padding on the right is never seen by what stands before it.
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=loaded.device)
    logits = model(input_ids=ids, **kept).logits
    scores, greedy = [], []
    for i, (_, answer) in enumerate(rows):
        end = len(tokens[i])
        expected = ids[i, end - len(answer) : end]
        predicted = logits[i, end - len(answer) - 1 : end - 1].double()
        chosen = torch.log_softmax(predicted, -1).gather(-1, expected[:, None])
        scores.append(chosen.sum().item())
        greedy.append(bool((predicted.argmax(-1) == expected).all()))
    return scores, greedy


def _repeats(past: Any) -> bool:
    """Whether all that a cache holds of a text can be repeated: keys and values, but no states of
    linear attention, which transformers leaves as they are."""
    if not hasattr(past, "batch_repeat_interleave"):
        return False
    return all(
        hasattr(layer, "batch_repeat_interleave") and not hasattr(layer, "conv_states")
        for layer in getattr(past, "layers", ())
    )


def accuracy(results: Sequence[bool], chance: float) -> Accuracy:
    """The part of ``results`` that is true, with its interval."""
    correct, trials = sum(results), len(results)
    return Accuracy(correct, trials, correct / trials, *wilson(correct, trials), chance)


def wilson(correct: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a binomial proportion (Wilson 1927)."""
    z = NORMAL_975
    share, scale = correct / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * (share * (1 - share) / trials + (z / (2 * trials)) ** 2) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _row(tokens: Sequence[int], loaded: LoadedModel) -> Tensor:
    return torch.tensor([list(tokens)], device=loaded.device)
