"""A grown vocabulary: rows follow their tokens, the function stays, the files say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers_made import ENGLISH, GERMAN, byte_level, metaspace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError, VerificationFailed
from growkit.diff.folders import diff_checkpoints
from growkit.growing import grow_checkpoint
from growkit.optimizer_state.store import FOLDER, read_store
from growkit.surgery.request import GrowthRequest
from growkit.verification import verify_checkpoints
from growkit.vocabulary.tokens import read_tokens

ROWS = 320  # 20 more than the tokenizer has tokens
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def made(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=0, bos_token_id=0,
        max_position_embeddings=512, initializer_range=0.12, **changes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_level(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 40]}))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("source") / "ckpt")


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on more: most tokens are known, at other ids."""
    return byte_level(tmp_path_factory.mktemp("german") / "tok", [*ENGLISH, GERMAN], 500)


def grown(source: Path, out: Path, *, verify: bool = False, **request: Any) -> dict[str, Any]:
    _, manifest = grow_checkpoint(source, out, GrowthRequest(**request), verify=verify)
    return manifest


def by_hand(old: Path, new: Path, table: torch.Tensor, method: str) -> dict[int, torch.Tensor]:
    """Row of every token of the new tokenizer; by the token's string alone."""
    before, after = (read_tokens(folder) for folder in (old, new))
    mean = table[: before.size].double().mean(0)
    rows = {}
    for token, index in after.ids.items():
        if token in before.ids:
            rows[index] = table[before.ids[token]]
        elif method == "zero":
            rows[index] = torch.zeros_like(table[0])
        elif method == "mean":
            rows[index] = mean.to(table.dtype)
        else:
            pieces = [piece.id for piece in before.backend.model.tokenize(token)]
            rows[index] = table[pieces].double().mean(0).to(table.dtype)
    return rows


@pytest.mark.parametrize("method", ["subwords", "mean", "zero"])
def test_rows_against_a_naive_construction(
    method: str, source: Path, german: Path, tmp_path: Path
) -> None:
    grown(source, tmp_path / "out", tokenizer=str(german), vocab_init=method)
    old, new = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    for name in (EMBED, HEAD):
        assert len(new[name]) == read_tokens(german).size
        for index, row in by_hand(source, german, old[name], method).items():
            assert torch.equal(new[name][index], row), (name, index)
    same = set(old) - {EMBED, HEAD}
    assert all(torch.equal(old[name], new[name]) for name in same)


@pytest.mark.parametrize("tied", [False, True])
def test_old_text_gives_the_same_logits_of_old_tokens(
    tied: bool, german: Path, tmp_path: Path
) -> None:
    """Through transformers alone, with the two tokenizers' own ids."""
    source = made(tmp_path / "a", tie_word_embeddings=tied)
    grown(source, tmp_path / "b", tokenizer=str(german))
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    before, after = (read_tokens(tmp_path / name) for name in "ab")
    common = sorted(set(before.ids) & set(after.ids))
    tokens = [token for token in common if before.ids[token] != after.ids[token]]
    ids_a, ids_b = ([tokenizer.ids[token] for token in tokens] for tokenizer in (before, after))
    assert len(tokens) > 10
    with torch.no_grad():
        logits_a = a(torch.tensor([ids_a])).logits[..., [before.ids[t] for t in common]]
        logits_b = b(torch.tensor([ids_b])).logits[..., [after.ids[t] for t in common]]
    assert torch.equal(logits_a, logits_b)


@pytest.mark.parametrize(
    "further", [{}, {"hidden": "x2", "layers": 3, "pad_vocab_to": 64}, {"ffn": "x2", "vocab": 600}]
)
def test_verified_together_with_other_growths(
    further: dict[str, Any], source: Path, german: Path, tmp_path: Path
) -> None:
    manifest = grown(
        source, tmp_path / "out", verify=True, tokenizer=str(german), vocab_init="noise-mean",
        **further,
    )  # fmt: skip
    proof = manifest["verification"]
    assert proof["passed"] is True
    figures = proof["vocabulary"]
    assert figures["common"] < figures["rows_a"] == ROWS
    assert 0 < figures["new_token_share"] < 1 and figures["bits_per_byte_a"] > 0
    share = figures["new_token_share"]
    assert figures["kl_of_old_tokens"] >= -np.log(1 - share) - 1e-6  # Jensen
    assert "of the probability on new ones" in proof["summary"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] % further.get("pad_vocab_to", 1) == 0


