"""Recipes: saved from flags, found by name, shipped ones that do what their papers say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import yaml

from growkit.cli.main import main
from growkit.recipe.shipped import find_recipe, recipe_folder, shipped_recipes
from growkit.surgery.request import GrowthRequest, read_recipe
from growkit.training.read_recipe import load_recipe

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "head_dim": 8}
FLAGS = ["--heads", "x2", "--ffn", "+8", "--layers", "+1", "--layer-placement", "1"]
FLAGS += ["--symmetry", "noise", "--noise-snr-db", "12.5", "--seed", "7"]


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tiny.make_folder(tmp_path / "ckpt", tiny.llama_config(4, 2, **SIZES), "BF16")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_saved_recipe_and_its_flags_write_the_same_bytes(llama: Path) -> None:
    assert main(["plan", "ckpt", *FLAGS, "--save-recipe", "saved.yaml", "-q"]) == 0
    for parent, how in (("by-flags", FLAGS), ("by-recipe", ["--recipe", "saved.yaml"])):
        Path(parent).mkdir()
        assert main(["grow", "ckpt", *how, "-o", f"{parent}/b", "--no-verify", "-q"]) == 0
    assert files(Path("by-flags/b")) == files(Path("by-recipe/b"))
    assert main(["grow", "ckpt", "--recipe", "saved.yaml", "--seed", "8", "-o", "c", "-q"]) == 0
    other = files(Path("c"))["model.safetensors"]
    assert other != files(Path("by-flags/b"))["model.safetensors"]


def test_the_first_line_is_a_command_that_runs(llama: Path) -> None:
    os.rename("ckpt", "my ckpt")
    main(["plan", "my ckpt", "--ffn", "x2", "--save-recipe", "my recipe.yaml", "-q"])
    first = Path("my recipe.yaml").read_text().splitlines()[0]
    assert first == "# growkit grow 'my ckpt' --recipe 'my recipe.yaml' --out 'my ckpt-grown'"
    assert yaml.safe_load(Path("my recipe.yaml").read_text()) == {"grow": {"ffn": "x2"}}
    arguments = ["grow", "my ckpt", "--recipe", "my recipe.yaml", "--out", "my ckpt-grown", "-q"]
    assert main([*arguments, "--no-verify"]) == 0
    assert Path("my ckpt-grown/model.safetensors").is_file()


@pytest.mark.parametrize(
    "request_",
    [
        GrowthRequest(layers="+8", ffn="48", hidden="x2"),
        GrowthRequest(signal_heads="x1.5", layer_placement="3,7", layers="2"),
        GrowthRequest(untie_embeddings=True, seed=3, format="gda", new_heads="zero"),
    ],
)
def test_every_kind_of_value_survives_the_file(tmp_path: Path, request_: GrowthRequest) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"grow": request_.to_dict()}))
    assert read_recipe(file) == request_


def test_an_increment_without_quotes_is_no_absolute_number(tmp_path: Path) -> None:
    """YAML reads +8 as the number 8, which would be another growth."""
    file = tmp_path / "recipe.yaml"
    file.write_text("grow: {ffn: +8, layers: 12}\n")
    assert read_recipe(file) == GrowthRequest(ffn="+8", layers="12")


@pytest.mark.parametrize(
    ("target", "sentence"),
    [("ckpt/config.json", "exists already"), ("none/recipe.yaml", "cannot be written")],
)
def test_a_recipe_never_replaces_a_file(
    llama: Path, capsys: pytest.CaptureFixture[str], target: str, sentence: str
) -> None:
    before = files(llama)
    assert main(["plan", "ckpt", "--ffn", "x2", "--save-recipe", target, "-q"]) == 2
    assert sentence in capsys.readouterr().err
    assert files(llama) == before


def test_a_refused_plan_saves_nothing(llama: Path) -> None:
    assert main(["plan", "ckpt", "--heads", "+1", "--save-recipe", "saved.yaml", "-q"]) == 2
    assert not Path("saved.yaml").exists()


# -- those that come with growkit -----------------------------------------------------------------

DEPTH = {"num_hidden_layers": 32, "hidden_size": 16, "intermediate_size": 12}
METHODS: dict[str, tuple[tiny.Config, dict[str, int], str]] = {
    "hypercloning-x2": (
        tiny.llama_config(4, 2, **SIZES, tie_word_embeddings=True),
        {"hidden": 64, "ffn": 48, "query_head": 8, "kv_head": 4},
        "rounded",
    ),
    "llama-pro-32-to-40": (tiny.llama_config(**DEPTH), {"layer": 40}, "bit-exact"),
    "solar-32-to-48": (tiny.llama_config(**DEPTH), {"layer": 48}, "not-exact"),
    "g-stack-x4": (tiny.llama_config(), {"layer": 8}, "not-exact"),
    "bert2bert-fpi-width": (
        tiny.llama_config(4, 4, **SIZES),
        {"query_head": 8, "kv_head": 8, "ffn": 48, "hidden": 32},
        "exact",
    ),
    "orthogonal-moe": (
        tiny.llama_config(4, 2, **SIZES),  # of a dense model: two experts of every FFN
        {"layer": 4, "expert": 2, "active_expert": 2},
        "not-exact",
    ),
    "sparse-upcycling-8x": (
        tiny.llama_config(4, 2, **SIZES),
        {"expert": 8, "active_expert": 2},
        "exact",
    ),
    "sparkling-width-x2": (
        tiny.llama_config(4, 2, **SIZES),
        {"hidden": 64, "ffn": 48},
        "exact",
    ),
    "shrink-pad-perturb-x2": (
        tiny.llama_config(4, 2, **SIZES),
        {"hidden": 64, "ffn": 48},
        "not-exact",
    ),
    "opt-deus-x1.5": (tiny.llama_config(4, 2, **SIZES), {"layer": 3}, "not-exact"),
    "gda-signal-x2": (
        tiny.gda_config(4, 2, **SIZES),
        {"signal_head": 8, "noise_head": 2, "kv_head": 2},
        "exact",
    ),
    "motif-2.6b-to-12.7b": (
        tiny.motif_config(4, 4, 2, tie_word_embeddings=True),
        {"signal_head": 16, "noise_head": 4, "hidden": 32, "ffn": 24, "layer": 40},
        "exact",
    ),
}


def test_every_shipped_growth_recipe_is_tested_and_says_what_it_is() -> None:
    found = {recipe.name: recipe for recipe in shipped_recipes()}
    assert {name for name, recipe in found.items() if recipe.kind == "grow"} == set(METHODS)
    for recipe in found.values():
        assert recipe.description
        if recipe.kind == "grow":
            assert recipe.source and recipe.purpose
            assert f"{recipe.name}" in recipe.command
        else:
            assert recipe.command.startswith(f"growkit {recipe.kind} recipes/{recipe.name}.yaml ")
            assert recipe.kind == recipe.name.partition("-")[0]
    assert {path.name for path in (ROOT / "recipes").iterdir()} == {
        f"{name}.yaml" for name in found
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_method_by_its_name(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, sizes, exactness = METHODS[name]
    source = tiny.make_folder(tmp_path / "a", config)
    assert main(["plan", str(source), "--recipe", name, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {axis: report["axes"][axis]["after"] for axis in sizes} == sizes
    assert report["exactness"] == exactness


@pytest.mark.parametrize(
    "name",
    [
        "hypercloning-x2",
        "bert2bert-fpi-width",
        "sparkling-width-x2",
        "gda-signal-x2",
        "llama-pro-32-to-40",
    ],
)
def test_exact_methods_verify(tmp_path: Path, name: str) -> None:
    source = tiny.make_folder(tmp_path / "a", METHODS[name][0])
    out = tmp_path / "b"
    assert main(["grow", str(source), "--recipe", name, "--out", str(out), "-q"]) == 0
    assert json.loads((out / "growkit.json").read_text())["verification"]["status"] == "passed"


def test_published_layer_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA Pro: a block after every fourth layer. SOLAR: 0-23, then 8-31."""
    source = tiny.make_folder(tmp_path / "a", tiny.llama_config(**DEPTH))
    orders = {}
    for name in ("llama-pro-32-to-40", "solar-32-to-48"):
        main(["plan", str(source), "--recipe", name, "--json"])
        orders[name] = json.loads(capsys.readouterr().out)["layer_sources"]
    pro = orders["llama-pro-32-to-40"]
    assert [i for i, layer in enumerate(pro) if layer["kind"] == "identity"] == [
        4, 9, 14, 19, 24, 29, 34, 39
    ]  # fmt: skip
    solar = [layer["source"] for layer in orders["solar-32-to-48"]]
    assert solar == [*range(24), *range(8, 32)]


def test_the_list_and_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    names = {recipe.name for recipe in shipped_recipes()}
    assert all(name in shown.replace("\n", " ") for name in names)
    assert len(shown.splitlines()) <= 30
    assert main(["recipes", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert names <= {line.split()[0] for line in lines if line.strip()} and len(lines) > len(names)
    assert main(["recipes", "--json"]) == 0
    assert {r["name"] for r in json.loads(capsys.readouterr().out)} >= set(METHODS)
    assert main(["recipes", "gda-signal-x2"]) == 0
    assert capsys.readouterr().out == (recipe_folder() / "gda-signal-x2.yaml").read_text()


@pytest.mark.parametrize(
    "path", sorted(recipe_folder().glob("train-*.yaml")), ids=lambda path: path.stem
)
def test_every_training_recipe_is_read(path: Path) -> None:
    assert load_recipe(path).training.save_steps


def test_an_unknown_name_is_refused_with_the_nearest(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "ckpt", "--recipe", "hypercloning"]) == 2
    assert "Did you mean 'hypercloning-x2'?" in capsys.readouterr().err
    Path("g-stack-x4").write_text("grow: {ffn: x2}")
    assert find_recipe(Path("g-stack-x4")) == Path("g-stack-x4")  # a file here wins
