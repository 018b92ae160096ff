"""A recipe with a mistake is refused before anything is written, and the message says where."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from training_runs import recipe_values

from growkit.core.errors import UsageError
from growkit.training import load_recipe
from growkit.training.read_recipe import make_recipe

REPOSITORY = Path(__file__).parents[2]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


GOOD = """\
model:
  checkpoint: somewhere
data:
  files: sample
training:
  max_steps: 10
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_steps: 10", "max_step: 10", r"line 6: unknown key 'max_step' .*Did you mean 'max_s"),
        ("model:", "modle:", r"line 1: unknown key 'modle' in the recipe.*Did you mean 'model'"),
        ("files: sample", "file: sample", r"line 4: .*'file' in section 'data'.*'files'"),
        ("checkpoint:", "zzz:", r"'zzz' in section 'model'\. Valid keys: checkpoint, config"),
        ("max_steps: 10", "max_steps: ten", r"line 6: training.max_steps is 'ten'"),
        ("max_steps: 10", "max_steps: true", r"training.max_steps is True\. Give a number"),
        ("max_steps: 10", "max_steps: 9\n  router_aux_loss: on", r"line 7: .*_loss is True\. Give"),
        ("max_steps: 10", "max_steps: 9\n  train: {new_then_all: on}", r"It is \{'new_then_all'"),
        ("max_steps: 10", "max_steps: 0", r"training.max_steps is 0\. .*greater than 0"),
        ("max_steps: 10", "seed: 1", r"exactly one of 'max_steps' and 'max_tokens'"),
        ("files: sample", "files: []", r"'files' is empty"),
        ("  checkpoint: somewhere", "  dtype: auto", r"exactly one of 'checkpoint'"),
        ("max_steps: 10", "max_steps: 10\n  max_steps: 11", r"line 7 gives 'max_steps' a second"),
        ("max_steps: 10", "max_steps: [", "not valid YAML"),
        ("max_steps: 10", "max_steps: 10\n  schedule: wds", r"schedule is 'wds'.*'wsd'"),
        ("max_steps: 10", "max_steps: 10\n  warmup_steps: 11", r"warmup_steps \(11\).*\(10\)"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(UsageError, match=message):
        load_recipe(write(tmp_path, GOOD.replace(old, new)))
    load_recipe(write(tmp_path, GOOD))


def test_not_a_recipe_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not hold a YAML mapping"):
        load_recipe(write(tmp_path, "- 1\n"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="not UTF-8"):
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
        load_recipe(tmp_path / "binary.yaml")


def test_unknown_key_of_the_model_config(text_file: Path, tmp_path: Path) -> None:
    """transformers would take hiden_size silently and build another model."""
    from growkit.training import train

    values = recipe_values(text_file)
    values["model"]["config"]["hiden_size"] = 32
    with pytest.raises(UsageError, match=r"unknown key 'hiden_size'.*Did you mean 'hidden_size'"):
        train(make_recipe(values), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    values["model"]["config"] = {"model_type": "lama"}
    with pytest.raises(UsageError, match=r"'lama'.*Did you mean 'llama'"):
        train(make_recipe(values), tmp_path / "other")


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, ["training.learning_rate=1e-4", "data.files=[a.txt, b.txt]"])
    assert recipe.training.learning_rate == 1e-4
    assert recipe.data.files == [Path("a.txt"), Path("b.txt")]
    assert load_recipe(path, max_steps=7).total_steps == 7
    with pytest.raises(UsageError, match="unknown key 'learning_rat'"):
        load_recipe(path, ["training.learning_rat=1e-4"])
    with pytest.raises(UsageError, match="not of the form"):
        load_recipe(path, ["training.learning_rate"])
    values = yaml.safe_load(GOOD)
    values["data"] |= {
        "files": None,
        "mixture": [{"name": n, "files": [n], "weight": 1} for n in "ab"],
    }
    mixed = write(tmp_path, yaml.safe_dump(values))
    mixture = load_recipe(mixed, ["data.mixture.1.weight=0.5"]).data.mixture
    assert mixture is not None and [s.weights[0] for s in mixture] == [1, 0.5]
    with pytest.raises(UsageError, match="behind a list's end"):
        load_recipe(mixed, ["data.mixture.2.weight=0.5"])
    path = write(tmp_path, GOOD)
    with pytest.raises(UsageError, match="no mapping"):
        load_recipe(path, ["data.files.first=1"])
    with pytest.raises(UsageError, match=r"--set 'data.files=\[a' line 1 is not valid YAML"):
        load_recipe(path, ["data.files=[a"])


def test_budget_in_tokens_is_rounded_up_to_whole_steps(text_file: Path) -> None:
    values = recipe_values(text_file)
    del values["training"]["max_steps"]
    values["training"]["max_tokens"] = 12 * 4 * 16 + 1
    recipe = make_recipe(values)
    assert recipe.tokens_per_step == 4 * 16
    assert recipe.total_steps == 13


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("train-*.yaml")))
def test_committed_recipes(path: Path) -> None:
    text = path.read_text()
    assert text.splitlines()[0].startswith(f"# growkit train recipes/{path.name}")
    recipe = load_recipe(path)
    assert yaml.safe_load(text)["training"]["learning_rate"] == recipe.training.learning_rate


def test_reading_a_recipe_imports_no_torch(tmp_path: Path) -> None:
    """A mistake is reported at once, not after the libraries are loaded."""
    import subprocess
    import sys

    program = (
        "import sys; from pathlib import Path; from growkit.training import load_recipe;"
        "import growkit.cli.train, growkit.cli.demo;"
        "load_recipe(Path(sys.argv[1])); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    path = write(tmp_path, GOOD)
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
