"""A class without any table, from a folder to a grown and verified one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, CohereConfig, CohereForCausalLM

from growkit.cli.main import main
from growkit.families import NoFamily, family_of
from growkit.families.derived.store import SHIPPED


def test_tied_embeddings_are_derived_grown_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    assert config.tie_word_embeddings
    CohereForCausalLM(config).save_pretrained(tmp_path / "a")
    arguments = ["grow", str(tmp_path / "a"), "--layers", "+1", "--ffn", "x2", "--hidden", "x2"]
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 0
    assert "verification passed" in capsys.readouterr().out
    # The second use finds the table, and says where the family comes from.
    assert main(["inspect", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr()
    assert "derived, proven on a twin" in shown.out and "deriving" not in shown.err


@pytest.mark.skipif(not list(SHIPPED.glob("bert-*")), reason="no table of bert ships")
def test_an_encoder_whose_heads_fill_its_width_grows_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "a")
    grow = ["grow", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    assert main([*grow, "--heads", "x2"]) == 2
    assert "grow --hidden and --heads together" in " ".join(capsys.readouterr().err.split())
    assert main([*grow, "--heads", "x2", "--hidden", "x2"]) == 0
    assert "verification passed" in capsys.readouterr().out


def test_a_config_unlike_all_tables_of_its_type_is_told_in_which_field() -> None:
    config = {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}
    with pytest.raises(NoFamily, match=r"'architectures' says something else") as refused:
        family_of(config)
    assert "growkit derive" in refused.value.remedy
    with pytest.raises(NoFamily, match="no family for model_type 'bertt'") as refused:
        family_of({**config, "model_type": "bertt"})
    assert "Did you mean 'bert'" in refused.value.remedy
