"""A real checkpoint grows and computes the same; a broken copy of it is caught."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_once import made_once
from safetensors import safe_open

from growkit.checkpoint import open_checkpoint
from growkit.cli.main import main

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def deeper(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def grow(root: Path) -> None:
        out = ["--out", str(root / "deeper"), "--quiet"]
        assert main(["grow", str(smollm2), "--layers", "36", *out]) == 0

    return made_once(tmp_path_factory, "smollm2-deeper", grow)[0] / "deeper"


def test_depth_growth_is_proven_on_the_written_files(deeper: Path) -> None:
    manifest = json.loads((deeper / "growkit.json").read_text())
    proof = manifest["verification"]
    assert manifest["plan"]["axes"]["layer"] == {"label": "layers", "before": 30, "after": 36}
    assert proof["status"] == "passed"
    assert proof["max_difference"] == 0.0
    assert proof["generation"]["equals_a"] and proof["generation"]["cached_equals_uncached"]
    # English in, English out: this is the trained model, not a lucky match of noise.
    assert proof["perplexity_a"] < 100


def test_old_layers_keep_their_bytes_and_new_ones_write_nothing(
    smollm2: Path, deeper: Path
) -> None:
    layers = json.loads((deeper / "growkit.json").read_text())["plan"]["layer_sources"]
    name = "model.layers.{}.self_attn.o_proj.weight"
    with open_checkpoint(smollm2) as before, open_checkpoint(deeper) as after:
        for index, layer in enumerate(layers):
            grown = after.read(name.format(index))
            if layer["kind"] == "identity":
                assert not grown.any()
            else:
                np.testing.assert_array_equal(grown, before.read(name.format(layer["source"])))


def test_tokenizer_and_chat_template_are_the_same_bytes(smollm2: Path, deeper: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (deeper / name).read_bytes() == (smollm2 / name).read_bytes()


def test_one_wrong_weight_block_fails_and_names_the_layer(
    smollm2: Path, deeper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(deeper, broken)
    layers = json.loads((deeper / "growkit.json").read_text())["plan"]["layer_sources"]
    inserted = next(i for i, layer in enumerate(layers) if layer["kind"] == "identity")
    name = f"model.layers.{inserted}.self_attn.o_proj.weight"
    with open_checkpoint(broken) as checkpoint:
        info = checkpoint.tensors[name]
    ones = np.full(64, 0.01, dtype=np.float32)
    with open(broken / info.shard, "r+b") as file:
        file.seek(info.start)
        file.write(ones.tobytes())
    with safe_open(broken / info.shard, "numpy") as check:
        assert check.get_tensor(name).flat[0] == np.float32(0.01)
    short = ["--tokens", "32", "--window", "32"]
    assert main(["verify", str(smollm2), str(broken), *short, "--quiet"]) == 3
    assert f"layer {inserted}" in capsys.readouterr().err


def test_perplexity_is_unchanged_to_five_digits(smollm2: Path, tmp_path: Path) -> None:
    """Width growth adds in another order; depth growth, above, does not even do that."""
    out, widths = tmp_path / "grown", ["--query-heads=x2", "--kv-heads=x3", "--ffn=x1.5"]
    assert main(["grow", str(smollm2), *widths, "--out", str(out), "--quiet"]) == 0
    proof = json.loads((out / "growkit.json").read_text())["verification"]
    shutil.rmtree(out)  # half a gigabyte and more
    assert proof["status"] == "passed" and proof["top1_agreement"] == 1.0
    assert proof["perplexity_b"] == pytest.approx(proof["perplexity_a"], rel=5e-6)
