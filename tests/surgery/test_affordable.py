"""Sizes that nobody can mean are refused at once, and by the bytes that they would need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from family_checkpoints import (
    FAMILIES,
    LAYER_NORM_FAMILIES,
    family_config,
    layer_norm_config,
    write_checkpoint,
)

from growkit.cli.main import main


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (("--hidden", "x100000000"), "3,200,000,000 hidden channels from 32: at least 7.6"),
        (("--ffn", "1000000000000"), "1,000,000,000,000 FFN units from 24: at least 39"),
        (("--layers", "x100000000"), "300,000,000 layers from 3"),
        (("--heads", "+400000000"), "400,000,004 query heads from 4"),
        (("--head-dim", "x1000000000"), "8,000,000,000 channels a head from 8"),
    ],
)
def test_absurd_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str], cause: str
) -> None:
    source = write_checkpoint(tmp_path / "a", layer_norm_config("gpt2"))
    assert main(["plan", str(source), *flags]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert cause in text and "TB of weights" in text and text.count("error") == 1


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_absurd_numbers_of_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    """Each is three matrices a layer, and a plan that lists them would not end."""
    source = write_checkpoint(tmp_path / "a", family_config(family))
    for amount in ("x1000000", "9000"):
        assert main(["plan", str(source), "--experts", amount]) == 2
        assert "experts from" in " ".join(capsys.readouterr().err.split())
    assert main(["plan", str(source), "--experts", "512", "--json"]) == 0


def test_large_and_sane_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "a", layer_norm_config("gpt2"))
    assert main(["plan", str(source), "--ffn", "x10000", "--layers", "96", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["axes"]["ffn"]["after"] == 240000


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, *LAYER_NORM_FAMILIES])
def test_inspect_lists_what_the_family_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, tied: bool
) -> None:
    make = family_config if family in FAMILIES else layer_norm_config
    source = write_checkpoint(tmp_path / "a", make(family, tie_word_embeddings=tied))
    assert main(["inspect", str(source), "--json"]) == 0
    options = set(json.loads(capsys.readouterr().out)["can_grow"])
    assert {"--heads", "--layers", "--ffn", "--hidden"} <= options
    assert ("--untie-embeddings" in options) == tied
    assert ("--head-dim" in options) == (family in ("phi3", *LAYER_NORM_FAMILIES))
    assert ("--query-heads" in options) == (family in FAMILIES)
    assert ("--kv-heads" in options) == (family in FAMILIES)
