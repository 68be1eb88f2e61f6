"""Sequences split over ranks against whole ones, outputs and gradients: three processes with gloo, in float64."""

from __future__ import annotations

import json

import pytest
import sequence_fakes
from ranks import start_ranks
from sequence_fakes import MODELS, REFUSED

RANKS = 3


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    ranks = start_ranks(RANKS, lambda rank: sequence_fakes.main(rank, RANKS, str(folder)), folder)
    assert [rank.code for rank in ranks] == [0] * RANKS, ranks
    return json.loads((folder / "found.json").read_text())


def test_every_operator_and_model_was_compared(found):
    assert set(MODELS) <= set(found["differences"])
    assert len(found["differences"]) == len(MODELS) + len(sequence_fakes.operators()) + 2


def test_the_parts_are_the_whole(found):
    """To rounding in float64, far below the 1e-5 that float32 allows; gradients of inputs and weights included."""
    wrong = {name: difference for name, difference in found["differences"].items() if not difference < 1e-9}
    assert not wrong


def test_what_is_not_split_is_refused_by_name(found):
    said = found["refusals"]
    for name in REFUSED:
        assert "does not run on sequences split over ranks" in said[name], name
    assert said["mamba"].startswith("Mamba ")
    assert "packed documents is not split over ranks" in said["packed"]
    assert "with states" in said["state"]
    assert "reaches 3 tokens back, and a rank has only 2; use fewer ranks" in said["too short"]
