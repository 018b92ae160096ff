"""Needles in held-out text: the prompts of the retrieval and of the noise-in-context measures.

Two forms, both read off the end of the text, so that a model which was never taught to answer
questions can do them:

* ``city``: lines "The magic number of Rome is 4821." stand in the text, and the question is the
  beginning of one of them (the needles of arXiv:2410.05258, section 3.4, with shorter numbers).
* ``copy``: a needle is a random sequence of tokens, a key and a value; the question is a key. A
  model of any size and language can do it that has learned to continue what it has seen before
  (induction heads, arXiv:2209.11895).

Sequences are built of token ids and are a pure function of the arguments and the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from growkit.core.errors import UsageError
from growkit.evaluation.model import LoadedModel
from growkit.verification.windows import token_windows

FORMS = ("city", "copy")
KEY_TOKENS = VALUE_TOKENS = 4
NUMBERS = range(1000, 10000)
# What must be left of the text, or there is no haystack.
LEAST_TEXT = 8
CITIES = (
    *("Rome", "Paris", "London", "Berlin", "Madrid", "Vienna", "Athens", "Dublin", "Lisbon"),
    *("Oslo", "Prague", "Warsaw", "Cairo", "Delhi", "Tokyo", "Lima", "Moscow", "Venice", "Milan"),
    *("Geneva", "Boston", "Chicago", "Denver", "Toronto", "Sydney", "Nairobi", "Havana", "Seoul"),
)


@dataclass(frozen=True)
class Needle:
    """One needle as token ids.

    Attributes:
        tokens: what stands in the text; ``tokens[start:end]`` is the answer.
        question: what asks for it at the end of the text.
        answer: what continues the question.
    """

    tokens: tuple[int, ...]
    start: int
    end: int
    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Haystack:
    """A text with needles in it.

    Attributes:
        context: token ids, without a question; the first is the tokenizer's first token, if it has
            one, else of the text.
        needles: those that are asked for first.
        places: where in the context each needle begins.
        depths: of the needles that are asked for, 0 (the beginning) to 1.
    """

    context: tuple[int, ...]
    needles: tuple[Needle, ...]
    places: tuple[int, ...]
    depths: tuple[float, ...]


@dataclass(frozen=True)
class Haystacks:
    """Haystacks of one form and length; their questions go through the depths in turn.

    Attributes:
        depths: each haystack asks at as many of them as it has queries.
        guess: probability that a number, or tokens of the text, drawn evenly are the answer.
    """

    form: str
    length: int
    depths: tuple[float, ...]
    guess: float
    items: tuple[Haystack, ...]


def make_haystacks(
    loaded: LoadedModel,
    text: str,
    *,
    form: str,
    length: int,
    depths: Sequence[float],
    samples: int,
    needles: int,
    queries: int,
    seed: int,
) -> Haystacks:
    """Haystacks for ``samples`` questions at each depth, a pure function of the arguments.

    Args:
        text: what the needles stand in.
        form: of :data:`FORMS`.
        length: tokens of a whole prompt: context, question and answer.
        depths: where needles that are asked for stand, 0 to 1; the others stand anywhere.
        needles: in a haystack.
        queries: needles of a haystack that are asked for, each by a prompt of its own.

    Raises:
        UsageError: the needles do not fit into the length, or the text has too few tokens.
        CheckpointError: the tokenizer gives ids outside the vocabulary.
    """
    model: Any = loaded.model
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    count = haystack_count(samples, len(depths), queries)
    encode = plain_encoder(loaded)
    # Each haystack has a text of its own, as long as the text is long enough for that.
    windows = token_windows(
        text, encode, tokens=count * length, window=length, vocab_size=vocab
    ).tolist()
    if len(windows[0]) < length:
        raise UsageError(
            f"The text gives {len(windows[0])} tokens, and prompts have {length}.",
            "Give a longer --text, or shorter --lengths.",
        )
    special = set(loaded.tokenizer.all_special_ids)
    pool = sorted({token for window in windows for token in window} - special)
    first = _first_token(loaded.tokenizer)
    items = []
    for index in range(count):
        generator = random.Random(f"{seed} {form} {length} {index}")
        if form == "city":
            found = _city_needles(generator, needles, encode)
        else:
            found = _copy_needles(generator, needles, pool)
        turns = range(index * queries, (index + 1) * queries)
        asked = tuple(depths[turn % len(depths)] for turn in turns)
        filler = [*first, *windows[index % len(windows)]]
        items.append(_haystack(generator, form, length, filler, found, asked))
    guess = 1 / len(NUMBERS) if form == "city" else float(len(pool)) ** -VALUE_TOKENS
    return Haystacks(form, length, tuple(depths), guess, tuple(items))


def haystack_count(samples: int, depths: int, queries: int) -> int:
    """Haystacks that ask ``samples`` questions at each of so many depths."""
    return -(-samples * depths // queries)


def plain_encoder(loaded: LoadedModel) -> Callable[[str], list[int]]:
    """The tokenizer without the special tokens that it puts around a text."""
    return lambda text: list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt(haystack: Haystack, query: int) -> torch.Tensor:
    """Token ids [n] of the context and a question, without the answer."""
    return torch.tensor([*haystack.context, *haystack.needles[query].question])


def _city_needles(
    generator: random.Random, count: int, encode: Callable[[str], list[int]]
) -> list[Needle]:
    cities = generator.sample(CITIES, count)
    numbers = generator.sample(NUMBERS, count)
    found = []
    for city, number in zip(cities, numbers, strict=True):
        question = f"\nThe magic number of {city} is"
        line = encode(f"{question} {number}.\n")
        # Where the tokens of the question end is seen in the whole: a tokenizer need not cut there
        # as it cuts the question alone.
        whole = encode(f"{question} {number}")
        start, end = _common(encode(question), whole), _common(whole, line)
        found.append(Needle(tuple(line), start, end, tuple(whole[:start]), tuple(whole[start:])))
    different = ({needle.question for needle in found}, {needle.answer for needle in found})
    if min(map(len, different)) < count:
        raise UsageError(
            "The tokenizer gives the same tokens for different cities or numbers.",
            "Use the form 'copy'.",
        )
    return found


def _copy_needles(generator: random.Random, count: int, pool: Sequence[int]) -> list[Needle]:
    size = KEY_TOKENS + VALUE_TOKENS
    if len(pool) < size * count:
        raise UsageError(
            f"{count} needles of the form 'copy' take {size * count} different tokens, and the "
            f"text has {len(pool)}.",
            "Give fewer --needles or a longer --text.",
        )
    drawn = generator.sample(pool, size * count)
    parts = [tuple(drawn[i * size : (i + 1) * size]) for i in range(count)]
    return [Needle(part, KEY_TOKENS, size, part[:KEY_TOKENS], part[KEY_TOKENS:]) for part in parts]


def _haystack(
    generator: random.Random,
    form: str,
    length: int,
    filler: Sequence[int],
    needles: Sequence[Needle],
    depths: tuple[float, ...],
) -> Haystack:
    """The needles in as much of the filler as the length leaves room for."""
    question = max(len(needle.question) for needle in needles[: len(depths)])
    answer = max(len(needle.answer) for needle in needles)
    room = length - question - answer - sum(len(needle.tokens) for needle in needles)
    if room < LEAST_TEXT:
        raise UsageError(
            f"{len(needles)} needles of the form {form!r} with question and answer leave "
            f"{max(room, 0)} of {length} tokens for the text that they stand in.",
            "Give longer --lengths or fewer --needles.",
        )
    filler = filler[:room]
    spots = [1 + round(depth * (room - 1)) for depth in depths]
    spots += [generator.randint(1, room) for _ in needles[len(depths) :]]
    context, places = _inserted(filler, needles, spots)
    return Haystack(tuple(context), tuple(needles), tuple(places), depths)


def _inserted(
    filler: Sequence[int], needles: Sequence[Needle], spots: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The text with needle i before its token ``spots[i]``, and where each needle begins."""
    context: list[int] = []
    places = [0] * len(needles)
    done = 0
    for i in sorted(range(len(needles)), key=lambda i: (spots[i], i)):
        context += filler[done : spots[i]]
        done, places[i] = spots[i], len(context)
        context += needles[i].tokens
    return [*context, *filler[done:]], places


def _first_token(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: begin-of-sequence, or nothing."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    usual = list(tokenizer("a")["input_ids"])
    return usual[: usual.index(plain[0])] if plain and plain[0] in usual else []


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
