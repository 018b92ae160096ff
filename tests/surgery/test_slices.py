"""--layers-from: slices of the source's layers in any order, one code for all repeating depths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.diff.folders import diff_checkpoints
from growkit.record.manifest import read_manifest
from growkit.surgery.amount import Amount
from growkit.surgery.effect import ModelShape
from growkit.surgery.operators.depth import Depth
from growkit.surgery.operators.slices import Slices, layers_of, parse_slices
from growkit.surgery.plan import read_source
from growkit.surgery.request import GrowthRequest, read_recipe

CONFIG = tiny.llama_config(num_hidden_layers=4)


def layers_in(folder: Path) -> list[bytes]:
    tensors = tiny.read_folder(folder)
    count = tiny.read_config(folder)["num_hidden_layers"]
    return [tensors[f"model.layers.{i}.self_attn.q_proj.weight"].tobytes() for i in range(count)]


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("0-3,1-4", [0, 1, 2, 1, 2, 3]),
        ("0:3, 1:4", [0, 1, 2, 1, 2, 3]),
        ("[2-4,0-4]", [2, 3, 0, 1, 2, 3]),
        ("0:3,0:3", [0, 1, 2, 0, 1, 2]),
    ],
)
def test_the_written_layers_are_the_slices(tmp_path: Path, text: str, order: list[int]) -> None:
    source = tiny.make_folder(tmp_path / "a", CONFIG)
    plan = tiny.grow(source, tmp_path / "b", layers_from=text)
    old, new = layers_in(source), layers_in(tmp_path / "b")
    assert new == [old[i] for i in order] and len(set(old)) == 4
    assert plan.exactness.value == "not-exact"
    assert "does not keep the function" in plan.warnings[0]
    assert (read_manifest(tmp_path / "b") or {})["request"] == {"layers_from": text}
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "b") as b:
        report = diff_checkpoints(a, b)
    assert report["as_grown"]
    assert [layer["source"] for layer in report["layer_sources"]] == order


def test_the_repeating_methods_are_slices(tmp_path: Path) -> None:
    with open_checkpoint(tiny.make_folder(tmp_path / "a", CONFIG)) as checkpoint:
        shape = ModelShape(*read_source(checkpoint), checkpoint.config)
    for method, target, slices in (
        ("stack", "8", "0-4,0-4"),
        ("solar", "6", "0-3,1-4"),
        ("interpolate", "6", "0:1,0:1,1:2,2:3,2:3,3:4"),
    ):
        depth = Depth(Amount.parse(target, "--layers"), method)
        assert depth.apply(shape).layers == Slices(slices).apply(shape).layers
        assert layers_of(parse_slices(slices)) == Slices(slices).apply(shape).layers


def test_with_width_and_from_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("grow: {layers_from: '0-3,1-4', hidden: x2, ffn: +8}\n")
    request = read_recipe(recipe).to_dict()
    source = tiny.make_folder(tmp_path / "a", CONFIG)
    plan = tiny.grow(source, tmp_path / "b", **request)
    assert (plan.sizes["layer"], plan.sizes["hidden"]) == (6, 2 * plan.source_sizes["hidden"])
    kinds = [(layer.source, layer.kind) for layer in plan.growth.layers]
    assert kinds == [(0, "kept"), (1, "kept"), (2, "kept"), (1, "copy"), (2, "copy"), (3, "kept")]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"layers_from": "0-3,1-3"}, "with or without the last layer, 3"),
        ({"layers_from": "0-3,1-9"}, "layer 8, but the checkpoint has layers 0 to 3"),
        ({"layers_from": "0-4"}, "makes 4 layers of 4"),
        ({"layers_from": "3"}, "no range in '3'"),
        ({"layers_from": "0-4,,1-4"}, "no range in ''"),
        ({"layers_from": "4-2"}, "is empty"),
        ({"layers_from": "0-4,1-4", "layers": "+1"}, "--layers and --depth-method"),
        ({"layers_from": "0-4,1-4", "depth_method": "stack"}, "--layers and --depth-method"),
        ({"layers_from": "0-999999999"}, "TB of weights"),
    ],
)
def test_refused_with_the_reason(tmp_path: Path, request_: dict[str, Any], says: str) -> None:
    source = tiny.make_folder(tmp_path / "a", CONFIG)
    with pytest.raises(UsageError) as error:
        tiny.grow(source, tmp_path / "b", **request_)
    assert says in error.value.cause and error.value.remedy
    assert not (tmp_path / "b").exists()


def test_a_recipe_key_that_is_no_amount_stays_text() -> None:
    assert GrowthRequest(layers_from="0-2,1-3").to_dict() == {"layers_from": "0-2,1-3"}
