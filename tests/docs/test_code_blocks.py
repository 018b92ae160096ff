"""The Python and YAML blocks of the documentation: they run, or at least say what exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from console import ROOT, fences, run

from growkit.recipe.section import Section
from growkit.training.recipe import Recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages whose Python blocks run, one after another in one namespace; others are compiled.
RUN = ("README.md", "python-api.md", "evaluation.md", "optimizer-state.md", "serving.md")


def with_blocks(kind: str) -> list[Path]:
    return [page for page in PAGES if fences(page, kind)]


@pytest.fixture
def folders(place: Path) -> Path:
    """``ckpt`` and ``run``: the trained base of the demo; ``grown``: grown from it."""
    for name in ("ckpt", "run"):
        (place / name).symlink_to(place / "checkpoints/demo/base")
    return place


def given(page: Path, folders: Path) -> dict[str, Any]:
    """What the blocks of a page take for granted: a grown folder, data, objects."""
    import torch
    from transformers import AutoModelForCausalLM

    if page.name != "python-api.md":  # grows it itself
        assert run("growkit grow run --ffn x1.5 --out grown --no-verify --quiet")[0] == 0
    if page.name == "optimizer-state.md":
        model = AutoModelForCausalLM.from_pretrained("grown")
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "Path": Path}
    ids = torch.arange(64).reshape(2, 32)
    data = [{"input_ids": row, "labels": row} for row in ids]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    return {"batches": [ids], "data": data, "held_out": text}


@pytest.mark.parametrize("page", with_blocks("python"), ids=lambda page: page.name)
def test_python_blocks_run(page: Path, folders: Path) -> None:
    compiled = [
        compile("\n" * line + body, page.name, "exec") for line, _, body in fences(page, "python")
    ]
    if page.name in RUN:
        names = given(page, folders)
        for code in compiled:
            exec(code, names)


def unknown(values: Any, kind: type, path: str = "") -> list[str]:
    """Keys of a part of a recipe that its section has not."""
    if not isinstance(values, dict):
        return []
    fields = {info.alias or name: info for name, info in kind.model_fields.items()}  # type: ignore[attr-defined]
    found = [f"{path}{key}" for key in values if key not in fields]
    for key, value in values.items():
        inner = _sections(fields[key].annotation) if key in fields else []
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and inner:
                found += min((unknown(item, k, f"{path}{key}.") for k in inner), key=len)
    return found


def _sections(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _sections(part)]


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=lambda page: page.name)
def test_yaml_blocks_have_keys_that_exist(page: Path) -> None:
    for line, _, body in fences(page, "yaml"):
        values = yaml.safe_load(body)
        if "task" in values:  # of lm-evaluation-harness
            continue
        assert unknown(values, Recipe) == [], f"{page.name}:{line}"
        if {"model", "data", "training"} <= values.keys():
            Recipe.model_validate(values)


def test_a_wrong_key_is_found() -> None:
    recipe = {"training": {"lr": 1}, "data": {"mixture": [{"nam": "a"}]}, "steps": 2}
    assert unknown(recipe, Recipe) == ["steps", "training.lr", "data.mixture.nam"]
