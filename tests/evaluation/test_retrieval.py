"""A model that retrieves scores 1, one that cannot is at chance, and the cache changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_models import KnownModel
from tiny_checkpoints import diffllama_config, gda_config, llama_config, make_folder
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, GPT2Config, GPT2LMHeadModel
from variant_checkpoints import VARIANTS, write_variant

from growkit.evaluation.model import LoadedModel
from growkit.evaluation.needles import FORMS, make_haystacks
from growkit.evaluation.retrieval import (
    Retrieval,
    accuracy,
    ask,
    continuation_scores,
    measure_retrieval,
    wilson,
)
from growkit.verification.loading import load_model
from growkit.verification.written_folder import open_folder

DEPTHS = (0.0, 0.5, 1.0)


def retrieval(words, text: str, kind: str, form: str, samples: int = 2) -> list[Retrieval]:
    loaded = KnownModel.loaded(words, kind)
    settings = {"form": form, "length": 160, "depths": DEPTHS, "samples": samples}
    haystacks = make_haystacks(loaded, text, **settings, needles=4, queries=2, seed=0)
    return measure_retrieval(loaded, haystacks)


@pytest.mark.parametrize("form", FORMS)
def test_an_induction_model_is_perfect_at_every_depth(words, text, form: str) -> None:
    found = retrieval(words, text, "induction", form)
    assert [result.depth for result in found] == [*DEPTHS, None]
    for result in found:
        assert result.exact.accuracy == result.ranked.accuracy == 1.0
        assert result.ranked.chance == 0.25
    assert found[-1].ranked.trials == 6


@pytest.mark.parametrize("form", FORMS)
def test_a_random_model_is_at_chance(words, text, form: str) -> None:
    every = retrieval(words, text, "random", form, samples=60)[-1]
    assert every.exact.correct == 0 and every.exact.chance < 1e-3
    assert every.ranked.trials == 180
    assert every.ranked.low < 0.25 < every.ranked.high < 0.35


def test_a_tie_is_no_retrieval(words, text) -> None:
    assert retrieval(words, text, "even", "copy")[-1].ranked.correct == 0


def test_another_needles_answer_is_wrong(words, text) -> None:
    """Negative control: the needles' values change places in the context, not in the question."""
    loaded = KnownModel.loaded(words, "induction")
    settings = {"form": "copy", "length": 128, "depths": (0.5,), "samples": 1}
    haystack = make_haystacks(loaded, text, **settings, needles=2, queries=1, seed=0).items[0]
    assert ask(loaded, haystack) == [(True, True)]
    first, second = (list(needle.answer) for needle in haystack.needles)
    context = list(haystack.context)
    for place, needle, other in zip(
        haystack.places, haystack.needles, (second, first), strict=True
    ):
        context[place + needle.start : place + needle.end] = other
    swapped = type(haystack)(tuple(context), haystack.needles, haystack.places, haystack.depths)
    assert ask(loaded, swapped) == [(False, False)]


# Linear attention: in every layer, in some, and beside ordinary attention in each.
LINEAR: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "falcon_h1": {
        "num_hidden_layers": 2, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8,
        "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "head_dim": 8,
    },
}  # fmt: skip
MODELS = ["llama", "gda", "gda-shared", "diffllama", "gpt2", "gemma2-sliding", *LINEAR, *VARIANTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.nn.Module]:
    path = tmp_path_factory.mktemp("models")
    folders = {
        "llama": make_folder(path / "llama", llama_config()),
        "gda": make_folder(path / "gda", gda_config()),
        "gda-shared": make_folder(path / "gda-shared", gda_config(own=False)),
        "diffllama": make_folder(path / "diffllama", diffllama_config()),
        **{name: write_variant(path / f"v-{name}", name) for name in VARIANTS},
    }
    found = {name: load_model(open_folder(f), torch.float64) for name, f in folders.items()}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    found["gpt2"] = GPT2LMHeadModel(config).double().eval()
    sliding = Gemma2Config(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        sliding_window=5,
    )
    found["gemma2-sliding"] = AutoModelForCausalLM.from_config(sliding).double().eval()
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "eos_token_id": None,
             "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip
    for name, fields in LINEAR.items():
        linear = AutoConfig.for_model(name, **sizes | fields)
        found[name] = AutoModelForCausalLM.from_config(linear).double().eval()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_scores_with_a_cache_are_those_of_whole_rows(models, name: str) -> None:
    """Oracle: every row by itself, without cache and without padding."""
    loaded = LoadedModel(Path("x"), models[name], None, torch.device("cpu"), "float64")
    generator = torch.Generator().manual_seed(1)
    draw = torch.randint(0, 256, (60,), generator=generator).tolist()
    context, rows = draw[:20], [(draw[20:25], draw[25:29]), (draw[30:33], draw[33:40])]
    logits = loaded.model(input_ids=torch.tensor([[*context, *rows[0][0]]])).logits
    greedy_token = int(logits[0, -1].argmax())
    rows.append((rows[0][0], [greedy_token]))
    scores, greedy = continuation_scores(loaded, context, rows)
    for (question, answer), score in zip(rows, scores, strict=True):
        ids = torch.tensor([[*context, *question, *answer]])
        found = torch.log_softmax(loaded.model(input_ids=ids, use_cache=False).logits[0], -1)
        before = len(context) + len(question) - 1
        expected = sum(found[before + i, token].item() for i, token in enumerate(answer))
        # Mamba's scan is in float32 whatever the weights are.
        assert score == pytest.approx(expected, rel=1e-6 if name in LINEAR else 1e-9)
    assert greedy[2] and not greedy[0]


def test_exact_is_what_generation_gives(models) -> None:
    """Oracle: transformers' own greedy generation."""
    loaded = LoadedModel(Path("x"), models["gda"], None, torch.device("cpu"), "float64")
    prompt = list(range(5, 25))
    generated = loaded.model.generate(
        torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0
    )[0, 20:].tolist()
    other = [*generated[:3], (generated[3] + 1) % 256]
    rows = [(prompt[15:], generated), (prompt[15:], other)]
    scores, greedy = continuation_scores(loaded, prompt[:15], rows)
    assert greedy == [True, False] and scores[0] > scores[1]


def test_wilson_interval_of_published_cases() -> None:
    # Newcombe 1998 (Statistics in Medicine 17), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for correct, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(correct, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_an_interval_holds_what_was_seen(results: list[bool]) -> None:
    found = accuracy(results, 0.5)
    assert 0 <= found.low <= found.accuracy + 1e-12 and found.accuracy <= found.high + 1e-12 <= 1.1
