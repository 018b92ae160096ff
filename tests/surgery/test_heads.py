"""Query heads, key/value heads and both: against numpy, through transformers, and refusals."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shrink import shrink

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest
from growkit.verification import VerificationReport, verify_checkpoints

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "head_dim": 8}
BIASED = {"attention_bias": True, "mlp_bias": True}
GQA = tiny.llama_config(4, 2, **SIZES)
MHA = tiny.llama_config(4, 4, **SIZES, **BIASED)
MQA = tiny.llama_config(4, 1, **SIZES)
GDA = tiny.gda_config(4, 2, 1, **SIZES)

# config, request, written query heads as old ones, written kv heads as old ones (-1: new).
CASES: dict[str, tuple[tiny.Config, dict[str, Any], list[int], list[int]]] = {
    "query-gqa": (GQA, {"query_heads": "x2"}, [0, 0, 1, 1, 2, 2, 3, 3], [0, 1]),
    "query-mha-bias": (MHA, {"query_heads": "8"}, [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3]),
    "query-mqa": (MQA, {"query_heads": "+4"}, [0, 0, 1, 1, 2, 2, 3, 3], [0]),
    "query-zero": (
        GQA,
        {"query_heads": "+4", "new_heads": "zero"},
        [0, 1, -1, -1, 2, 3, -1, -1],
        [0, 1],
    ),
    "kv-gqa": (GQA, {"kv_heads": "x2"}, [0, 1, 2, 3], [0, 0, 1, 1]),
    "kv-mqa": (MQA, {"kv_heads": "2"}, [0, 1, 2, 3], [0, 0]),
    "heads-gqa": (GQA, {"heads": "x2"}, [0, 1, 0, 1, 2, 3, 2, 3], [0, 0, 1, 1]),
    "heads-mha-bias": (MHA, {"heads": "x2"}, [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3]),
    "heads-mqa": (MQA, {"heads": "x2"}, [0, 1, 2, 3, 0, 1, 2, 3], [0, 0]),
    "heads-zero": (
        GQA,
        {"heads": "+4", "new_heads": "zero"},
        [0, 1, 2, 3, -1, -1, -1, -1],
        [0, 1, -1, -1],
    ),
    "query-then-kv": (
        MQA,
        {"query_heads": "x2", "kv_heads": "x4"},
        [0, 0, 1, 1, 2, 2, 3, 3],
        [0, 0, 0, 0],
    ),
}
COMPOSED = {"ffn": "x1.5", "layers": "+1", "hidden": "x2"}


def verified(a: Path, b: Path) -> VerificationReport:
    return verify_checkpoints(a, b, tokens=64, window=32, generate_tokens=4)


def heads_of(tensor: tiny.Array) -> tiny.Array:
    """Rows as [heads, ...]."""
    return tensor.reshape(-1, SIZES["head_dim"], *tensor.shape[1:])


def check_copies(new: tiny.Array, old: tiny.Array, of: list[int]) -> None:
    """A producer: every written head equals the head that it is made of."""
    for head, source in enumerate(of):
        if source >= 0:
            assert tiny.same_bits(new[head], old[source])
        else:
            assert new[head].any() or new.ndim == 2  # biases of new heads start at zero


@pytest.mark.parametrize(("dtype", "shards"), [("F32", 1), ("BF16", 2)])
@pytest.mark.parametrize("case", CASES)
def test_every_head_is_made_of_the_right_one(
    tmp_path: Path, case: str, dtype: str, shards: int
) -> None:
    config, request, query_of, kv_of = CASES[case]
    old = tiny.make_tensors(config, dtype)
    tiny.write_folder(tmp_path / "a", config, old, shards=shards)
    plan = tiny.grow(tmp_path / "a", tmp_path / "b", **request)
    new = tiny.read_folder(tmp_path / "b")
    written = tiny.read_config(tmp_path / "b")
    assert written["num_attention_heads"] == len(query_of)
    assert written["num_key_value_heads"] == len(kv_of)
    touched = set()
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn."
        for part, of in (("q", query_of), ("k", kv_of), ("v", kv_of)):
            for kind in ("weight", "bias"):
                name = f"{at}{part}_proj.{kind}"
                if name in old:
                    check_copies(heads_of(new[name]), heads_of(old[name]), of)
                    touched.add(name)
        name = at + "o_proj.weight"
        columns = heads_of(new[name].T).astype(np.float64)
        summed = np.zeros(heads_of(old[name].T).shape)
        for head, source in enumerate(query_of):
            if source >= 0:
                summed[source] += columns[head]
            else:
                assert not columns[head].any()
        assert (summed == heads_of(old[name].T)).all()
        touched.add(name)
    for name in old.keys() - touched:
        assert tiny.same_bits(new[name], old[name]), name
    back = shrink(plan, new)
    assert all((back[name] == old[name]).all() for name in old)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_heads_keep_the_function(tmp_path: Path, case: str, composed: bool) -> None:
    config, request, *_ = CASES[case]
    source = tiny.make_folder(tmp_path / "a", config)
    plan = tiny.grow(source, tmp_path / "b", **request, **(COMPOSED if composed else {}))
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 1e-4, report.cause
    bit_exact = "zero" in case or case.startswith("kv")
    assert plan.growth.steps[0].exactness.value == ("bit-exact" if bit_exact else "exact")
    if bit_exact and not composed:
        assert report.max_difference < 5e-6  # matrix products of another shape


@pytest.mark.parametrize(
    ("config", "request_"),
    [
        (GDA, {"kv_heads": "x2"}),
        (tiny.gda_config(4, 2, 1, own=False, **SIZES), {"kv_heads": "2"}),
        (GDA, {"signal_heads": "x2", "noise_heads": "x2", "kv_heads": "x4", "layers": "+1"}),
        (tiny.diffllama_config(8, 2, **SIZES), {"kv_heads": "x2", "hidden": "x2"}),
    ],
)
def test_pairs_of_differential_attention_grow_as_units(
    tmp_path: Path, config: tiny.Config, request_: dict[str, str]
) -> None:
    source = tiny.make_folder(tmp_path / "a", config)
    tiny.grow(source, tmp_path / "b", **request_)
    old, new = tiny.read_config(source), tiny.read_config(tmp_path / "b")
    factor = int(new["num_key_value_heads"] / old["num_key_value_heads"])
    assert factor in (2, 4)
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 1e-4, report.cause


@pytest.mark.parametrize("case", ["query-gqa", "kv-gqa", "heads-gqa"])
def test_tiled_heads_are_caught_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """The negative control: refused on paper; and with that check off, on the written files."""
    config, request, *_ = CASES[case]
    source = tiny.make_folder(tmp_path / "a", config)

    def tile(size: int, new: int, groups: int = 1) -> AxisMap:
        # --heads: only the key/value heads are tiled, so that copies meet other ones.
        return AxisMap.tile(size, new // size)

    if case == "heads-gqa":
        monkeypatch.setattr(
            "growkit.surgery.operators.heads._members",
            lambda groups, width: np.tile(np.arange(4), 2),
        )
    else:
        monkeypatch.setattr(AxisMap, "grouped", staticmethod(tile))
        monkeypatch.setattr(AxisMap, "spread", staticmethod(tile))
    with pytest.raises(Exception, match="would move query heads to other kv heads"):
        tiny.grow(source, tmp_path / "b", **request)
    monkeypatch.setattr("growkit.surgery.compose.check_links", lambda *arguments: None)
    tiny.grow(source, tmp_path / "b", **request)
    report = verified(source, tmp_path / "b")
    assert not report.passed and report.max_difference > 10 * report.tolerance


def planned(config: tiny.Config, tmp_path: Path, **request: Any) -> None:
    with open_checkpoint(tiny.make_folder(tmp_path / "a", config)) as checkpoint:
        build_plan(checkpoint, GrowthRequest(**request).operators())


REFUSED: dict[str, tuple[tiny.Config, dict[str, Any], str, str]] = {
    "query heads between groups": (GQA, {"query_heads": "+1"}, "multiple of 2", "6"),
    "half a group": (GQA, {"heads": "+1"}, "multiple of 2", "6"),
    "kv does not divide": (GQA, {"kv_heads": "x3"}, "divide 4 query heads", "Possible: 4."),
    "kv cannot grow": (MHA, {"kv_heads": "x2"}, "divide 4 query heads", "in the same command"),
    "pairs": (GDA, {"kv_heads": "x3"}, "4 signal heads and 2 noise heads", "Possible: 2."),
    "no query heads": (GDA, {"query_heads": "x2"}, "no query heads", "--signal-heads"),
    "no query heads for both": (GDA, {"heads": "x2"}, "no query heads", "--uniform-heads"),
    "head_dim": (GQA, {"head_dim": "x2"}, "rotary position encoding", "--query-heads"),
    "head_dim, differential": (GDA, {"head_dim": "16"}, "norm of each", "--signal-heads"),
    "hidden % heads": (
        tiny.llama_config(4, 2, hidden_size=24, intermediate_size=24, head_dim=8),
        {"query_heads": "16"},
        "refuses hidden_size 24 with num_attention_heads 16",
        "Query heads that fit: 6, 8, 12, 24, or with --hidden 32, 48, 64, 80.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_what_is_possible(tmp_path: Path, case: str) -> None:
    config, request, cause, remedy = REFUSED[case]
    with pytest.raises(UsageError) as refusal:
        planned(config, tmp_path, **request)
    assert cause in refusal.value.cause
    assert remedy in refusal.value.remedy


def test_the_remedy_for_refused_heads_works(tmp_path: Path) -> None:
    config = tiny.llama_config(4, 2, hidden_size=24, intermediate_size=24, head_dim=8)
    source = tiny.make_folder(tmp_path / "a", config)
    for name, request in (("12", {}), ("16", {"hidden": "48"})):
        tiny.grow(source, tmp_path / name, query_heads=name, **request)
        assert verified(source, tmp_path / name).passed


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(st.data())
def test_any_combination_shrinks_to_the_source(data: st.DataObject) -> None:
    """Also with other axes; the plan itself proves that every copy meets its own keys."""
    kv = data.draw(st.sampled_from([1, 2, 4]))
    config = tiny.llama_config(4, kv, attention_bias=data.draw(st.booleans()))
    choices = {
        "heads": ["x2", f"+{4 // kv}"],
        "query_heads": ["x2", "x3"],
        "kv_heads": ["x2"],
        "new_heads": ["copy", "zero"],
        "ffn": ["+5"],
        "hidden": ["x3"],
        "layers": ["+1"],
    }
    request = {
        name: data.draw(st.sampled_from(values))
        for name, values in choices.items()
        if data.draw(st.booleans())
    }
    request.setdefault("heads", "x2")
    dtype = data.draw(st.sampled_from(["BF16", "F16", "F32"]))
    with tempfile.TemporaryDirectory() as folder:
        tensors = tiny.make_tensors(config, dtype)
        source = tiny.write_folder(Path(folder) / "a", config, tensors)
        try:
            plan = tiny.grow(source, Path(folder) / "b", **request)
        except UsageError as refusal:
            assert "divide" in refusal.cause  # hidden % heads, or key/value heads
            return
        back = shrink(plan, tiny.read_folder(Path(folder) / "b"))
    assert all((back[name] == tensors[name]).all() for name in tensors)
