"""The tables that ship: readable without torch, whole, and used by every command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from growkit import GrowthRequest, plan
from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.families.derived.family import derived_family
from growkit.families.derived.fit import misfit
from growkit.families.derived.form import KEYS
from growkit.families.derived.store import SHIPPED, forget, register
from growkit.families.layer_fields import leaf, with_values
from growkit.growing import grow_checkpoint

TABLES = sorted(SHIPPED.glob("*.json"))


def config_of(table: dict) -> dict:
    """The config of the class's defaults."""
    place = tuple(table["place"])
    config: dict = {}
    for name in place:
        config[name] = {}
    inner = leaf(config, place)
    for name, value in {**table["defaults"], **table["flags"]}.items():
        *outer, last = name.split(".")
        target = inner
        for part in outer:
            target = target.setdefault(part, {})
        target[last] = value
    if counted_by := table["layers"].get("counted_by"):
        inner[counted_by] = table["kinds"][counted_by]
    return {**config, "model_type": table["model_type"]}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_is_read_for_the_config_that_it_was_derived_from(path: Path) -> None:
    table = json.loads(path.read_text())
    assert set(table) <= {*KEYS}, "a key that the format does not name"
    assert path.stat().st_size < 100_000
    config = config_of(table)
    assert misfit(table, config) == ""
    register(table)
    try:
        family = derived_family(config, registered=True)
    except UsageError as error:  # of a class that has no defaults at all
        assert not table["defaults"]
        pytest.skip(str(error))
    finally:
        forget(table)
    assert family is not None
    try:
        sizes = family.sizes_of(config)
        names = [name for tensor, _, name in family.names(sizes)]
    except UsageError as error:  # a class whose defaults leave a number or a list open
        pytest.skip(str(error))
    assert len(names) == len(set(names)) > 10
    reasons = " ".join(proof.get("why", "") for proof in table["operators"].values())
    assert "growkit/" not in reasons, "a fault of ours is no reason"
    proven = [option for option, proof in table["operators"].items() if "error" in proof]
    assert proven
    for option in proven:
        assert table["operators"][option]["error"] <= 5e-5
        assert table["operators"][option]["control"] >= 1e-3


@cache
def of_the_class(model_type: str, class_name: str) -> tuple[dict, dict] | str:
    """Config and shapes of a class at its own defaults, or why there is none.

    Several tables are of one class, so it is built once.
    """
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    try:
        default = transformers.AutoConfig.for_model(model_type)
        with torch.device("meta"), no_init_weights():
            model = getattr(transformers, class_name)._from_config(default)
    except Exception as error:  # another version of transformers, or defaults that it cannot build
        return f"{type(error).__name__}: {error}"[:90]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return json.loads(default.to_json_string(use_diff=False)), shapes


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_has_the_sizes_of_its_class(path: Path) -> None:
    """At the size of the class's own defaults: a twin's size is in no table as a constant."""
    table = json.loads(path.read_text())
    known = of_the_class(table["model_type"], table["class"])
    if isinstance(known, str):
        pytest.skip(known)
    config, full = known
    config = {**config, "model_type": table["model_type"]}
    stored = {name: SimpleNamespace(shape=shape) for name, shape in full.items()}
    register(table)
    try:
        family = derived_family(config, registered=True)
        if family is None:
            pytest.skip("derived from another config than the defaults")
        try:
            sizes = family.sizes_of(config)
            names = list(family.names(sizes))
        except UsageError as error:  # a class whose defaults leave a number or a list open
            stated = re.match(r"config.json has (\w+) = None", str(error))
            inner = leaf(config, tuple(table["place"]))
            assert not stated or stated[1] in inner, f"no {stated[1]} in what the class writes"
            if stated:
                pytest.skip(str(error))
            family = derived_family(config, stored, registered=True)  # as of a folder with weights
            assert family is not None
            sizes = family.sizes_of(config, stored)
            names = list(family.names(sizes))
    finally:
        forget(table)
    entries = {entry["name"]: entry["dims"] for entry in table["tensors"]}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for tensor, _, name in names:
        if tensor.role not in shapes:
            try:
                shapes[tensor.role] = tensor.shape(sizes)
            except UsageError:  # as large as it is stored, which no config says
                shapes[tensor.role] = None
        if (shape := shapes[tensor.role]) is None:
            continue
        for dim, (mine, real) in enumerate(zip(shape, full.get(name, ()), strict=False)):
            assert mine == real or "stored" in json.dumps(entries[tensor.name][dim]), name


GPT_OSS = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 12,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
}


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt-oss"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GPT_OSS))
    family = derived_family(GPT_OSS)
    assert family is not None
    generator = np.random.default_rng(0)
    tensors = {
        name: generator.normal(size=shape).astype(np.float32)
        for name, shape in family.declared(family.sizes_of(GPT_OSS))
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not list(SHIPPED.glob("gpt_oss-*")), reason="no table of gpt_oss ships")
def test_interleaved_experts_and_sinks_grow_by_a_derived_table(gpt_oss: Path) -> None:
    request = GrowthRequest(ffn="x2", query_heads="x2", layers="x2")
    made = plan(gpt_oss, request)
    assert "derived" in made.family.origin and made.exactness.value == "exact"
    out = gpt_oss.with_name("grown")
    grow_checkpoint(gpt_oss, out, request, verify=False)
    before, after = load_file(gpt_oss / "model.safetensors"), load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2  # the class's order
    layer = "model.layers.{}.{}"
    # Gate and up of a unit stand side by side, [experts, in, out]: both are copied.
    name = "mlp.experts.gate_up_proj"
    old, new = before[layer.format(0, name)], after[layer.format(0, name)]
    assert np.array_equal(new, np.tile(old, (1, 1, 2)))
    # Rows of down [experts, in, out] share the weight; those of an inserted layer are zero.
    name = "mlp.experts.down_proj"
    old, new = before[layer.format(0, name)], after[layer.format(0, name)]
    assert np.array_equal(new[:, :12] + new[:, 12:], old)
    assert not after[layer.format(1, name)].any()
    # A copied head takes its sink along.
    sinks = before[layer.format(1, "self_attn.sinks")]
    assert np.array_equal(after[layer.format(3, "self_attn.sinks")], np.repeat(sinks, 2))


