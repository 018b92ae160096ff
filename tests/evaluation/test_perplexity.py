"""Perplexity of a text: every token once, the figures of transformers' own loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import gda_config, make_folder

from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.evaluation.model import load
from growkit.evaluation.perplexity import score_text, spans

TEXT = "the signal heads attend to the fact and the noise heads to everything else. " * 4


@given(st.integers(2, 400), st.integers(2, 64), st.data())
def test_every_token_is_predicted_once(total: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    seen: list[int] = []
    for start, end, first in spans(total, window, stride):
        assert end - start <= window
        assert first > start, "a token needs at least one token of context"
        if start:
            assert first - start >= window - stride
        seen += range(first, end)
    assert seen == list(range(1, total))


def test_one_window_is_the_models_own_loss(folder: Path) -> None:
    loaded = load(folder, dtype="float64")
    score = score_text(loaded, TEXT, window=512)
    ids = torch.tensor([loaded.tokenizer(TEXT)["input_ids"]])
    loss = float(loaded.model(input_ids=ids, labels=ids).loss)
    assert score.loss == pytest.approx(loss, rel=1e-6)
    assert score.tokens == ids.shape[1] - 1
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.bits_per_byte == pytest.approx(score.loss / math.log(2) * score.tokens / len(TEXT))


def test_windows_give_the_mean_over_all_tokens(folder: Path) -> None:
    """A naive loop: token i from the tokens of its own window before it."""
    loaded = load(folder, dtype="float64")
    window, stride = 32, 20
    score = score_text(loaded, TEXT, window=window, stride=stride)
    ids = torch.tensor(loaded.tokenizer(TEXT)["input_ids"])
    losses = []
    for position in range(1, len(ids)):
        number = max(0, math.ceil((position + 1 - window) / stride))
        start = min(number * stride, len(ids) - 1)
        context = ids[start:position][None]
        logits = loaded.model(input_ids=context).logits[0, -1]
        losses.append(-torch.log_softmax(logits, -1)[ids[position]].item())
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    wider = score_text(loaded, TEXT, window=64, stride=40)
    assert wider.loss != pytest.approx(score.loss, rel=1e-6), "the context must matter"


def test_a_window_longer_than_the_model_is_cut(folder: Path) -> None:
    loaded = load(folder)
    assert score_text(loaded, TEXT, window=100_000).window == 512


def test_a_stride_that_skips_tokens_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="stride"):
        score_text(load(folder), TEXT, window=16, stride=16)


def test_the_command_scores_each_text(folder: Path, tmp_path: Path, capsys) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT + name)
    texts = ["--text", str(tmp_path / "a.txt"), "--text", str(tmp_path / "b.txt")]
    assert main(["eval", str(folder), *texts, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["texts"]) == {"a.txt", "b.txt"}
    assert report["texts"]["a.txt"]["loss"] != report["texts"]["b.txt"]["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int4"], "--dtype 'int4'"),
        (["--device", "toaster"], "--device 'toaster'"),
        (["--window", "1"], "--window 1"),
    ],
)
def test_wrong_usage(folder: Path, arguments: list[str], message: str, capsys) -> None:
    assert main(["eval", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, capsys) -> None:
    make_folder(tmp_path / "bare", gda_config())
    assert main(["eval", str(tmp_path / "bare")]) == 1
    assert "no tokenizer" in capsys.readouterr().err
