"""The trajectory oracle: with its rates, the grown run is the source run, step by step.

growth.md section 10: a tensor whose readers were copied n times takes lr / n and weight decay x n,
one whose rows were copied with share s takes eps x s; the loss then follows the source run's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from state_runs import GDA, LLAMA, OPTIONS, Run, grow, load, run, steps

from growkit.optimizer_state.load import load_into
from growkit.optimizer_state.store import FOLDER, read_store

STEPS = 30
TIED = tiny.llama_config(4, 2, tie_word_embeddings=True)
# (config, growth, parts of names that read a doubled axis, parts that produce one)
CASES: dict[str, tuple[tiny.Config, dict[str, str], tuple[str, ...], tuple[str, ...]]] = {
    "heads": (LLAMA, {"heads": "x2"}, ("o_proj",), ("q_proj", "k_proj", "v_proj")),
    "query heads": (LLAMA, {"query_heads": "x2"}, ("o_proj",), ("q_proj",)),
    "gda heads": (GDA, {"uniform_heads": "x2"}, ("o_proj",), ("q_proj",)),
    "ffn": (GDA, {"ffn": "x2"}, ("down_proj",), ("gate_proj", "up_proj")),
    "hidden": (
        GDA, {"hidden": "x2"},
        ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"),
        ("embed", "o_proj", "down_proj", "layernorm", "model.norm"),
    ),
    "tied hidden": (
        TIED, {"hidden": "x2"},
        ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "model.norm"),
        ("embed", "o_proj", "down_proj", "layernorm"),
    ),
}  # fmt: skip


def optimizer_for(
    model: Any, readers: tuple[str, ...], producers: tuple[str, ...], **options: float
) -> Any:
    """AdamW with the rates of the oracle, one group a tensor."""
    groups = []
    for name, parameter in model.named_parameters():
        group = {**OPTIONS, **options, "params": [parameter]}
        if any(part in name for part in readers):
            group["lr"] /= 2
            group["weight_decay"] *= 2
        if any(part in name for part in producers):
            group["eps"] /= 2
        groups.append(group)
    return torch.optim.AdamW(groups)


def follow(
    source: Run, out: Path, growth: dict[str, str], optimizer: Any, **given: Any
) -> list[float]:
    """Losses of the grown run."""
    if not out.exists():
        grow(source.folder, out, symmetry="even", **growth)
    model = load(out)
    made = optimizer(model)
    if given.get("state", True):
        state = read_store(out / FOLDER)
        assert not load_into(made, model, state).fresh
    if "change" in given:
        given["change"](made)
    return list(steps(model, made, 100, STEPS))


def drift(losses: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, wanted, strict=True))


def source_and_losses(tmp_path: Path, config: tiny.Config) -> tuple[Run, list[float]]:
    source = run(tmp_path / "run", config)
    return source, list(steps(source.model, source.optimizer, 100, STEPS))


@pytest.mark.parametrize("case", CASES)
def test_grown_run_follows_the_source_run(case: str, tmp_path: Path) -> None:
    config, growth, readers, producers = CASES[case]
    source, wanted = source_and_losses(tmp_path, config)
    losses = follow(
        source, tmp_path / "grown", growth, lambda m: optimizer_for(m, readers, producers)
    )
    assert drift(losses, wanted) < 1e-12
    assert drift(wanted, [wanted[0]] * STEPS) > 0.02  # and the run moves


def test_signal_heads_follow_where_eps_is_nothing(tmp_path: Path) -> None:
    """Rows of q_proj hold copied and other heads, which would need an eps of their own each."""
    config, growth = GDA, {"signal_heads": "x2"}
    tiny_eps: dict[str, Any] = {"eps": 1e-30}
    source = run(tmp_path / "run", config)
    for group in source.optimizer.param_groups:
        group["eps"] = 1e-30
    wanted = list(steps(source.model, source.optimizer, 100, STEPS))
    losses = follow(
        source, tmp_path / "grown", growth, lambda m: optimizer_for(m, ("o_proj",), (), **tiny_eps)
    )
    assert drift(losses, wanted) < 1e-11


def scale_back(optimizer: Any) -> None:
    """Moments of producers without their factor."""
    for group in optimizer.param_groups:
        if group["eps"] < OPTIONS["eps"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["exp_avg"] *= 2
                optimizer.state[parameter]["exp_avg_sq"] *= 4


def restart_counters(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["step"].zero_()


@pytest.mark.parametrize(
    ("what", "at_least"),
    [("lr", 3e-4), ("eps", 1e-8), ("moments", 1e-4), ("counters", 1e-4), ("fresh", 1e-3)],
)
@pytest.mark.parametrize("case", ["heads", "hidden"])
def test_without_one_of_its_parts_it_drifts(
    case: str, what: str, at_least: float, tmp_path: Path
) -> None:
    """Negative controls: every part of the rule is needed."""
    config, growth, readers, producers = CASES[case]
    source, wanted = source_and_losses(tmp_path, config)
    losses = follow(
        source,
        tmp_path / "grown",
        growth,
        lambda m: optimizer_for(
            m, () if what == "lr" else readers, () if what == "eps" else producers
        ),
        state=what != "fresh",
        change={"moments": scale_back, "counters": restart_counters}.get(what, lambda o: None),
    )
    assert drift(losses[:1], wanted[:1]) < 1e-12  # the same model
    assert drift(losses, wanted) > at_least


@pytest.mark.parametrize("case", CASES)
def test_manifest_states_these_rates(case: str, tmp_path: Path) -> None:
    config, growth, readers, producers = CASES[case]
    source = run(tmp_path / "run", config, done=1)
    told = grow(source.folder, tmp_path / "grown", symmetry="even", **growth)["optimizer_state"]
    by_name = {
        "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "gate_proj",
               "up": "up_proj", "down": "down_proj", "embed": "embed", "lm_head": "lm_head",
               "final_norm": "model.norm", "input_norm": "layernorm", "ffn_norm": "layernorm",
    }  # fmt: skip
    for role, entry in told["roles"].items():
        name = by_name.get(role, role)
        wanted = {"learning_rate": 1.0, "weight_decay": 1.0, "eps": 1.0}
        if any(part == name for part in readers):
            wanted |= {"learning_rate": 0.5, "weight_decay": 2.0}
        if any(part == name for part in producers):
            wanted |= {"eps": 0.5}
        if set(wanted.values()) == {1.0}:
            assert "same_dynamics" not in entry
        else:
            assert entry["same_dynamics"] == wanted
