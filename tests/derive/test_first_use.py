"""A class without any table, from a folder to a grown and verified one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM
from typer.testing import CliRunner

from growkit.cli.app import build_app


def test_tied_embeddings_are_derived_grown_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    assert config.tie_word_embeddings
    CohereForCausalLM(config).save_pretrained(tmp_path / "a")
    arguments = ["grow", str(tmp_path / "a"), "--layers", "+1", "--ffn", "x2"]
    result = CliRunner().invoke(build_app(), [*arguments, "--out", str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    assert "verification passed" in result.output
    # The second use finds the table, and says where the family comes from.
    shown = CliRunner().invoke(build_app(), ["inspect", str(tmp_path / "b")])
    assert "derived, proven on a twin" in shown.output and "deriving" not in shown.output
