"""Sequences split over ranks against whole ones, outputs and gradients: three processes with gloo, in float64."""

from __future__ import annotations

import json

import pytest
import sequence_fakes
import torch
from ranks import start_ranks
from sequence_fakes import MODELS, REFUSED

from rodimus_lab.ops.attention import attention, softmax
from rodimus_lab.ops.attention.softmax import sdpa
from rodimus_lab.ops.backend import Backend
from rodimus_lab.ops.sequence import SequenceShard, sharded_sequence

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


@pytest.mark.parametrize(("length", "whole"), [(256, 384), (40, 79)])
def test_windows_of_parts_in_whole_blocks_reach_back_by_whole_blocks(monkeypatch, length, whole):
    """FlexAttention, which skips what is outside of a window, takes whole blocks of 128 tokens only."""
    q, k, v = (torch.randn(1, 2 * length, 2, 4, dtype=torch.float64) for _ in range(3))
    expected, _ = attention(q, k, v, window=40)
    seen = []

    def before(shard, x, tokens):
        of_whole = k if torch.equal(x, k[:, length:]) else v
        return of_whole[:, length - tokens : length]

    def run(q, *others):
        seen.append(q.shape[1])
        return sdpa(q, *others)

    monkeypatch.setattr(softmax, "tail_before", before)
    monkeypatch.setattr(softmax, "choose", lambda *_: Backend("sdpa", run))
    with sharded_sequence(SequenceShard(None, 1, 2)):
        o, _ = attention(*(x[:, length:] for x in (q, k, v)), window=40)
    torch.testing.assert_close(o, expected[:, length:])
    assert seen == [whole]
