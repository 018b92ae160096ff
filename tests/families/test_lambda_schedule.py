"""The published schedules, against the values in the papers' notes."""

from __future__ import annotations

import pytest

from growkit.families.lambda_schedule import (
    diff_lambda_init,
    lambda_init_schedule,
    motif_lambda_init,
)


def test_published_values():
    assert [round(diff_lambda_init(i), 4) for i in (0, 1, 2, 3, 31)] == [
        0.2,
        0.3555,
        0.4707,
        0.5561,
        0.7999,
    ]
    assert [round(motif_lambda_init(i), 4) for i in (0, 1, 2, 3)] == [-0.0099, 0.2, 0.3555, 0.4707]


def test_motif_is_one_layer_behind():
    assert lambda_init_schedule(6, "motif")[1:] == lambda_init_schedule(5, "diff")


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'cosine'.*diff, motif"):
        lambda_init_schedule(2, "cosine")
