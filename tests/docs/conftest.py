"""The folders that blocks of the documentation name, made short, and how their commands run."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from console import CONFIG, ROOT, run
from made_once import made_once


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What a shortened ``growkit demo`` leaves and says."""
    from growkit.training import demo as module

    def show(folder: Path) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("COLUMNS", "80")
            short = functools.partial(module.DemoSettings, eval_tokens=1024)
            patch.setattr(module, "DemoSettings", short)
            code, lines = run("growkit demo --steps 4")
        assert code == 0, lines
        return lines

    return made_once(tmp_path_factory, "demo", show)


@pytest.fixture(scope="session")
def stand_in(demo: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with SmolLM2's hidden size and heads, 4 layers and a small FFN and vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    out = tmp_path_factory.mktemp("stand-in") / "smollm2-135m-instruct"
    small = {"num_hidden_layers": 4, "intermediate_size": 96, "vocab_size": 1024}
    config = AutoConfig.from_pretrained(CONFIG, **small)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo[0] / "checkpoints/demo/base" / name, out)
    return out


@pytest.fixture
def place(
    tmp_path: Path, demo: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The folder that the commands of a page run in."""
    shutil.copytree(demo[0] / "checkpoints", tmp_path / "checkpoints")
    for name in ("recipes", "tests", "README.md", "LICENSE", "benchmarks/last_word.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    study = "benchmarks/studies/symmetry"
    shutil.copytree(ROOT / study, tmp_path / study, ignore=shutil.ignore_patterns("*.png", "*.svg"))
    (tmp_path / "HuggingFaceTB").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield tmp_path