@pytest.mark.skipif(not list(SHIPPED.glob("gpt_oss-*")), reason="no table of gpt_oss ships")
def test_what_is_not_proven_is_refused_and_torch_stays_out(gpt_oss: Path) -> None:
    code = (
        "import sys; from growkit.cli.main import main; "
        f"first = main(['inspect', {str(gpt_oss)!r}]); "
        f"second = main(['plan', {str(gpt_oss)!r}, '--head-dim', 'x2']); "
        "assert 'torch' not in sys.modules; sys.exit(10 * first + second)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 2, done.stderr
    assert "derived, proven on a twin" in done.stdout
    assert "--head-dim cannot grow a gpt_oss checkpoint" in done.stderr


def test_a_config_of_another_kind_fits_no_table() -> None:
    for path in TABLES[:3]:
        table = json.loads(path.read_text())
        config = config_of(table)
        place = tuple(table["place"])
        for name, value in table["flags"].items():
            if isinstance(value, bool):
                changed = (*place, *name.split("."))
                assert misfit(table, with_values(config, {changed: not value})) == name


JAMBA = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "mamba_dt_rank": 24,
    "tie_word_embeddings": False,
}


@pytest.fixture
def jamba(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(JAMBA))
    return tmp_path


@pytest.mark.parametrize("placement", ["auto", "even", "end"])
def test_layers_of_a_period_are_inserted_as_whole_periods(jamba: Path, placement: str) -> None:
    found = plan(jamba, GrowthRequest(layers=32, layer_placement=placement))
    sources = [layer.source for layer in found.growth.stacks["layer"]]
    assert len(sources) == 32
    assert all(source % 8 == place % 8 for place, source in enumerate(sources))
    assert sources[-8:] == list(range(8, 16))


@pytest.mark.parametrize(
    "request_", [{"layers": 20}, {"layers": 24, "layer_placement": "3,3,3,3,3,3,3,3"}]
)
def test_layers_that_break_a_period_are_refused_at_plan_time(jamba: Path, request_: dict) -> None:
    with pytest.raises(UsageError, match="in an order of 8"):
        plan(jamba, GrowthRequest.from_mapping(request_))


def test_heads_rotated_in_part_get_more_channels_with_or_without_the_prefix(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GlmConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_bias=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    source, out = tmp_path / "a", tmp_path / "b"
    transformers.GlmForCausalLM(config).save_pretrained(source)
    assert main(["grow", str(source), "--head-dim", "x1.5", "--out", str(out), "--quiet"]) == 0
    written = json.loads((out / "config.json").read_text())
    assert written["head_dim"] == 24
    assert int(24 * written["rope_parameters"]["partial_rotary_factor"]) == 8
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    old, new = before[name].reshape(2, 16, 32), after[name].reshape(2, 24, 32)
    assert np.allclose(new[:, :16], old * 1.5**0.5, rtol=1e-6) and not new[:, 16:].any()
    bare = {key.removeprefix("model."): array for key, array in before.items()}
    save_file(bare, source / "model.safetensors", {"format": "pt"})
    made = {tensor.output.name for tensor in plan(source, GrowthRequest(head_dim="x1.5")).tensors}
    assert made == {key.removeprefix("model.") for key in after}


@pytest.mark.parametrize("stated", ["intermediate_size", "block_ff_dim"])
def test_a_width_that_the_class_rounds_is_read_from_the_file_and_then_stated_exactly(
    tmp_path: Path, stated: str
) -> None:
    """LFM2 makes two thirds of the number in its config, rounded up; older configs have it under
    another name, which the class obeys first."""
    config = {
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "block_multiple_of": 8,
        stated: 60,  # 2 * 60 / 3
    }
    family = derived_family({**config, "block_auto_adjust_ff_dim": False, stated: 40})
    assert family is not None
    sizes = family.sizes_of({**config, "block_auto_adjust_ff_dim": False, stated: 40})
    source, out = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    shapes = dict(family.declared(sizes))
    assert shapes["model.layers.0.feed_forward.w2.weight"] == (32, 40)
    save_file(
        {name: np.ones(shape, np.float32) for name, shape in shapes.items()},
        source / "model.safetensors",
    )
    with pytest.raises(UsageError, match="how wide the FFN is"):
        family = derived_family(config)
        assert family is not None
        family.sizes_of(config)
    grow_checkpoint(source, out, GrowthRequest(layers="x2"), verify=False)
    kept = json.loads((out / "config.json").read_text())
    assert kept[stated] == 60 and "block_auto_adjust_ff_dim" not in kept
    assert {name for name in kept if "ff" in name or "inter" in name} == {stated}
    grow_checkpoint(out, tmp_path / "c", GrowthRequest(ffn="x1.5"), verify=False)
    grown = json.loads((tmp_path / "c" / "config.json").read_text())
    assert grown[stated] == grown["intermediate_size"] == 60
    assert grown["block_auto_adjust_ff_dim"] is False
    written = load_file(tmp_path / "c" / "model.safetensors")
    assert written["model.layers.3.feed_forward.w2.weight"].shape == (32, 60)
