"""Layers of B that are layers of A are computed once, and nothing wrong hides behind that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import verify_models as models

from growkit.verification import VerificationReport, shared_layers, verify_checkpoints


def compare(a: Path, b: Path, **options: Any) -> VerificationReport:
    return verify_checkpoints(
        a, b, **({"tokens": 128, "window": 32, "generate_tokens": 2} | options)
    )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Logits of A and of B on every window."""
    from growkit.verification.logit_figures import LogitFigures

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    add = LogitFigures.add

    def spied(self: Any, a: torch.Tensor, b: torch.Tensor, ids: Any) -> None:
        seen.append((a.clone(), b.clone()))
        add(self, a, b, ids)

    monkeypatch.setattr(LogitFigures, "add", spied)
    yield seen


def test_depth_growth_shares_every_old_layer_and_no_new_one(
    model: Any, folder: Path, tmp_path: Path, passes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown, sources = models.grow_depth(model, after=[0, 2, 2])
    b = models.save(grown, tmp_path / "b")
    models.write_plan(b, layer_sources=sources, exactness="bit-exact")
    shared = compare(folder, b)
    layers = len(model.model.layers)
    assert (shared.shared_layers, shared.layers_b) == (layers, layers + 3)
    assert f"{layers} of {layers + 3} layers computed once for both" in shared.compared
    monkeypatch.setattr(shared_layers, "_same", lambda a, b: False)
    whole = compare(folder, b)
    assert whole.shared_layers == 0 and "once for both" not in whole.compared
    # The same figures, and on every window the same logits of B to the bit, as of two whole passes.
    half = len(passes) // 2
    for (_, left), (_, right) in zip(passes[:half], passes[half:], strict=True):
        assert torch.equal(left, right)
    assert (shared.passed, whole.passed) == (True, True)
    assert (shared.logit_rms, shared.kl_mean) == (whole.logit_rms, whole.kl_mean)
    assert shared.generation == whole.generation and shared.cached == whole.cached


def test_one_bit_of_a_weight_keeps_a_layer_from_being_shared(
    model: Any, folder: Path, tmp_path: Path, passes: Any
) -> None:
    changed = models.make_model()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        weight = changed.model.layers[1].mlp.down_proj.weight
        weight[-1, -1] *= 1 + 2**-7
    report = compare(folder, models.save(changed, tmp_path / "b"))
    # Layer 0 has the same bytes and the same input; what follows layer 1 is given other numbers.
    assert report.shared_layers == 1
    assert report.max_difference > 0
    assert all(not torch.equal(a, b) for a, b in passes)


def test_a_setting_that_no_weight_shows_keeps_a_layer_from_being_shared(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    """Also one that only this layer's place in a list of the config shows."""
    pair = shared_layers.SharedLayers((model, model))
    assert len(pair._of_a) == len(model.model.layers)
    other = models.make_model()
    other.load_state_dict(model.state_dict())
    other.model.layers[0].self_attn.scaling *= 2
    assert other.model.layers[0] not in shared_layers.SharedLayers((model, other))._of_a
    listed = models.make_model()
    listed.load_state_dict(model.state_dict())
    count = len(model.model.layers)
    model.config.kinds, listed.config.kinds = ["full"] * count, ["full"] * (count - 1) + ["other"]
    try:
        kept = shared_layers.SharedLayers((model, listed))._of_a
    finally:
        del model.config.kinds
    assert listed.model.layers[-1] not in kept and listed.model.layers[0] in kept


def test_a_layer_that_looks_at_its_own_number_is_not_shared(
    model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights and settings are those of A's layer; the first window shows a difference."""
    grown, sources = models.grow_depth(model, after=[0])
    b = models.save(grown, tmp_path / "b")
    models.write_plan(b, layer_sources=sources, exactness="bit-exact")
    block = type(model.model.layers[0])
    forward = block.forward

    def by_number(self: Any, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        found = forward(self, hidden_states, *args, **given)
        number = self.self_attn.layer_idx
        return found + 0.01 * found.roll(1, -1) if number == len(model.model.layers) else found

    monkeypatch.setattr(block, "forward", by_number)
    report = compare(folder, b)
    assert report.passed is False
    assert report.shared_layers == len(model.model.layers) - 1  # all but the last


def test_a_layer_whose_input_differs_is_computed(model: Any) -> None:
    """What is recorded of other tokens is not given out."""
    pair = shared_layers.SharedLayers((model, models.make_model()))
    twin = models.make_model()
    twin.load_state_dict(model.state_dict())
    pair = shared_layers.SharedLayers((model.eval(), twin.eval()))
    one, other = torch.arange(8)[None], torch.arange(1, 9)[None]
    with torch.inference_mode():
        right = twin(input_ids=other, use_cache=False).logits
        for ids_a, ids_b in ((one, one), (one, other)):
            with pair.pass_of("a", first=True):
                model(input_ids=ids_a, use_cache=False)
            with pair.pass_of("b", first=False):
                found = twin(input_ids=ids_b, use_cache=False).logits
    assert len(pair.proven) == len(model.model.layers)
    assert torch.equal(found, right)
    assert "forward" not in vars(twin.model.layers[0])
