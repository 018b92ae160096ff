"""SmolLM2 through the table derived from its class: the bytes that the written one gives."""

from __future__ import annotations

import filecmp
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from growkit.derive.derivation import derive, read_config
from growkit.families import family_of
from growkit.families.derived.fit import misfit
from growkit.families.derived.store import forget, register
from growkit.growing import grow_checkpoint
from growkit.surgery.request import GrowthRequest

pytestmark = [pytest.mark.real, pytest.mark.derive]

# Option -> (field of a request, value that a model with 9 heads on 3 key/value heads can take).
REQUESTS = {
    "--layers": ("layers", "36"),
    "--ffn": ("ffn", "x1.5"),
    "--query-heads": ("query_heads", "x2"),
    "--heads": ("heads", "x2"),
    "--kv-heads": ("kv_heads", "x3"),
    "--hidden": ("hidden", "x2"),
    "--head-dim": ("head_dim", "x2"),
    "--vocab": ("vocab", "+100"),
    "--untie-embeddings": ("untie_embeddings", True),
}


@pytest.fixture(scope="module")
def table(smollm2: Path) -> dict[str, Any]:
    """Derived from the model's own config."""
    config = json.loads((smollm2 / "config.json").read_text())
    table: dict[str, Any] = derive(read_config(config))
    assert misfit(table, config) == ""
    return table


@pytest.mark.parametrize("option", REQUESTS)
def test_every_growth_that_the_derived_table_offers_gives_the_same_bytes(
    option: str, table: dict[str, Any], smollm2: Path, tmp_path: Path
) -> None:
    if "error" not in table["operators"].get(option, {}):
        pytest.skip(f"not offered: {table['operators'].get(option, {}).get('why')}")
    field, value = REQUESTS[option]
    request = GrowthRequest.from_mapping({field: value})
    started = time.perf_counter()
    grow_checkpoint(smollm2, tmp_path / "written", request, verify=False)
    register(table)
    try:
        config = json.loads((smollm2 / "config.json").read_text())
        assert "derived" in family_of(config).origin
        grow_checkpoint(smollm2, tmp_path / "derived", request, verify=False)
    finally:
        forget(table)
    first, second = (tmp_path / name for name in ("written", "derived"))
    shards = sorted(path.name for path in first.glob("*.safetensors"))
    assert shards == sorted(path.name for path in second.glob("*.safetensors"))
    same, different, failed = filecmp.cmpfiles(first, second, shards, shallow=False)
    size = sum((first / name).stat().st_size for name in shards)
    assert not different and not failed and len(same) == len(shards) and size > 400_000_000
    assert json.loads((first / "config.json").read_text()) == json.loads(
        (second / "config.json").read_text()
    )
    print(f"{option} {value}: {size} bytes equal ({time.perf_counter() - started:.0f} s)")
    shutil.rmtree(first)
    shutil.rmtree(second)
