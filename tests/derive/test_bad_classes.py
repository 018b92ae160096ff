"""Classes and folders that cannot be derived: one sentence, an exit code, and nothing left behind.

The class is :mod:`own_class`, small enough that a whole derivation takes a second.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import own_class
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from growkit.cli.main import main
from growkit.derive.derivation import derive, derive_from_json
from growkit.families.derived.store import cache_folder

AutoConfig.register("own_class", own_class.OwnConfig)
AutoModelForCausalLM.register(own_class.OwnConfig, own_class.OwnForCausalLM)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder and a folder of temporary files of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def folder_of(path: Path, **fields: Any) -> Path:
    """A checkpoint folder of the class, with the weights of its config."""
    torch.manual_seed(0)
    own_class.OwnForCausalLM(own_class.OwnConfig(**fields)).save_pretrained(path)
    return path


def config_folder(path: Path, **fields: Any) -> Path:
    path.mkdir()
    own_class.OwnConfig(**fields).save_pretrained(path)
    return path


FAULTS = {
    "constructor": "the class accepts none (RuntimeError: hidden_size 32 is too small for me",
    "large": "cannot be made smaller than 9013376 parameters",
    "arguments": "missing 1 required argument: 'pixels'",
    "tie": "The twin cannot be saved (The class cannot save itself",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["derive", "plan"])
def test_a_class_that_misbehaves_ends_in_a_sentence_and_leaves_nothing(
    fault: str,
    command: str,
    tmp_path: Path,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = config_folder(tmp_path / "a", fault=fault)
    save_file({}, folder / "model.safetensors")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    arguments = [command, str(folder), *(["--layers", "x2"] if command == "plan" else [])]
    assert main(arguments) == (1 if command == "derive" else 2)
    told = capsys.readouterr().err
    assert FAULTS[fault] in " ".join(told.split()) and "Traceback" not in told
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(scratch.iterdir())
    assert not cache_folder().is_dir() or not list(cache_folder().iterdir())


def test_a_growth_whose_control_does_not_bite_is_not_offered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "a", fault="deaf")
    out = tmp_path / "b"
    assert main(["grow", str(folder), "--ffn", "x2", "--out", str(out)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "Its control does not bite (relative error" in told and "Traceback" not in told
    assert not out.exists()


def test_weights_that_the_class_does_not_have_are_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"layers.0.mixer.weight": tensors["embed.weight"]}, folder / "x")
    os.replace(folder / "x", folder / "model.safetensors")
    out = tmp_path / "b"
    assert main(["grow", str(folder), "--ffn", "x2", "--out", str(out)]) in (1, 2)
    assert "layers.0.mixer.weight" in capsys.readouterr().err
    assert not out.exists()


def test_nothing_is_fetched_and_nothing_is_left_after_an_interrupt(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a derivation opened a socket")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    table = derive(own_class.OwnConfig())
    assert "error" in table["operators"]["--ffn"]
    assert not list(scratch.iterdir())

    for stopped in (KeyboardInterrupt, MemoryError, SystemExit):

        def step(text: str, stopped: type[BaseException] = stopped) -> None:
            if text == "proof of --ffn":
                assert list(scratch.iterdir()), "the twin lies in the folder now"
                raise stopped

        with pytest.raises(stopped):
            derive(own_class.OwnConfig(), step)
        assert not list(scratch.iterdir())


LARGE = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
sys.path.insert(0, sys.argv[1])
import own_class
from transformers import AutoConfig, AutoModelForCausalLM
from growkit.derive.derivation import derive
AutoConfig.register("own_class", own_class.OwnConfig)
AutoModelForCausalLM.register(own_class.OwnConfig, own_class.OwnForCausalLM)
config = own_class.OwnConfig(**json.loads(sys.argv[2]))
table = derive(config)
print(json.dumps([table["operators"]["--ffn"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA means that of Linux")
def test_a_config_of_a_million_million_parameters_is_derived_in_two_gigabytes() -> None:
    sizes = {
        "vocab_size": 200_000,
        "hidden_size": 32_768,
        "intermediate_size": 102_400,
        "num_hidden_layers": 100,
        "num_attention_heads": 256,
    }
    assert 3 * sizes["hidden_size"] * sizes["intermediate_size"] * 100 > 10**12
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", LARGE, here, json.dumps(sizes)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    proof, kilobytes = json.loads(done.stdout.splitlines()[-1])
    assert "error" in proof and kilobytes < 2 << 20


def test_a_class_that_computes_with_its_numbers_is_not_made_at_full_size() -> None:
    from growkit.derive.builder import Builder, Underivable

    class Eager(own_class.OwnForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            float(self.embed.weight.detach().sum())  # no number on the meta device

    Eager.__module__ = own_class.__name__
    builder = Builder(own_class.OwnConfig(), _Direct(Eager))
    assert builder.shapes(own_class.OwnConfig().to_dict())["embed.weight"] == (64, 32)
    large = own_class.OwnConfig(hidden_size=65_536, intermediate_size=262_144).to_dict()
    with pytest.raises(Underivable, match="cannot be built without its numbers"):
        builder.shapes(large)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20


class _Direct:
    """A class used as an Auto class is."""

    def __init__(self, model_class: Any) -> None:
        self.model_class = model_class

    def from_config(self, config: Any, **options: Any) -> Any:
        return self.model_class(config)


# -- classes that a folder brings ------------------------------------------------------------------


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights and code of a class that transformers does not know."""
    folder = folder_of(tmp_path / "brought")
    shutil.copy(own_class.__file__, folder / "own_class.py")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "brought_class"
    config["auto_map"] = {
        "AutoConfig": "own_class.OwnConfig",
        "AutoModelForCausalLM": "own_class.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    code = (folder / "own_class.py").read_text().replace('"own_class"', '"brought_class"')
    (folder / "own_class.py").write_text(code)
    monkeypatch.setenv("OWN_CLASS_MARKER", str(tmp_path / "marker"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


@pytest.mark.parametrize("command", ["derive", "plan", "inspect", "grow"])
def test_code_of_a_folder_is_never_run_without_the_flag(
    command: str, brought: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"plan": ["--ffn", "x2"], "grow": ["--ffn", "x2", "--out", str(tmp_path / "out")]}
    assert main([command, str(brought), *more.get(command, [])]) in (1, 2)
    told = capsys.readouterr()
    assert "--trust-remote-code" in told.err and "brought_class" in told.err
    assert "growkit-config-" not in told.err, "a path of ours says nothing to a user"
    assert "Traceback" not in told.err and not told.out
    assert not (tmp_path / "marker").exists() and not (tmp_path / "out").exists()


def test_a_misspelt_type_is_told_the_nearest_where_the_folder_has_code_of_its_own(
    brought: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((brought / "config.json").read_text())
    (brought / "config.json").write_text(json.dumps(config | {"model_type": "mistrall"}))
    assert main(["inspect", str(brought)]) in (1, 2)
    told = " ".join(capsys.readouterr().err.split())
    assert "Did you mean 'mistral'?" in told and "--trust-remote-code" in told


def test_a_class_that_a_folder_brings_is_derived_with_the_flag(
    brought: Path, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["derive", str(brought), "--trust-remote-code", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (tmp_path / "marker").exists()
    assert "error" in result["operators"]["--ffn"] and "error" in result["operators"]["--layers"]
    assert Path(result["table"]).parent == cache_folder() and not list(scratch.iterdir())
    (tmp_path / "marker").unlink()
    # What was derived is data: planning and writing by it runs no code.
    out = tmp_path / "grown"
    growth = ["--ffn", "x2", "--layers", "x2", "--no-verify"]
    assert main(["grow", str(brought), *growth, "--out", str(out)]) == 0
    assert not (tmp_path / "marker").exists()
    assert main(["verify", str(brought), str(out), "--trust-remote-code"]) == 0
    assert (out / "own_class.py").is_file()


def test_code_that_is_not_there_or_fails_is_said(
    brought: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (brought / "own_class.py").write_text("raise RuntimeError('not today')\n")
    assert main(["derive", str(brought), "--trust-remote-code"]) == 1
    assert "not today" in capsys.readouterr().err
    (brought / "own_class.py").unlink()
    assert main(["derive", str(brought), "--trust-remote-code"]) == 1
    told = capsys.readouterr().err
    assert "own_class" in told and "Traceback" not in told


def test_a_config_that_no_class_makes_is_refused(tmp_path: Path) -> None:
    from growkit.core.errors import CheckpointError

    with pytest.raises(CheckpointError, match="'no_such_class'"):
        derive_from_json({"model_type": "no_such_class"})
