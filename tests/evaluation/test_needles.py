"""Prompts are what they say: needles whole, at their depth, as long as asked, the same again."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from known_models import KnownModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from growkit.core.errors import UsageError
from growkit.evaluation.context_noise import PARTS, part_masks
from growkit.evaluation.needles import FORMS, Haystacks, make_haystacks, prompt

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def make(words: PreTrainedTokenizerFast, text: str, form: str, **changes: object) -> Haystacks:
    settings = {
        "form": form,
        "length": 192,
        "depths": DEPTHS,
        "samples": 2,
        "needles": 3,
        "queries": 2,
        "seed": 0,
    }
    return make_haystacks(KnownModel.loaded(words, "even"), text, **(settings | changes))


@pytest.mark.parametrize("form", FORMS)
def test_every_needle_stands_whole_where_its_place_says(words, text, form: str) -> None:
    for haystack in make(words, text, form).items:
        for needle, place in zip(haystack.needles, haystack.places, strict=True):
            assert haystack.context[place : place + len(needle.tokens)] == needle.tokens
            assert needle.tokens[needle.start : needle.end] == needle.answer
        longest = max(len(n.question) for n in haystack.needles[:2])
        answer = max(len(n.answer) for n in haystack.needles)
        assert len(haystack.context) + longest + answer == 192
        assert haystack.context[0] == words.bos_token_id, "as the tokenizer begins every text"


def test_cities_read_as_a_person_would_write_them(words, text) -> None:
    haystack = make(words, text, "city").items[0]
    decoded = words.decode(prompt(haystack, 1).tolist())
    needle = haystack.needles[1]
    question, answer = words.decode(needle.question), words.decode(needle.answer)
    assert decoded.endswith(question) and question.startswith("\nThe magic number of ")
    assert f"{question}{answer}.\n" in decoded and answer.strip().isdigit()
    numbers = {words.decode(n.answer) for n in haystack.needles}
    assert len(numbers) == len(haystack.needles) == 3


def test_keys_and_values_of_copies_share_no_token(words, text) -> None:
    for haystack in make(words, text, "copy").items:
        tokens = [token for needle in haystack.needles for token in needle.tokens]
        assert len(set(tokens)) == len(tokens)
        assert all(n.question + n.answer == n.tokens for n in haystack.needles)


@pytest.mark.parametrize("form", FORMS)
def test_depths_are_asked_equally_and_met(words, text, form: str) -> None:
    haystacks = make(words, text, form, samples=4)
    asked = [depth for haystack in haystacks.items for depth in haystack.depths]
    assert sorted(asked) == sorted(DEPTHS * 4)
    for haystack in haystacks.items:
        needles = sum(len(n.tokens) for n in haystack.needles)
        filler = len(haystack.context) - needles
        for depth, place in zip(haystack.depths, haystack.places, strict=False):
            before = place - sum(
                len(n.tokens)
                for n, other in zip(haystack.needles, haystack.places, strict=True)
                if other < place
            )
            assert before == 1 + round(depth * (filler - 1))


def test_the_same_seed_gives_the_same_prompts(words, text) -> None:
    first, again = make(words, text, "city"), make(words, text, "city")
    assert first == again
    other = make(words, text, "city", seed=1)
    assert [h.context for h in other.items] != [h.context for h in first.items]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    form=st.sampled_from(FORMS),
    length=st.integers(150, 300),
    needles=st.integers(2, 4),
    seed=st.integers(0, 9),
    depth=st.floats(0, 1),
)
def test_parts_of_a_prompt_are_a_partition(words, text, form, length, needles, seed, depth) -> None:
    changes = {"length": length, "needles": needles, "seed": seed, "depths": (depth,)}
    try:
        haystacks = make(words, text, form, queries=1, samples=1, **changes)
    except UsageError:
        assume(False)
    haystack = haystacks.items[0]
    masks = part_masks(haystack, 0)
    assert (masks.sum(0) == 1).all()
    ids = prompt(haystack, 0)
    needle = haystack.needles[0]
    assert tuple(ids[masks[PARTS.index("answer")]].tolist()) == needle.answer
    assert tuple(ids[masks[PARTS.index("question")]].tolist()) == needle.question
    assert masks[PARTS.index("needle")].sum() == len(needle.tokens) - len(needle.answer)


def test_a_tokenizer_that_knows_no_numbers_is_refused(text) -> None:
    """All answers would be one unknown token, which no model can tell apart."""
    letters = ["?", *sorted(set(text) - set("0123456789"))]
    vocab = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    unknowing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    with pytest.raises(UsageError, match="the same tokens for different"):
        make(unknowing, text, "city", length=300)


def test_what_does_not_fit_is_refused(words, text) -> None:
    with pytest.raises(UsageError, match="leave 0 of 40 tokens"):
        make(words, text, "city", length=40)
    with pytest.raises(UsageError, match="different tokens"):
        make(words, "a b c d " * 500, "copy", length=100)
    with pytest.raises(UsageError, match="The text gives"):
        make(words, "a short text", "copy")
