"""Sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growkit.core.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.operators.depth import read_placement
from growkit.surgery.request import GrowthRequest


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("x2", 4, 8),
        ("X1.5", 4, 6),
        ("x3/2", 4, 6),
        ("+3", 4, 7),
        ("9", 4, 9),
        (" 9 ", 4, 9),
        ("x1", 4, 4),
        ("4", 4, 4),
        (12, 4, 12),
    ],
)
def test_sizes(text: Any, size: int, expected: int) -> None:
    assert Amount.parse(text, "--ffn").resolve(size, "--ffn", "units") == expected


@pytest.mark.parametrize("text", ["", "x", "two", "2x", "-3", "+-3", "x1/0", "x1e3", "1.5", "+1.5"])
def test_malformed_sizes_name_the_option(text: str) -> None:
    with pytest.raises(UsageError, match=r"--ffn .*is not a size.*x2"):
        Amount.parse(text, "--ffn")


@pytest.mark.parametrize("text", ["x0", "x0.5", "x1/2"])
def test_shrinking_factors_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="smaller than x1"):
        Amount.parse(text, "--ffn")


def test_a_smaller_number_is_refused() -> None:
    with pytest.raises(UsageError, match="fewer than the 4"):
        Amount.parse("3", "--ffn").resolve(4, "--ffn", "units")


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 60))
def test_possible_numbers_are_possible(size: int, multiple: int, added: int) -> None:
    amount = Amount.parse(f"+{added}", "--ffn")
    try:
        target = amount.resolve(size, "--ffn", "units", multiple)
    except UsageError as error:
        assert (size + added) % multiple
        listed = [int(p.split()[0]) for p in error.remedy.split(": ")[1].split(", ")]
        assert listed
        for number in listed:
            assert Amount.parse(number, "--ffn").resolve(size, "--ffn", "u", multiple) > size
    else:
        assert target == size + added and target % multiple == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"signal_head": "x2"}, "Did you mean 'signal_heads'"),
        ({"symmetry": "splt"}, "Did you mean 'split'"),
        ({"depth_method": "stacked"}, "Did you mean 'stack'"),
        ({"seed": "one"}, "seed"),
        ({"seed": True}, "seed"),
        ({"untie_embeddings": 1}, "untie_embeddings"),
        ({"noise_snr_db": "loud"}, "noise_snr_db"),
    ],
)
def test_bad_recipes_say_what_is_meant(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GrowthRequest.from_mapping(values)


def test_a_recipe_reads_numbers_and_lists() -> None:
    request = GrowthRequest.from_mapping(
        {"layers": 4, "layer_placement": [0, 1], "noise_snr_db": 20, "ffn": None}
    )
    assert request.layers == "4" and request.ffn is None
    assert read_placement(request.layer_placement) == (0, 1)
    assert len(request.operators()) == 1
    assert GrowthRequest.from_mapping(request.to_dict()) == request


def test_an_empty_request_lists_the_options() -> None:
    with pytest.raises(UsageError, match="--signal-heads"):
        GrowthRequest().operators()


@pytest.mark.parametrize("snr", [float("nan"), float("inf")])
def test_noise_of_no_size_is_refused(snr: float) -> None:
    with pytest.raises(UsageError, match="decibels"):
        GrowthRequest(symmetry="noise", noise_snr_db=snr).symmetry_choice()
