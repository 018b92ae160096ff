"""``growkit grow``, ``plan`` and ``inspect`` as a user types them: good runs and bad input."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint import open_checkpoint
from growkit.cli.main import main
from growkit.surgery.axis_map import AxisMap

SIGNAL = ("--signal-heads", "x2")
Snapshot = dict[str, tuple[bytes, int]]


class Run(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def growkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def run(*arguments: Any) -> Run:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


def snapshot(folder: Path) -> Snapshot:
    files = (f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.make_folder(tmp_path / "source", tiny.gda_config(4, 2, 1))


def message(err: str) -> tuple[str, str]:
    """(cause, remedy) of the error; nothing but the two sentences may be printed."""
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    return lines[0].removeprefix("error: "), " ".join(line.strip() for line in lines[1:])


# -- bad input: one clear error, nothing written, nothing lost ------------------------------------


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        config = tiny.read_config(source)
        config.update(changes)
        kept = {k: v for k, v in config.items() if v is not ...}
        (source / "config.json").write_text(json.dumps(kept))

    return change


def truncate(source: Path) -> None:
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)


def lose_a_shard(source: Path) -> None:
    tensors, config = tiny.read_folder(source), tiny.read_config(source)
    shutil.rmtree(source)
    tiny.write_folder(source, config, tensors, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()


def break_lambda(source: Path) -> None:
    tensors, config = tiny.read_folder(source), tiny.read_config(source)
    tensors["model.layers.1.self_attn.lambda_q1"][2] = np.nan
    shutil.rmtree(source)
    tiny.write_folder(source, config, tensors)


def write_recipe(text: str | bytes) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        content = text if isinstance(text, bytes) else text.encode()
        (source.parent / "recipe.yaml").write_bytes(content)

    return change


def nothing(source: Path) -> None:
    pass


class Bad(NamedTuple):
    prepare: Callable[[Path], None]
    arguments: tuple[str, ...]
    code: int
    cause: str
    remedy: str


RECIPE = ("--recipe", "recipe.yaml")
BAD: dict[str, Bad] = {
    "unknown family": Bad(
        change_config(model_type="gpda"), SIGNAL, 2, "model_type 'gpda'", "Did you mean 'gda'?"
    ),
    "no model type": Bad(change_config(model_type=...), SIGNAL, 2, "model_type None", "gda"),
    "no config": Bad(lambda s: (s / "config.json").unlink(), SIGNAL, 2, "config.json", ""),
    "config is not JSON": Bad(
        lambda s: (s / "config.json").write_text("{") and None, SIGNAL, 1, "config.json", ""
    ),
    "truncated shard": Bad(truncate, SIGNAL, 1, "model.safetensors", ""),
    "missing shard": Bad(lose_a_shard, SIGNAL, 1, "model-00002-of-00003.safetensors", ""),
    "no weights": Bad(
        lambda s: (s / "model.safetensors").unlink(), SIGNAL, 2, "has no weights", ""
    ),
    "x0": Bad(nothing, ("--signal-heads", "x0"), 2, "x0 is smaller than x1", "factor above 1"),
    "x1.3": Bad(
        nothing, ("--signal-heads", "x1.3"), 2, "5.2 signal heads from 4", "6 (x1.5), 8 (x2)"
    ),
    "malformed amount": Bad(nothing, ("--layers", "two"), 2, "'two' is not a size", "x2"),
    "noise does not divide": Bad(
        nothing, ("--noise-heads", "3"), 2, "3 noise heads", "4, or a multiple of 4"
    ),
    "head_dim missing": Bad(change_config(head_dim=...), SIGNAL, 2, "head_dim = None", "head_dim"),
    "config and weights disagree": Bad(
        change_config(intermediate_size=16), SIGNAL, 1, "[12, 16]", "intermediate_size"
    ),
    "lambda not finite": Bad(break_lambda, SIGNAL, 1, "lambda of layer 1 is nan", "earlier"),
    "lambda_init not finite": Bad(
        change_config(lambda_init=[0.2, float("inf")]), SIGNAL, 1, "lambda of layer 1 is inf", ""
    ),
    "nothing asked for": Bad(nothing, (), 2, "Nothing to grow", "--signal-heads"),
    "unknown choice": Bad(
        nothing, (*SIGNAL, "--symmetry", "evn"), 2, "'evn'", "Did you mean 'even'?"
    ),
    "unknown format": Bad(nothing, (*SIGNAL, "--format", "llama"), 2, "'llama'", "gda"),
    "bad shard size": Bad(nothing, (*SIGNAL, "--max-shard-size", "lots"), 2, "lots", ""),
    "recipe key": Bad(
        write_recipe("grow: {signal_head: x2}"), RECIPE, 2, "'signal_head'", "'signal_heads'"
    ),
    "recipe section": Bad(
        write_recipe("grow: {signal_heads: x2}\ndescripton: x"), RECIPE, 2, "'descripton'", "desc"
    ),
    "recipe without grow": Bad(write_recipe("train: {}"), RECIPE, 2, "no 'grow' section", "grow"),
    "recipe is not YAML": Bad(write_recipe("grow: [x"), RECIPE, 2, "line 1 is not valid YAML", ""),
    "recipe says it twice": Bad(
        write_recipe("grow:\n  layers: +1\n  layers: +2"), RECIPE, 2, "line 3 gives 'layers'", "one"
    ),
    "recipe is not text": Bad(write_recipe(b"\xff\xfe"), RECIPE, 2, "not UTF-8", "YAML"),
    "no recipe": Bad(nothing, ("--recipe", "nowhere.yaml"), 2, "nowhere.yaml", "YAML"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("verify", [True, False])
def test_bad_input(
    case: str, verify: bool, source: Path, growkit: Callable[..., Run], monkeypatch: Any
) -> None:
    bad = BAD[case]
    bad.prepare(source)
    monkeypatch.chdir(source.parent)
    before = snapshot(source.parent)
    flags = () if verify else ("--no-verify",)
    run = growkit("grow", source, *bad.arguments, *flags, "--out", source.parent / "out")
    cause, remedy = message(run.err)
    assert run.code == bad.code
    assert bad.cause in cause, cause
    assert bad.remedy in remedy, remedy
    assert run.out == ""
    assert snapshot(source.parent) == before
    assert not (source.parent / "out").exists()
    assert not list(source.parent.glob("*.partial"))


@pytest.mark.parametrize("command", ["plan", "inspect"])
@pytest.mark.parametrize("case", ["unknown family", "truncated shard", "lambda not finite"])
def test_plan_and_inspect_refuse_the_same(
    case: str, command: str, source: Path, growkit: Callable[..., Run]
) -> None:
    bad = BAD[case]
    bad.prepare(source)
    run = growkit(command, source, *(SIGNAL if command == "plan" else ()))
    assert run.code == bad.code and bad.cause in message(run.err)[0]


def test_not_a_folder(tmp_path: Path, growkit: Callable[..., Run]) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "nowhere"):
        run = growkit("grow", path, *SIGNAL, "--out", tmp_path / "out")
        assert run.code == 2 and path.name in message(run.err)[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layerwise", ["on", "off"])
def test_a_motif_folder_is_verified_through_our_model(
    layerwise: str, tmp_path: Path, growkit: Callable[..., Run]
) -> None:
    """transformers has no Motif class; ours has its layout. A lost move of lambda is caught."""
    source, out = tiny.make_folder(tmp_path / "source", tiny.motif_config()), tmp_path / "out"
    deeper = ("--layers", "+1", "--layer-placement", "0")  # moves every layer behind the first
    grown = growkit("grow", source, *SIGNAL, *deeper, "--out", out)
    assert grown.code == 0, grown.err
    assert growkit("verify", source, out, "--layerwise", layerwise).code == 0
    with open_checkpoint(out) as checkpoint:
        last = checkpoint.config["num_hidden_layers"] - 1
        info = checkpoint.tensors[f"model.layers.{last}.self_attn.lambda_q2"]
    with open(out / info.shard, "r+b") as file:
        file.seek(info.start)
        file.write(bytes(info.nbytes))
    assert growkit("verify", source, out, "--layerwise", layerwise).code == 3


def test_output_equals_input_or_lies_in_it(source: Path, growkit: Callable[..., Run]) -> None:
    before = snapshot(source)
    link = source.parent / "link"
    link.symlink_to(source)
    for out in (source, source / "inside", source.parent, link, link / "inside"):
        run = growkit("grow", source, *SIGNAL, "--out", out, "--overwrite", "--no-verify")
        assert run.code == 2, out
        message(run.err)
        assert snapshot(source) == before
    assert not list(source.parent.glob("*.partial"))


def test_output_exists(source: Path, tmp_path: Path, growkit: Callable[..., Run]) -> None:
    out = tiny.make_folder(tmp_path / "out", tiny.gda_config(), seed=9)
    before = snapshot(out)
    run = growkit("grow", source, *SIGNAL, "--out", out, "--no-verify")
    cause, remedy = message(run.err)
    assert run.code == 2 and "exists" in cause and "--overwrite" in remedy
    assert snapshot(out) == before
    run = growkit("grow", source, *SIGNAL, "--out", out, "--no-verify", "--overwrite")
    assert run.code == 0
    assert tiny.read_config(out)["num_attention_heads"] == 10


def test_a_failed_overwrite_keeps_the_old_folder(
    source: Path, tmp_path: Path, growkit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong growth: heads are tiled, the check on paper is off, verification fails, exit 3."""
    out = tiny.make_folder(tmp_path / "out", tiny.gda_config(), seed=9)
    before = snapshot(out)
    tile = staticmethod(lambda size, new, groups: AxisMap.tile(size, new // size))
    monkeypatch.setattr(AxisMap, "grouped", tile)
    monkeypatch.setattr("growkit.surgery.compose.check_links", lambda *arguments: None)
    run = growkit("grow", source, *SIGNAL, "--out", out, "--overwrite")
    assert run.code == 3
    cause, _ = message(run.err)
    assert "differ" in cause and "layer 0" in cause and ".partial" not in cause
    assert snapshot(out) == before
    assert not list(tmp_path.glob("*.partial"))


def test_disk_full(
    source: Path, growkit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    before = snapshot(source.parent)
    run = growkit("grow", source, *SIGNAL, "--out", source.parent / "out")
    assert run.code == 1 and "10 B free" in message(run.err)[0]
    assert snapshot(source.parent) == before


def test_disk_full_in_the_middle(
    source: Path, growkit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("growkit.checkpoint.ShardWriter.write", full)
    before = snapshot(source.parent)
    run = growkit("grow", source, *SIGNAL, "--out", source.parent / "out", "--no-verify")
    assert run.code == 1 and "disk is full" in message(run.err)[0]
    assert snapshot(source.parent) == before


def test_read_only_output(
    source: Path, growkit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the answer of the operating system is made up."""
    folder = source.parent / "locked"
    folder.mkdir()
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **k: Path(path) != folder and real(path, mode, **k)
    )
    run = growkit("grow", source, *SIGNAL, "--out", folder / "out", "--no-verify")
    cause, remedy = message(run.err)
    assert run.code == 1 and "locked" in cause and remedy
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["self_attn.o_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight"]
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_weights_are_named(
    name: str, value: float, tmp_path: Path, growkit: Callable[..., Run]
) -> None:
    """Computed, copied and small tensors: a warning with the name, and no proof."""
    tensors = tiny.make_tensors(tiny.gda_config(4, 2, 1), "BF16")
    tensors[f"model.layers.1.{name}"].reshape(-1)[3] = value
    source = tiny.write_folder(tmp_path / "source", tiny.gda_config(4, 2, 1), tensors)
    run = growkit("grow", source, *SIGNAL, "--out", tmp_path / "out", "--no-verify", "--quiet")
    assert run.code == 0
    warnings = [line for line in run.err.splitlines() if line.startswith("warning:")]
    assert "RuntimeWarning" not in run.err
    assert len([w for w in warnings if f"model.layers.1.{name}" in w]) == 1, run.err
    assert all("layers.0" not in warning for warning in warnings)
    run = growkit("grow", source, *SIGNAL, "--out", tmp_path / "proven")
    assert run.code == 3 and "not finite" in message(run.err)[0]
    assert f"model.layers.1.{name}" in run.err
    assert not (tmp_path / "proven").exists()


@pytest.mark.parametrize("where", ["write", "verify"])
def test_interrupt_leaves_nothing(
    where: str, source: Path, growkit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    target = {
        "write": "growkit.surgery.execute._Work.write",
        "verify": "growkit.verification.verify_checkpoints",
    }[where]
    monkeypatch.setattr(target, interrupt)
    before = snapshot(source.parent)
    run = growkit("grow", source, *SIGNAL, "--out", source.parent / "out")
    again, said = run.err.splitlines()
    assert (run.code, said) == (130, "interrupted")
    assert again.startswith(f"nothing was written; to begin again: growkit grow {source} --signal")
    assert snapshot(source.parent) == before
    assert not (source.parent / "out").exists()


# -- good runs ------------------------------------------------------------------------------------


def test_names_are_printed_as_they_are(source: Path, growkit: Callable[..., Run]) -> None:
    """[red] is no colour, :key: no emoji, and the next command can be pasted."""
    out = source.parent / "a [red] :key: [" / "] 'b'"
    run = growkit("grow", source, *SIGNAL, "--out", out, "--no-verify")
    assert run.code == 0 and out.is_dir()
    assert f"wrote {out}\n" in run.out
    assert str(out) in shlex.split(run.out.splitlines()[-1])


def test_grow_verifies_and_says_what_it_did(source: Path, growkit: Callable[..., Run]) -> None:
    out = source.parent / "out"
    run = growkit("grow", source, *SIGNAL, "--layers", "+1", "--out", out)
    assert run.code == 0, run.err
    assert "signal heads" in run.out and "verification" in run.out
    assert json.loads((out / "growkit.json").read_text())["verification"]["passed"] is True
    assert sorted(f.name for f in source.parent.iterdir()) == ["out", "source"]
    assert growkit("verify", source, out).code == 0


def test_json_is_one_document(source: Path, growkit: Callable[..., Run]) -> None:
    out = source.parent / "out"
    run = growkit("grow", source, *SIGNAL, "--out", out, "--no-verify", "--json")
    report = json.loads(run.out)
    assert run.err == ""
    assert report["plan"]["axes"]["signal_head"] == {
        "label": "signal heads",
        "before": 4,
        "after": 8,
    }
    planned = json.loads(growkit("plan", source, *SIGNAL, "--json").out)
    advice = planned.pop("advice")
    assert planned == report["plan"]
    assert advice["parameters"] == report["plan"]["after"]["parameters"]
    listed = json.loads(growkit("plan", source, *SIGNAL, "--json", "--tensors").out)
    assert {e["name"] for e in listed["tensor_list"]} == set(tiny.read_folder(out))
    looked = json.loads(growkit("inspect", out, "--json").out)
    assert looked["heads"]["ratio"] == "4:1" and looked["grown_from"] == "source"
    assert looked["cost"] == report["plan"]["after"]
    assert [layer["lambda_init"] for layer in looked["layers"]] == [0.2, 0.3]


def test_tables_for_people(source: Path, growkit: Callable[..., Run]) -> None:
    run = growkit("inspect", source)
    assert run.code == 0 and "family gda" in run.out and "lambda" in run.out
    run = growkit("plan", source, *SIGNAL, "--tensors")
    assert run.code == 0
    assert "exact" in run.out and "model.layers.1.self_attn.o_proj.weight" in run.out
    assert growkit("inspect", source, "--quiet").out == ""


def test_a_recipe_gives_the_same_bytes_as_flags(source: Path, growkit: Callable[..., Run]) -> None:
    recipe = source.parent / "recipe.yaml"
    recipe.write_text("description: test\ngrow: {signal_heads: x3, layers: 3, seed: 5}\n")
    runs = {
        "a": ("--recipe", recipe, *SIGNAL),
        "b": (*SIGNAL, "--layers", "+1", "--seed", "5"),
    }
    for name, arguments in runs.items():
        out = source.parent / name
        assert growkit("grow", source, *arguments, "--out", out, "--no-verify").code == 0
    weights = [(source.parent / name / "model.safetensors").read_bytes() for name in runs]
    assert weights[0] == weights[1]


def test_side_files_come_along_and_stale_ones_do_not(
    source: Path, growkit: Callable[..., Run]
) -> None:
    kept = {"generation_config.json": "{}", "tokenizer.json": "{}", "chat_template.jinja": "x"}
    dropped = {"README.md": "old", "optimizer.pt": "old", "model.safetensors.index.json.bak": "x"}
    for name, text in (kept | dropped).items():
        (source / name).write_text(text)
    out = source.parent / "out"
    arguments = ("grow", source, *SIGNAL, "--out", out, "--no-verify")
    refused = growkit(*arguments)  # what is called optimizer.pt is not dropped without a word
    assert refused.code == 1 and "--optimizer-state reset" in refused.err and not out.exists()
    assert growkit(*arguments, "--optimizer-state", "reset").code == 0
    for name, text in kept.items():
        assert (out / name).read_text() == text
    assert not (out / "optimizer.pt").exists()
    assert (out / "README.md").read_text() != "old"


def test_grown_shards_have_an_index(source: Path, growkit: Callable[..., Run]) -> None:
    out = source.parent / "out"
    arguments = ("--max-shard-size", "10KB", "--no-verify", "--threads", "2")
    assert growkit("grow", source, *SIGNAL, "--out", out, *arguments).code == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = tiny.read_folder(out)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert {f.name for f in out.glob("*.safetensors")} == set(index["weight_map"].values())


# -- torch is for models, not for surgery ---------------------------------------------------------

PROBE = """
import sys
from growkit.cli.main import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "transformers", "accelerate", "pandas"} & sys.modules.keys())
sys.stderr.write("HEAVY " + ",".join(heavy) + "\\n")
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("grow", "--help"),
        ("plan", "SOURCE", *SIGNAL),
        ("inspect", "SOURCE"),
        (
            "grow",
            "SOURCE",
            *SIGNAL,
            "--hidden",
            "x2",
            "--layers",
            "+1",
            "--no-verify",
            "--hash",
            "--out",
            "OUT",
        ),
    ],
    ids=lambda a: " ".join(a[:2]),
)
def test_torch_is_never_imported(arguments: tuple[str, ...], source: Path) -> None:
    places = {"SOURCE": str(source), "OUT": str(source.parent / "out")}
    command = [places.get(argument, argument) for argument in arguments]
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *command], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines()[-1] == "HEAVY "


def test_verification_does_import_torch(source: Path) -> None:
    """The control: the probe sees torch when it is there."""
    command = ["verify", str(source), str(source), "--tokens", "32"]
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *command], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "torch" in run.stderr.splitlines()[-1]
