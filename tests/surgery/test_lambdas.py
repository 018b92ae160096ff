"""lambda and (1 - lambda_init) x gain keep their values when layers move or noise maps multiply."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
from hypothesis import given
from hypothesis import strategies as st

from growkit.families.lambda_schedule import diff_lambda_init, motif_lambda_init
from growkit.surgery.lambdas import LambdaChange, change_lambda, lambda_value

inits = st.one_of(st.floats(-0.5, 0.95), st.integers(0, 40).map(motif_lambda_init))


def vectors(seed: int, dim: int, scale: float, zero: frozenset[str]) -> list[tiny.Array]:
    rng = np.random.default_rng(seed)
    made = {n: scale * rng.standard_normal(dim) for n in ("q1", "k1", "q2", "k2")}
    return [
        np.zeros(dim, np.float32) if n in zero else v.astype(np.float32) for n, v in made.items()
    ]


@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 4, 64]),
    st.sampled_from([0.01, 0.1, 0.5]),
    st.frozensets(st.sampled_from(["q1", "k1", "q2", "k2"])),
    inits,
    inits,
    st.sampled_from([1, 2, 3, 8]),
)
def test_lambda_keeps_its_value(
    seed: int,
    dim: int,
    scale: float,
    zero: frozenset[str],
    before: float,
    after: float,
    copies: int,
) -> None:
    old = vectors(seed, dim, scale, zero)
    change = LambdaChange(before, after, copies)
    new = change_lambda(*old, change)
    assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in new)
    wanted = lambda_value(*old, before) / copies
    # The exponentials are of order one, so that is what float32 rounding is relative to.
    assert abs(lambda_value(*new, after) - wanted) < 2e-6 * max(1.0, abs(wanted))
    assert change.scale_factor * (1 - after) == pytest.approx(1 - before, rel=1e-12)
    untouched = new[2:] if wanted - after > lambda_value(*old, 0.0) else new[:2]
    kept = old[2:] if wanted - after > lambda_value(*old, 0.0) else old[:2]
    assert all(tiny.same_bits(a, b) for a, b in zip(untouched, kept, strict=True))


def test_forgetting_the_change_is_seen() -> None:
    """The negative control of the test above."""
    old = vectors(0, 4, 0.5, frozenset())
    wanted = lambda_value(*old, diff_lambda_init(1))
    assert abs(lambda_value(*old, diff_lambda_init(2)) - wanted) > 0.1


def test_a_zero_key_can_learn_afterwards() -> None:
    """With k zero there is nothing to lean on; a unit vector takes its place."""
    old = vectors(0, 4, 0.5, frozenset({"k1", "k2"}))
    q1, k1, _, _ = change_lambda(*old, LambdaChange(0.6, 0.2))
    assert np.linalg.norm(k1) == pytest.approx(1)
    assert q1 @ k1 == pytest.approx(math.log(1.4), abs=2e-6, rel=1e-6)


def attention(tensors: tiny.Tensors, layer: int) -> tuple[list[tiny.Array], str]:
    at = f"model.layers.{layer}.self_attn."
    return [tensors[at + f"lambda_{v}"] for v in ("q1", "k1", "q2", "k2")], at


@pytest.mark.parametrize(
    ("family", "placement", "kept"),
    [
        # 0-based layers after which a block goes -> places of the two old layers.
        ("motif", "0,0", [0, 3]),
        ("motif", "0,1", [0, 2]),
        ("diffllama", "0,0", [0, 3]),
        ("diffllama", "0,1", [0, 2]),
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_computed_lambda_init_moves_with_the_layer(
    tmp_path: Path, family: str, placement: str, kept: list[int], dtype: str
) -> None:
    config = getattr(tiny, f"{family}_config")()
    schedule = motif_lambda_init if family == "motif" else diff_lambda_init
    gain = "subln.weight" if family == "motif" else "o_proj.weight"
    old = tiny.make_tensors(config, dtype)
    tiny.write_folder(tmp_path / "a", config, old)
    plan = tiny.grow(tmp_path / "a", tmp_path / "b", layers="+2", layer_placement=placement)
    new = tiny.read_folder(tmp_path / "b")
    # Motif's gain is written in float32; DiffLlama has none, so o_proj carries the factor.
    exact = family == "motif" or dtype == "F32"
    rounding = 1e-6 if exact else 2.0**-8
    for before, after in enumerate(kept):
        (v, at), (w, to) = attention(old, before), attention(new, after)
        assert all(vector.dtype == np.float32 for vector in w)
        assert lambda_value(*w, schedule(after)) == pytest.approx(
            lambda_value(*v, schedule(before)), abs=2e-6, rel=1e-6
        )
        scaled_old = old[at + gain].astype(np.float64) * (1 - schedule(before))
        scaled_new = new[to + gain].astype(np.float64) * (1 - schedule(after))
        np.testing.assert_allclose(scaled_new, scaled_old, rtol=rounding)
        if before != after:  # the change is needed
            assert (w[0] != v[0]).any() or (w[2] != v[2]).any()
            assert (new[to + gain] != old[at + gain]).all()
    assert plan.exactness.value == ("exact" if family == "motif" else "rounded")
    # The inserted blocks start as the same attention, with zero output.
    for place, layer in enumerate(plan.growth.layers):
        if layer.kind == "identity":
            (v, _), (w, to) = attention(old, layer.source), attention(new, place)
            assert lambda_value(*w, schedule(place)) == pytest.approx(
                lambda_value(*v, schedule(layer.source)), abs=2e-6, rel=1e-6
            )
            assert not new[to + "o_proj.weight"].any()


def test_lambda_init_of_motif_starts_below_zero() -> None:
    assert motif_lambda_init(0) == pytest.approx(-0.0099, abs=1e-4)


def test_ours_stores_lambda_init_and_moves_nothing(tmp_path: Path) -> None:
    config = tiny.gda_config()
    old = tiny.make_tensors(config, "BF16")
    tiny.write_folder(tmp_path / "a", config, old)
    plan = tiny.grow(tmp_path / "a", tmp_path / "b", layers="+2", layer_placement="0,0")
    grown = tiny.read_config(tmp_path / "b")
    first, second = config["lambda_init"]
    assert grown["lambda_init"] == [first, first, first, second]
    assert plan.exactness.value == "bit-exact"
    new = tiny.read_folder(tmp_path / "b")
    for name in (n for n in old if "layers.1." in n):
        assert tiny.same_bits(new[name.replace("layers.1.", "layers.3.")], old[name])


@pytest.mark.parametrize(("noise", "copies"), [("x2", 2), ("x3", 3)])
@pytest.mark.parametrize("family", ["gda", "motif", "diffllama"])
def test_lambda_is_divided_below_one_to_one(
    tmp_path: Path, family: str, noise: str, copies: int
) -> None:
    config = tiny.gda_config(2, 2, 1) if family == "gda" else getattr(tiny, f"{family}_config")()
    old = tiny.make_tensors(config)
    tiny.write_folder(tmp_path / "a", config, old)
    plan = tiny.grow(tmp_path / "a", tmp_path / "b", noise_heads=noise)
    assert plan.family.name == "gda"
    new, grown = tiny.read_folder(tmp_path / "b"), tiny.read_config(tmp_path / "b")
    schedule: Any = {"motif": motif_lambda_init, "diffllama": diff_lambda_init}.get(family)
    for layer in range(2):
        init = config["lambda_init"][layer] if schedule is None else schedule(layer)
        assert grown["lambda_init"][layer] == init
        assert lambda_value(*attention(new, layer)[0], init) == pytest.approx(
            lambda_value(*attention(old, layer)[0], init) / copies, abs=2e-6, rel=1e-6
        )


def test_noise_growth_down_to_one_to_one_leaves_lambda_alone(tmp_path: Path) -> None:
    tiny.make_folder(tmp_path / "a", tiny.gda_config(4, 2))
    plan = tiny.grow(tmp_path / "a", tmp_path / "b", noise_heads="x2")
    assert all(t.lambda_change is None for t in plan.tensors)
    assert plan.exactness.value == "bit-exact"


def test_float64_vectors_are_written_in_float64(tmp_path: Path) -> None:
    """Growing a float64 checkpoint writes eight bytes a number, with float64's accuracy."""
    config = tiny.diffllama_config()
    source = tiny.make_folder(tmp_path / "a", config)
    wide = {name: value.astype(np.float64) for name, value in tiny.read_folder(source).items()}
    source = tiny.write_folder(tmp_path / "wide", config, wide)
    tiny.grow(source, tmp_path / "b", layers="+1", layer_placement="0")
    grown = tiny.read_folder(tmp_path / "b")
    base = "model.layers.{}.self_attn.lambda_{}"
    old, new = (
        [tensors[base.format(layer, v)] for v in ("q1", "k1", "q2", "k2")]
        for tensors, layer in ((wide, 1), (grown, 2))
    )
    assert all(vector.dtype == np.float64 for vector in new)
    init = [0.8 - 0.6 * np.exp(-0.3 * layer) for layer in (1, 2)]
    assert abs(lambda_value(*old, init[0]) - lambda_value(*new, init[1])) < 1e-14
