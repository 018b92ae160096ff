"""What is written, against a naive construction; the choices; what a run makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
import yaml
from safetensors.torch import load_file
from state_runs import GDA, LLAMA, Run, grow, load, run, steps, stored

from growkit.cli.main import main
from growkit.core.errors import CheckpointError, UsageError
from growkit.optimizer_state import write as grow_module
from growkit.optimizer_state.axis_factors import mean_squares
from growkit.optimizer_state.store import FOLDER, INDEX, read_store
from growkit.surgery.symmetry import Symmetry, shares

SIGNAL = [0, 0, 1, 1, None, 2, 2, 3, 3, None]  # heads of q_proj after signal_heads x2; None: noise


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("gda") / "run", GDA)


def old_state(source: Run, name: str) -> dict[str, torch.Tensor]:
    return source.optimizer.state[dict(source.model.named_parameters())[name]]


def heads(matrix: torch.Tensor) -> torch.Tensor:
    """Rows as heads, head_dim 4."""
    return matrix.view(-1, 4, matrix.shape[1])


@pytest.mark.parametrize("mode", ["even", "split"])
@pytest.mark.parametrize("reset_new", [False, True])
def test_signal_heads_by_hand(mode: str, reset_new: bool, source: Run, tmp_path: Path) -> None:
    request = {"optimizer_state": "reset-new"} if reset_new else {}
    grow(source.folder, tmp_path / "grown", signal_heads="x2", symmetry=mode, **request)
    state = stored(tmp_path / "grown")
    for layer in range(2):
        base = f"model.layers.{layer}.self_attn."
        old, new = old_state(source, base + "q_proj.weight"), state[base + "q_proj.weight"]
        # [s0 s1 | n0] [s2 s3 | n1] -> [s0 s0 s1 s1 | n0] ...; old noise heads are rows 2 and 5
        rows = {0: 0, 1: 1, 2: 3, 3: 4}
        for kind, share in (
            ("exp_avg", 1 / 2),
            ("exp_avg_sq", 1 / 3 if mode == "split" else 1 / 4),
        ):
            seen: set[int] = set()
            for place, head in enumerate(SIGNAL):
                if head is None:
                    wanted = heads(old[kind])[2 if place == 4 else 5]
                else:
                    part = 0.0 if reset_new and head in seen else share
                    wanted = heads(old[kind])[rows[head]] * part
                    seen.add(head)
                found = heads(new[kind])[place]
                # The split draws one of 128 fractions: 1/3 up to 5e-6.
                assert torch.allclose(found, wanted, rtol=2e-5, atol=0), (kind, place)
        old, new = old_state(source, base + "o_proj.weight"), state[base + "o_proj.weight"]
        for kind in ("exp_avg", "exp_avg_sq"):
            for place in range(8):
                found = new[kind][:, place * 8 : place * 8 + 8]
                wanted = old[kind][:, place // 2 * 8 : place // 2 * 8 + 8]
                assert torch.equal(found, wanted * (0 if reset_new and place % 2 else 1))
        untouched = state[base + "k_proj.weight"]["exp_avg"]
        assert torch.equal(untouched, old_state(source, base + "k_proj.weight")["exp_avg"])
    assert {p.step for p in read_store(tmp_path / "grown" / FOLDER).parameters.values()} == {8.0}


def test_steps_of_one_block_and_of_many_are_equal(
    source: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"hidden": "x2", "ffn": "+5", "signal_heads": "x2"}
    grow(source.folder, tmp_path / "a", **request)
    monkeypatch.setattr("growkit.optimizer_state.write.BLOCK_ELEMENTS", 7)
    grow(source.folder, tmp_path / "b", threads=3, **request)
    for kind in ("exp_avg", "exp_avg_sq"):
        a, b = (tmp_path / n / FOLDER / f"{kind}.safetensors" for n in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_growth_of_growth_is_the_composed_growth(source: Run, tmp_path: Path) -> None:
    """A grown folder that was not trained is a source like any other; equal shares compose."""
    even = {"symmetry": "even"}
    grow(source.folder, tmp_path / "a", ffn="x2", **even)
    manifest = grow(tmp_path / "a", tmp_path / "ab", hidden="x2", **even)
    assert manifest["optimizer_state"]["source"]["layout"] == "growkit"
    grow(source.folder, tmp_path / "both", ffn="x2", hidden="x2", **even)
    step_by_step, at_once = stored(tmp_path / "ab"), stored(tmp_path / "both")
    assert step_by_step.keys() == at_once.keys()
    for name, moments in at_once.items():
        for kind, values in moments.items():
            assert torch.allclose(step_by_step[name][kind], values, rtol=1e-14, atol=0)


def test_files_are_plain_safetensors(source: Run, tmp_path: Path) -> None:
    grow(source.folder, tmp_path / "grown", layers="+1")
    folder = tmp_path / "grown" / FOLDER
    content = load_file(folder / "exp_avg.safetensors")
    model = load(tmp_path / "grown")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert set(content) == {n for n in shapes if ".layers.2." not in n}
    assert all(values.shape == shapes[name] for name, values in content.items())
    index = json.loads((folder / INDEX).read_text())
    assert index["format"] == 1 and set(index["parameters"]) == set(content)
    told = index["roles"]["q"]
    assert [entry["action"] for entry in told] == ["copied", "fresh"]
    assert "begins as the identity" in told[1]["why"]
    assert index["source"]["groups"][0]["betas"] == [0.9, 0.95]


def test_store_of_two_saves_is_refused(source: Run, tmp_path: Path) -> None:
    grow(source.folder, tmp_path / "a", ffn="x2")
    folder = tmp_path / "a" / FOLDER
    (folder / "exp_avg_sq.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Files of two saves are mixed"):
        read_store(folder)
    (folder / INDEX).write_text('{"format": 9}')
    with pytest.raises(CheckpointError, match="format 9"):
        read_store(folder)
    (folder / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_store(folder)


def test_failure_leaves_nothing(
    source: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(grow_module, "grown_blocks", fail)
    with pytest.raises(RuntimeError, match="disk"):
        grow(source.folder, tmp_path / "grown", ffn="x2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("copies", [2, 3, 4, 5])
@pytest.mark.parametrize("mode", ["split", "even", "noise"])
def test_mean_squares_are_those_of_the_shares(mode: str, copies: int) -> None:
    weights = np.random.default_rng(copies).standard_normal((64, 512))
    symmetry = Symmetry(mode, noise_snr_db=6.0, seed=1)
    wanted = mean_squares(copies, symmetry)
    for part, square in zip(shares(weights, copies, symmetry, "x", 0), wanted, strict=True):
        assert np.sum(part**2) / np.sum(weights**2) == pytest.approx(square, rel=0.02)
        mean = np.sum(part * weights) / np.sum(weights**2)
        assert mean == pytest.approx(1 / copies, abs=0.01)


def test_warning_where_new_slots_would_jump(tmp_path: Path) -> None:
    """Zero moments with an old counter and beta2 = 0.999."""
    source = run(tmp_path / "run", LLAMA, done=2)
    warnings: list[str] = []
    grow(source.folder, tmp_path / "a", ffn="x2", new_units="zero", warn=warnings.append)
    assert not warnings  # betas (0.9, 0.95)
    for group in source.optimizer.param_groups:
        group["betas"] = (0.9, 0.999)
    torch.save(source.optimizer.state_dict(), source.folder / "optimizer.pt")
    grow(source.folder, tmp_path / "b", ffn="x2", warn=warnings.append)
    assert not warnings  # copies have moments
    grow(source.folder, tmp_path / "c", ffn="x2", new_units="zero", warn=warnings.append)
    grow(source.folder, tmp_path / "d", ffn="x2", optimizer_state="reset-new", warn=warnings.append)
    assert len(warnings) == 2 and all("6.6 times the learning rate" in w for w in warnings)


def test_flag_and_recipe(source: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["grow", str(source.folder), "--ffn", "x2", "--no-verify", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "optimizer state from optimizer.pt, step 8: 25 copied, 6 grown; estimates for" in text
    assert main([*arguments, str(tmp_path / "b"), "--optimizer-state", "reset"]) == 0
    assert not (tmp_path / "b" / FOLDER).exists()
    assert main([*arguments, str(tmp_path / "c"), "--optimizer-state", "rest"]) == 2
    assert "Did you mean 'reset'" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"grow": {"ffn": "x2", "optimizer_state": "reset-new"}}))
    command = ["grow", str(source.folder), "--recipe", str(recipe), "--no-verify"]
    assert main([*command, "--out", str(tmp_path / "d")]) == 0
    manifest = json.loads((tmp_path / "d" / "growkit.json").read_text())
    assert manifest["optimizer_state"]["mode"] == "reset-new"
    assert manifest["request"]["optimizer_state"] == "reset-new"


def test_without_state_torch_stays_out(tmp_path: Path) -> None:
    folder = tiny.make_folder(tmp_path / "a", GDA)
    program = (
        "import sys; from growkit.cli.main import main;"
        f"code = main(['grow', {str(folder)!r}, '--ffn', 'x2', '--no-verify', '--out', "
        f"{str(tmp_path / 'b')!r}]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_loading_names_what_begins_anew(source: Run, tmp_path: Path) -> None:
    from growkit.optimizer_state.load import load_into

    grow(source.folder, tmp_path / "grown", layers="+1")
    model = load(tmp_path / "grown")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2]
    optimizer = torch.optim.Muon(matrices, lr=1e-2)
    result = load_into(optimizer, model, read_store(tmp_path / "grown" / FOLDER))
    assert not result.loaded and len(result.fresh) == len(matrices)  # AdamW's state is not Muon's
    adamw = torch.optim.AdamW([{"params": matrices}], lr=1e-2)
    result = load_into(adamw, model, read_store(tmp_path / "grown" / FOLDER))
    assert {name.split(".")[2] for name in result.fresh} == {"2"}
    assert "model.norm.weight" in result.unused
    assert list(steps(model, adamw, 0, 2))
    other = load(source.folder)
    with pytest.raises(CheckpointError, match="another model"):
        grow(source.folder, tmp_path / "wide", hidden="x2")
        load_into(
            torch.optim.AdamW(other.parameters()), other, read_store(tmp_path / "wide" / FOLDER)
        )


def test_explicit_choice_needs_state(tmp_path: Path) -> None:
    folder = tiny.make_folder(tmp_path / "a", GDA)
    with pytest.raises(UsageError, match="--optimizer-from"):
        grow(folder, tmp_path / "b", ffn="x2", optimizer_state="reset-new")