def test_a_row_at_the_wrong_token_is_caught(source: Path, german: Path, tmp_path: Path) -> None:
    """The negative control: two old tokens exchange their rows in the written output matrix."""
    out = tmp_path / "out"
    grown(source, out, tokenizer=str(german))
    tensors = load_file(out / "model.safetensors")
    before, after = (read_tokens(folder) for folder in (source, german))
    first, second = (after.ids[t] for t in sorted(set(before.ids) & set(after.ids))[70:72])
    tensors[HEAD][[first, second]] = tensors[HEAD][[second, first]]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    report = verify_checkpoints(source, out)
    assert report.passed is False
    with pytest.raises(VerificationFailed):
        report.raise_if_failed()


def test_a_damaged_new_row_is_named(source: Path, german: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    grown(source, out, tokenizer=str(german))
    tensors = load_file(out / "model.safetensors")
    new = set(read_tokens(german).ids) - set(read_tokens(source).ids)
    tensors[EMBED][read_tokens(german).ids[min(new)]] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    report = verify_checkpoints(source, out)
    assert report.passed is False and EMBED in report.cause


def test_the_folder_speaks_the_new_tokenizer(source: Path, german: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "src").mkdir()
    shutil.copytree(source, tmp_path / "src", dirs_exist_ok=True)
    (tmp_path / "src/merges.txt").write_text("of the old one")
    (tmp_path / "src/chat_template.jinja").write_text("{{ messages }}")
    manifest = grown(tmp_path / "src", out, tokenizer=str(german))
    assert not (out / "merges.txt").exists()
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").read_bytes() == (german / "tokenizer.json").read_bytes()
    before, after = read_tokens(source), read_tokens(german)
    token_of = {index: token for token, index in before.ids.items()}
    moved = [after.ids[token_of[index]] for index in (0, 40)]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == moved
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == moved[0]
    assert manifest["request"]["tokenizer"] == german.name  # no local path
    # The same growth again finds it whole, and the plan explains every tensor.
    _, again = grow_checkpoint(
        tmp_path / "src", out, GrowthRequest(tokenizer=str(german)), verify=False
    )
    assert again["already_there"]
    with open_checkpoint(tmp_path / "src") as a, open_checkpoint(out) as b:
        assert diff_checkpoints(a, b)["as_grown"] is True


def test_added_tokens(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "add.txt"
    file.write_text("<|user|>\tspecial\nGrowkit\n<|end|>\n", encoding="utf-8")
    grown(source, tmp_path / "out", verify=True, add_tokens=str(file))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("<|user|>Growkit", add_special_tokens=False).input_ids
    size = read_tokens(source).size
    assert ids == [size, size + 1]  # <|end|> was there
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Growkit"
    table = load_file(tmp_path / "out/model.safetensors")[EMBED]
    assert len(table) == ROWS  # they fit into the padding
    old = load_file(source / "model.safetensors")[EMBED]
    pieces = read_tokens(source).backend.encode("Growkit").ids
    assert torch.equal(table[size + 1], old[pieces].double().mean(0).float())


@pytest.mark.parametrize("method", ["subwords", "mean"])
def test_a_bias_bounds_the_probability_of_new_tokens(
    german: Path, tmp_path: Path, method: str
) -> None:
    """At every position, by the inequality of means; without the bias it is many times as much."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=300, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=4, eos_token_id=0, bos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder := tmp_path / "phi")
    byte_level(folder)
    shares = []
    for name, bias in (("plain", {}), ("biased", {"new_token_bias": 0.002})):
        request = {"tokenizer": str(german), "vocab_init": method, **bias}
        proof = grown(folder, tmp_path / name, verify=True, **request)["verification"]
        assert proof["status"] == "passed" and proof["max_difference"] == 0.0
        shares.append(proof["vocabulary"]["largest_new_token_share"])
    assert shares[0] > 0.05 and 1e-5 < shares[1] <= 0.002
    plain, biased = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "biased"))
    moved = [name for name in plain if not torch.equal(plain[name], biased[name])]
    assert moved == ["lm_head.bias"]
    assert (biased["lm_head.bias"] <= plain["lm_head.bias"]).all()
    with pytest.raises(UsageError, match="logits that nothing bounds"):
        grown(folder, tmp_path / "no", **{**request, "vocab_init": "zero"})


def test_what_cannot_be_grown_is_refused(source: Path, german: Path, tmp_path: Path) -> None:
    for request, message in (
        ({"tokenizer": str(tmp_path)}, r"holds no tokenizer\.json"),
        ({"vocab": 100}, "fewer than the 320"),
        ({"tokenizer": str(german), "vocab_init": "average"}, "'average' is not known"),
        ({"pad_vocab_to": 0}, "is no multiple"),
        ({"vocab": "+8", "new_token_bias": 0.1}, "the head of llama stores no bias"),
        ({"vocab": "+8", "new_token_bias": 0}, "is no share of the probability"),
        ({"add_tokens": str(tmp_path / "none.txt")}, "none.txt"),
    ):
        with pytest.raises(UsageError, match=message):
            grown(source, tmp_path / "out", **request)
    assert not (tmp_path / "out").exists()


def test_optimizer_rows_move_with_their_tokens(source: Path, german: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(60)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    old = optimizer.state[model.get_input_embeddings().weight]
    grown(folder, tmp_path / "out", tokenizer=str(german))
    state = read_store(tmp_path / "out" / FOLDER).parameters[EMBED].moments
    before, after = read_tokens(source), read_tokens(german)
    for kind in ("exp_avg", "exp_avg_sq"):
        new = torch.from_numpy(state[kind].read())
        for token, index in after.ids.items():
            expected = old[kind][before.ids[token]] if token in before.ids else 0 * old[kind][0]
            assert torch.equal(new[index], expected), (kind, token)


def test_an_encoder_that_generation_calls_by_itself_knows_the_common_tokens(tmp_path: Path) -> None:
    """Some old tokens are gone, so that both models are seen through other numbers."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=340, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "a")
    metaspace(tmp_path / "a")
    new = metaspace(tmp_path / "tok", [*ENGLISH, GERMAN], 520)
    proof = grown(tmp_path / "a", tmp_path / "b", verify=True, tokenizer=str(new))["verification"]
    assert proof["passed"] is True and proof["vocabulary"]["dropped"] > 0
    assert proof["cached"] and all(steps["within"] for steps in proof["cached"])


def test_layer_by_layer_too(source: Path, german: Path, tmp_path: Path) -> None:
    grown(source, tmp_path / "out", tokenizer=str(german))
    report = verify_checkpoints(source, tmp_path / "out", layerwise="on")
    assert report.passed is True and report.vocabulary is not None


def test_rows_for_tokens_that_were_added_without_any(source: Path, tmp_path: Path) -> None:
    """The remedy for an embedding that was not resized: the folder's own tokenizer."""
    folder = shutil.copytree(source, tmp_path / "a")
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(280)
    model.save_pretrained(folder)
    request = GrowthRequest(tokenizer=str(folder))
    plan, manifest = grow_checkpoint(folder, tmp_path / "b", request)
    assert plan.sizes["vocab"] == 298 and manifest["verification"]["passed"]
    assert manifest["verification"]["vocabulary"]["common"] == 280


def test_a_few_rows_are_not_shown_as_a_factor_of_one() -> None:
    from rich.table import Table

    from growkit.cli.plan_view import _change

    table = Table("axis", "before", "after", "")
    for after in (49_152, 49_155, 51_200):
        _change(table, "vocabulary", 49_152, after, lambda value: f"{value:,}")
    assert [str(cell) for cell in table.columns[3].cells] == ["", "+3", "x1.042"]
