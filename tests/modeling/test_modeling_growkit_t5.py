"""The whole encoder-decoder: config, generation with caches, training, a folder with its code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_counts import kv_elements, parameters
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    T5ForConditionalGeneration,
)
from without_growkit import run_without_growkit

from growkit.modeling import GrowkitT5Config, GrowkitT5ForConditionalGeneration, GrowkitT5Model

KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "scalar": {"decoder_attention": "wgqa"},
    "column": {"decoder_attention": "wgqa", "wgqa_weights": "column", "wgqa_init": "random"},
    "row": {"decoder_attention": "wgqa", "wgqa_weights": "row"},
}
SOURCE = torch.arange(22).reshape(2, 11) * 5 % 64
TARGET = torch.arange(14).reshape(2, 7) * 3 % 64


def config_of(kind: str, **changes: Any) -> GrowkitT5Config:
    fields = {
        "vocab_size": 64,
        "d_model": 24,
        "d_kv": 6,
        "d_ff": 20,
        "num_layers": 1,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "decoder_num_key_value_heads": 2,
        "relative_attention_num_buckets": 8,
        "decoder_start_token_id": 0,
        "eos_token_id": None,
    }
    return GrowkitT5Config(**(fields | KINDS[kind] | changes))


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return GrowkitT5ForConditionalGeneration(config_of(kind, **changes)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_uncached(kind: str) -> None:
    model = model_of(kind).double()  # scores are not scaled: float32 rounds visibly
    mask = torch.ones_like(SOURCE)
    mask[0, :4] = 0
    made, cache = [], EncoderDecoderCache(DynamicCache(), DynamicCache())
    for use_cache in (True, False):
        given = {"past_key_values": cache} if use_cache else {}
        made.append(
            model.generate(
                SOURCE,
                attention_mask=mask,
                max_new_tokens=8,
                do_sample=False,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
                **given,
            )
        )
    assert torch.equal(made[0].sequences, made[1].sequences)
    for cached, plain in zip(made[0].logits, made[1].logits, strict=True):
        torch.testing.assert_close(cached, plain, atol=1e-9, rtol=1e-9)
    tokens = {"self_attention_cache": 8, "cross_attention_cache": 11}
    for name, length in tokens.items():
        for layer in getattr(cache, name).layers:
            assert layer.keys.shape == (2, 2, length, 6)
            elements = (layer.keys.numel() + layer.values.numel()) / (2 * length)
            assert elements == kv_elements(model.config)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_equals_sdpa_with_padding_and_in_bfloat16(kind: str) -> None:
    logits = []
    mask = torch.ones_like(SOURCE)
    mask[0, :4] = 0
    model = model_of(kind).double()
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found = model(input_ids=SOURCE, attention_mask=mask, decoder_input_ids=TARGET).logits
        logits.append(found)
        moved = SOURCE.clone()
        moved[0, :4] = 63  # padding is not read
        again = model(input_ids=moved, attention_mask=mask, decoder_input_ids=TARGET).logits
        torch.testing.assert_close(again, found)
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)
    half = model.bfloat16()(input_ids=SOURCE, attention_mask=mask, decoder_input_ids=TARGET)
    assert (half.logits.float() - logits[0]).abs().mean() < 0.05 * logits[0].std()


@pytest.mark.parametrize("kind", ["scalar", "column", "row"])
def test_two_steps_move_every_merge_weight(kind: str) -> None:
    model = model_of(kind).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".w_" in n}
    assert len(before) == 8  # keys and values of two attentions in two blocks
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        loss = model(input_ids=SOURCE, labels=TARGET).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name


def test_start_of_a_model_from_scratch() -> None:
    """The merge weights start in every block; the encoder is T5's; counts are the closed form's."""
    mean, random = model_of("scalar", decoder_num_key_value_heads=1), model_of("column")
    weights = [p for n, p in mean.named_parameters() if ".w_" in n]
    assert all((w == 0.25).all() for w in weights)
    drawn = torch.cat([p.flatten() for n, p in random.named_parameters() if ".w_" in n])
    assert 0.8 < float(drawn.std()) < 1.2
    for kind in KINDS:
        model = model_of(kind)
        for block in model.decoder.block:
            for attention in (block.layer[0].SelfAttention, block.layer[1].EncDecAttention):
                named = attention.named_parameters()
                count = sum(p.numel() for n, p in named if "relative" not in n)
                assert count == parameters(model.config, "decoder.block.0.layer.1.") - 24
        encoder = model.encoder.block[0].layer[0].SelfAttention
        assert encoder.k.weight.shape == (24, 24) and not hasattr(encoder, "w_k")


def test_without_sharing_it_is_t5() -> None:
    model = model_of("gqa", decoder_num_key_value_heads=4)
    theirs = T5ForConditionalGeneration(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    given = {"input_ids": SOURCE, "decoder_input_ids": TARGET}
    assert torch.equal(model(**given).logits, theirs(**given).logits)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"decoder_num_key_value_heads": 3}, "decoder_num_key_value_heads = 3"),
        ({"decoder_num_key_value_heads": 0}, "decoder_num_key_value_heads = 0"),
        ({"decoder_attention": "mla"}, "decoder_attention = 'mla'"),
        ({"wgqa_weights": "row"}, "wgqa_weights = 'row'"),
        ({"decoder_attention": "wgqa", "wgqa_weights": "all"}, "wgqa_weights = 'all'"),
        ({"decoder_attention": "wgqa", "wgqa_init": "zero"}, "wgqa_init = 'zero'"),
    ],
)
def test_config_errors_name_the_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(Exception, match=named):
        config_of("gqa", **fields)


STRANGER = """
import json, sys
sys.modules["growkit"] = None
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM
made = []
for folder in sys.argv[1:]:
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    logits = model(input_ids=torch.tensor(%s), decoder_input_ids=torch.tensor(%s)).logits
    made.append([type(model).__module__, type(base).__name__, logits.tolist()])
print("REPORT" + json.dumps(made))
"""


def test_a_user_without_growkit_gets_the_same_logits(tmp_path: Path) -> None:
    models = {kind: model_of(kind) for kind in ("gqa", "row")}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
        ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / kind, trust_remote_code=True)
        assert type(ours) is GrowkitT5ForConditionalGeneration
        assert type(AutoModel.from_pretrained(tmp_path / kind)) is GrowkitT5Model
    script = STRANGER % (SOURCE.tolist(), TARGET.tolist())
    folders = [tmp_path / kind for kind in models]
    stdout = run_without_growkit(script, *folders, cache=tmp_path)
    reports = json.loads(stdout.split("REPORT", 1)[1])
    for (module, base, logits), model in zip(reports, models.values(), strict=True):
        assert module.startswith("transformers_modules.") and base == "GrowkitT5Model"
        expected = model(input_ids=SOURCE, decoder_input_ids=TARGET).logits
        assert torch.equal(torch.tensor(logits), expected)
