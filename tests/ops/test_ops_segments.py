"""Which document each token belongs to."""

from __future__ import annotations

import torch

from rodimus_lab.ops import Segments


def test_from_mask_and_from_lengths() -> None:
    assert Segments.from_mask(torch.tensor([[0, 0, 1], [1, 1, 1]])).ids_BT.tolist() == [[-1, -1, 0], [0, 0, 0]]
    assert Segments.from_mask(torch.tensor([[False, True]])).ids_BT.tolist() == [[-1, 0]]
    assert Segments.from_lengths([2, 1, 3]).ids_BT.tolist() == [[0, 0, 1, 2, 2, 2]]


def test_padding_counts_to_document_0() -> None:
    segments = Segments(torch.tensor([[-1, 0, 1]]))
    assert segments.valid_BT.tolist() == [[False, True, True]]
    assert segments.documents_BT.tolist() == [[0, 0, 1]]


def test_positions_start_afresh_in_each_document_but_the_continued_one() -> None:
    segments = Segments(torch.tensor([[-1, -1, 0, 0, 1, 1], [0, 1, 2, 2, 2, 3], [1, 1, 1, 2, 2, 2]]))
    positions = segments.positions_BT(torch.tensor([5, 7, 9]))
    assert positions[0, 2:].tolist() == [5, 6, 0, 1]
    assert positions[1].tolist() == [7, 0, 0, 1, 2, 0]
    assert positions[2].tolist() == [0, 1, 2, 0, 1, 2]
    assert (positions >= 0).all()
