"""A folded folder is an ordinary model: plain transformers gives the variant's greedy tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from folded_pairs import PAIRS, write_pair
from made_once import made_once
from safetensors.torch import load_file, save_file
from without_growkit import run_without_growkit

SERVER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

ids = torch.tensor([[0, 5, 9, 3, 8, 7, 11], [0, 0, 0, 0, 4, 2, 6]])
mask = (ids > 0).long()
report = {}
for folder, own_code in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own_code).eval()
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1]:].tolist()
    report[folder] = {"module": type(model).__module__, "tokens": tokens}
try:
    import growkit
except ImportError:
    print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(pair, variant, folded or broken) -> (folder, report of a process without growkit)."""

    def serve(root: Path) -> list[tuple[str, str, str, Any]]:
        folders = {}
        for number, name in enumerate(PAIRS):
            folders[name, "variant"], folders[name, "folded"] = write_pair(root / str(number), name)
            broken = broken_copy(folders[name, "folded"], root / f"{number}/broken")
            folders[name, "broken"] = broken
        asked = [(str(folder), kind == "variant") for (_, kind), folder in folders.items()]
        (root / "cache").mkdir()
        stdout = run_without_growkit(SERVER, json.dumps(asked), cache=root / "cache")
        report = json.loads(stdout.split("REPORT", 1)[1])
        return [(*key, str(folder), report[str(folder)]) for key, folder in folders.items()]

    _, found = made_once(tmp_path_factory, "folded", serve)
    return {(name, kind): (Path(folder), report) for name, kind, folder, report in found}


def broken_copy(folder: Path, out: Path) -> Path:
    """The last query head of every layer (a noise head, where there are such) is cut off."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith("o_proj.weight"):
            tensor[:, -32:] = 0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", PAIRS)
def test_the_folded_folder_gives_the_tokens_of_the_variant(served, name):
    expected = served[name, "variant"][1]
    assert expected["module"].startswith("transformers_modules.")
    assert len({token for row in expected["tokens"] for token in row}) > 3
    folder, found = served[name, "folded"]
    assert found["module"].startswith("transformers.models."), "no code of the folder's"
    assert found["tokens"] == expected["tokens"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == PAIRS[name][3]
    assert "auto_map" not in config and not list(folder.glob("*.py"))


@pytest.mark.parametrize("name", PAIRS)
def test_control_a_fold_without_a_head_gives_other_tokens(served, name):
    assert served[name, "broken"][1]["tokens"] != served[name, "variant"][1]["tokens"]


def test_the_export_warns_of_a_class_that_engines_read_differently(tmp_path, capsys):
    """Qwen2 with a head_dim of its own; the other classes are read alike everywhere."""
    write_pair(tmp_path / "a", "gda with biases")
    assert "answers wrongly without an error" in capsys.readouterr().err
    write_pair(tmp_path / "b", "gda with head norms")
    assert "Qwen2" not in capsys.readouterr().err
