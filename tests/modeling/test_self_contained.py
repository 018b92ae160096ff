"""A written folder holds its own code: a user without growkit loads it, and saves it again."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gda_cases import gda_config, scatter_weights
from made_once import made_once
from transformers import AutoModelForCausalLM
from variant_cases import CASES, model_of
from without_growkit import run_isolated, run_without_growkit

from growkit.model_code.exported import (
    MODEL_TYPES,
    ROOT,
    auto_map,
    code_files,
    export_code,
    flattened,
)
from growkit.modeling import GdaForCausalLM

TOKENS = [[5, 9, 3, 8], [1, 2, 3, 4]]

# Runs with growkit blocked; loads the folders, saves each again, loads those.
STRANGER = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
report = {}
for folder in sys.argv[1:]:
    def load(path, auto=AutoModelForCausalLM):
        return auto.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    model, info = load(folder)
    ids = torch.tensor(%s)
    model.save_pretrained(folder + "-again")
    again, _ = load(folder + "-again")
    base, _ = load(folder, AutoModel)
    report[folder] = {
        "module": type(model).__module__,
        "logits": model(ids).logits.tolist(),
        "again": again(ids).logits.tolist(),
        "base": type(base).__name__,
        "problems": [sorted(v) for v in info.values() if v],
        "generated": model.generate(ids, max_new_tokens=4, do_sample=False).tolist(),
        "config": type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__,
    }
print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Models saved by growkit, and what a process without growkit made of them."""
    models = {}
    for name, fields in {
        "own": {"noise_keys": "own", "hidden_act": "poly_norm"},
        "shared": {"noise_keys": "shared", "sub_layer_norm": False, "tie_word_embeddings": True},
    }.items():
        model = scatter_weights(GdaForCausalLM(gda_config(implementation="sdpa", **fields)))
        models[name] = model.eval()
    models |= {case: model_of(case) for case in CASES}

    def visit(root: Path) -> dict[str, Any]:
        for name, model in models.items():
            model.save_pretrained(root / name)
        (root / "cache").mkdir()
        folders = [root / name for name in models]
        stdout = run_without_growkit(STRANGER % TOKENS, *folders, cache=root / "cache")
        return json.loads(stdout.split("REPORT", 1)[1])

    root, report = made_once(tmp_path_factory, "stranger", visit)
    return {str(root / name): model for name, model in models.items()}, report


def test_a_user_without_growkit_gets_the_same_logits(stranger):
    models, report = stranger
    for folder, model in models.items():
        found = report[folder]
        assert found["module"].startswith("transformers_modules.")
        name = model.config.model_type.capitalize()
        assert (found["base"], found["config"]) == (f"{name}Model", f"{name}Config")
        assert found["problems"] == []
        assert torch.equal(torch.tensor(found["logits"]), model(torch.tensor(TOKENS)).logits)
        generated = model.generate(torch.tensor(TOKENS), max_new_tokens=4, do_sample=False)
        assert found["generated"] == generated.tolist()


def test_what_that_user_saves_loads_for_both(stranger):
    models, report = stranger
    for folder, model in models.items():
        assert report[folder]["again"] == report[folder]["logits"]
        written = json.loads(Path(folder + "-again", "config.json").read_text())
        assert written["auto_map"] == auto_map(written["model_type"])
        ours = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
        assert type(ours) is type(model), "the installed class wins over the folder's"
        assert torch.equal(ours(torch.tensor(TOKENS)).logits, model(torch.tensor(TOKENS)).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_code_is_written_without_torch_transformers_or_the_model(tmp_path, model_type):
    """What `growkit grow` calls; also with the model's own module names imported nowhere."""
    script = (
        "import sys, json; sys.path.insert(0, sys.argv[1])\n"
        "from growkit.model_code.exported import export_code\n"
        "auto_map = export_code(sys.argv[2], sys.argv[3])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'growkit.modeling'} & set(sys.modules)\n"
        "print(json.dumps([auto_map, sorted(heavy)]))"
    )
    root = Path(__file__).resolve().parents[2]
    stdout = run_isolated(script, root, tmp_path / "out", model_type, cache=tmp_path)
    assert json.loads(stdout) == [auto_map(model_type), []]
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(code_files(model_type))


def test_grow_and_save_write_the_same_code(stranger, tmp_path):
    for folder, model in stranger[0].items():
        model_type = model.config.model_type
        export_code(tmp_path / model_type, model_type)
        for name in code_files(model_type):
            assert Path(folder, name).read_text() == (tmp_path / model_type / name).read_text()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_files_import_only_each_other_and_public_libraries(model_type):
    files = code_files(model_type)
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in files, (name, node.module)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                top = module.split(".")[0]
                public = {"torch", "transformers", "huggingface_hub"}
                assert top in public | set(sys.stdlib_module_names), (name, top)


def test_flattening_rewrites_imports_and_nothing_else():
    source = "from ..gda.attention import X\nfrom .a import (\n    Y,\n)\nfrom os import path\n"
    path = ROOT / "variants" / "shared" / "one_call.py"
    assert flattened(source, path) == source.replace("..gda.attention", ".gda")


def test_saving_straight_to_the_hub_is_refused_with_the_way_that_works(tmp_path):
    model = GdaForCausalLM(gda_config())
    with pytest.raises(ValueError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
