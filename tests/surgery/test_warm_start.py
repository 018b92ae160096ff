"""Shrink, pad, perturb: streamed bytes against a naive oracle, and labels that say not exact."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints as tiny

from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.growing import grow_checkpoint
from growkit.surgery.request import GrowthRequest

WARM = {"warm_start": "shrink-pad-perturb"}
BLOCK = 1 << 15


def start_of(seed: int, name: str, shape: tuple[int, int], std: float) -> tiny.Array:
    """Normal numbers, block of rows by block of rows, as the docstring of the module keys them."""
    key = hashlib.blake2b(f"{seed}:{name}#perturb".encode(), digest_size=16).digest()
    parts, step = [], max(1, BLOCK // shape[1])
    for row in range(0, shape[0], step):
        counter = np.array([0, 0, row, 0], np.uint64)
        bits = np.random.Philox(key=np.frombuffer(key, np.uint64), counter=counter).random_raw(2)
        made = np.random.Generator(np.random.Philox(int.from_bytes(bits.tobytes(), "little")))
        block = made.standard_normal((min(step, shape[0] - row), shape[1]), dtype=np.float32)
        parts.append(block * np.float32(std))
    return np.concatenate(parts)


def padded(old: tiny.Array, rows: list[int | None], columns: list[int | None]) -> tiny.Array:
    """Old entries where their rows and columns went; zeros elsewhere."""
    result = np.zeros((len(rows), len(columns)), np.float32)
    for place, row in enumerate(rows):
        for spot, column in enumerate(columns):
            if row is not None and column is not None:
                result[place, spot] = old[row, column]
    return result


def ends(old: int, new: int) -> list[int | None]:
    return [*range(old), *([None] * (new - old))]


def beside(units: int, size: int) -> list[int | None]:
    """Every unit of ``size`` elements, and a new one behind it."""
    result: list[int | None] = []
    for unit in range(units):
        result += [*range(unit * size, (unit + 1) * size), *([None] * size)]
    return result


def oracle(
    old: tiny.Tensors, layers: int, shrink: float, perturb: float, seed: int, dtype: Any
) -> dict[str, tiny.Array]:
    """Llama of 16 hidden, 12 FFN, 4 / 2 heads of 4; hidden, FFN and query heads twice as many."""
    hidden, ffn, dim = ends(16, 32), ends(12, 24), 4
    heads = beside(4, dim)
    half = 0.5**0.5  # of a fan-in that doubles
    plans = {
        "q_proj": (heads, hidden, half),
        "k_proj": (ends(8, 8), hidden, half),
        "v_proj": (ends(8, 8), hidden, half),
        "o_proj": (hidden, heads, half * (2 * layers) ** -0.5),
        "gate_proj": (ffn, hidden, half),
        "up_proj": (ffn, hidden, half),
        "down_proj": (hidden, ffn, half * (2 * layers) ** -0.5),
        "embed_tokens": (ends(256, 256), hidden, 1.0),
        "lm_head": (ends(256, 256), hidden, half),
    }
    result = {}
    for name, value in old.items():
        part = name.split(".")[-2]
        if part not in plans:  # gains: the old ones, and ones
            result[name] = np.concatenate([value, np.ones(16, value.dtype)])
            continue
        rows, columns, factor = plans[part]
        wide = padded(value.astype(np.float32), rows, columns) * np.float32(shrink)
        wide += start_of(seed, name, wide.shape, tiny.STD * perturb * factor)
        result[name] = wide.astype(dtype)
    return result


GROWN = {"hidden": "x2", "ffn": "x2", "query_heads": "x2", **WARM}


@pytest.mark.parametrize(("dtype", "shards"), [("F32", 1), ("BF16", 3)])
def test_the_bytes_are_the_oracles(tmp_path: Path, dtype: str, shards: int) -> None:
    source = tiny.make_tensors(tiny.llama_config(), dtype)
    tiny.write_folder(tmp_path / "a", tiny.llama_config(), source, shards=shards)
    size = "5GB" if shards == 1 else "3KB"
    tiny.grow(tmp_path / "a", tmp_path / "b", max_shard_size=size, seed=3, perturb=0.5, **GROWN)
    grown = tiny.read_folder(tmp_path / "b")
    kind = np.float32 if dtype == "F32" else ml_dtypes.bfloat16
    expected = oracle(source, 2, 0.4, 0.5, 3, kind)
    assert expected.keys() == grown.keys()
    for name, value in expected.items():
        assert tiny.same_bits(value, grown[name]), name
    for control in (
        oracle(source, 2, 0.41, 0.5, 3, kind),
        oracle(source, 2, 0.4, 0.5, 4, kind),
        oracle(source, 2, 0.4, 0.45, 3, kind),
    ):
        name = "model.layers.1.mlp.down_proj.weight"
        assert not tiny.same_bits(control[name], grown[name])


def test_the_seed_decides_and_threads_do_not(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.gda_config())
    asked = {"signal_heads": "x2", "layers": "5", "hidden": "20", **WARM}
    for name, seed, threads in (("one", 1, 1), ("again", 1, 7), ("other", 2, 1)):
        request = GrowthRequest(seed=seed, **asked)
        grow_checkpoint(source, tmp_path / name, request, verify=False, threads=threads)
    one, again, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other")
    )
    assert one == again != other


def test_new_layers_are_a_start_from_scratch_and_gains_stay(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.llama_config(num_hidden_layers=1))
    old = tiny.read_folder(source)
    tiny.grow(source, tmp_path / "b", layers="3", layer_placement="end", perturb=0.0, **WARM)
    grown = tiny.read_folder(tmp_path / "b")
    for name, value in old.items():
        factor = 1.0 if "norm" in name else 0.4
        assert np.array_equal(grown[name], value * np.float32(factor)), name
        if ".0." in name:
            new = grown[name.replace(".0.", ".2.")]
            assert (new == (1.0 if "norm" in name else 0.0)).all()
    tiny.grow(source, tmp_path / "c", layers="3", layer_placement="end", **WARM)
    up = tiny.read_folder(tmp_path / "c")["model.layers.1.mlp.up_proj.weight"]
    assert float(up.std()) == pytest.approx(tiny.STD, rel=0.2)


def test_it_is_called_not_exact_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.llama_config())
    flags = ["--ffn", "x2", "--warm-start", "shrink-pad-perturb", "--shrink", "0.5"]
    out = str(tmp_path / "b")
    assert main(["grow", str(source), *flags, "-o", out, "--no-verify"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "shrink 0.5, perturb 1, seed 0" in said and "function │ not exact" in said
    manifest = json.loads((tmp_path / "b" / "growkit.json").read_text())
    plan = manifest["plan"]
    assert plan["exactness"] == "not-exact" and plan["warm_start"]["shrink"] == 0.5
    assert {step["exactness"] for step in plan["operators"]} == {"not-exact"}
    assert "warm start, not exact: old weights x 0.5" in (tmp_path / "b" / "README.md").read_text()
    new = manifest["new_parameters"]["model.layers.{0..1}.mlp.up_proj.weight"]
    assert new == {"rows": [[12, 24]]}

    # The recorded request makes the same bytes again; one entry that differs is found.
    assert main(["diff", str(source), out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["as_grown"]
    file = tmp_path / "b" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(bytes(data))
    main(["diff", str(source), out, "--json"])
    assert not json.loads(capsys.readouterr().out)["as_grown"]


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ({"experts": "4"}, "experts has no padding"),
        ({"vocab": "300"}, "vocab.* has no padding"),
        ({"layers": "4", "new_layers": "identity"}, "keeps the function"),
        ({"ffn": "x2", "shrink": 0.0}, "--shrink 0.0"),
        ({"ffn": "x2", "perturb": -1.0}, "--perturb -1.0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, asked: dict[str, Any], cause: str) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.llama_config())
    with pytest.raises(UsageError, match=cause):
        tiny.grow(source, tmp_path / "b", **asked, **WARM)
    assert not (tmp_path / "b").exists()
    with pytest.raises(UsageError, match="no effect without --warm-start"):
        tiny.grow(source, tmp_path / "b", ffn="x2", shrink=0.5)
