"""The short convolution against an explicit loop. Shapes: B batch, T time, D channels, W kernel width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops import Segments, short_conv

D = 3


def draw(length: int, width: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((batch, length, D), (D, width), (D,), (batch, width - 1, D))
    x, weight, bias, state = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    return x, weight, bias, state


def by_hand(x_TD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, state_WD: Tensor | None) -> tuple[Tensor, Tensor]:
    """One row of tokens that follow one another."""
    width = weight_DW.shape[1]
    past = [torch.zeros(D, dtype=x_TD.dtype)] * (width - 1) if state_WD is None else list(state_WD)
    outputs = []
    for x in x_TD:
        past = [*past, x]
        y = torch.zeros(D, dtype=x.dtype) if bias_D is None else bias_D
        for back in range(width):
            y = y + weight_DW[:, width - 1 - back] * past[-1 - back]
        outputs.append(y)
    empty = x_TD[:0]
    return (torch.stack(outputs) if outputs else empty), torch.stack(
        past[len(past) - width + 1 :]
    ) if width > 1 else empty


@pytest.mark.parametrize("backend", ["conv1d", "taps"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_short_conv_is_the_loop(length: int, width: int, backend: str) -> None:
    x, weight, bias, state = draw(length, width)
    leaves = (x, weight, bias, state) if width > 1 else (x, weight, bias)
    y, last = short_conv(x, weight, bias, state_BWD=state, backend=backend)
    want_y, want_last = (
        torch.stack(parts) for parts in zip(*(by_hand(x[b], weight, bias, state[b]) for b in range(2)), strict=True)
    )
    torch.testing.assert_close((y, last), (want_y, want_last), rtol=0, atol=1e-13)
    weights = torch.randn_like(y), torch.randn_like(last)
    got = torch.autograd.grad((y * weights[0]).sum() + (last * weights[1]).sum(), leaves)
    want = torch.autograd.grad((want_y * weights[0]).sum() + (want_last * weights[1]).sum(), leaves)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["conv1d", "taps"])
def test_no_bias_and_no_state(backend: str) -> None:
    x, weight, _, _ = draw(6, 4)
    y, last = short_conv(x, weight, backend=backend)
    want_y, want_last = by_hand(x[0], weight, None, None)
    torch.testing.assert_close((y[0], last[0]), (want_y, want_last), rtol=0, atol=1e-13)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_documents_do_not_mix(width: int, with_state: bool) -> None:
    lengths = [2, 1, 5, 3]
    x, weight, bias, state = draw(sum(lengths), width, batch=1)
    first = state if with_state else None
    y, last = short_conv(x, weight, bias, state_BWD=first, segments=Segments.from_lengths(lengths))
    want, start = [], 0
    for index, length in enumerate(lengths):
        past = state[0] if with_state and index == 0 else None
        part, want_last = by_hand(x[0, start : start + length], weight, bias, past)
        want.append(part)
        start += length
    torch.testing.assert_close(y[0], torch.cat(want), rtol=0, atol=1e-13)
    torch.testing.assert_close(last[0], want_last, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tokens", [0, 1, 2, 6])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_padding_between_a_state_and_the_tokens_reads_as_nothing(width: int, tokens: int) -> None:
    x, weight, bias, state = draw(6, width)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, : 6 - tokens] = 0
    y, last = short_conv(x, weight, bias, state_BWD=state, segments=Segments.from_mask(mask))
    for row, start in ((0, 6 - tokens), (1, 0)):
        want, want_last = by_hand(x[row, start:], weight, bias, state[row])
        torch.testing.assert_close(y[row, start:], want, rtol=0, atol=1e-13)
        torch.testing.assert_close(last[row], want_last, rtol=0, atol=1e-13)


def test_padding_and_documents_in_one_row() -> None:
    x, weight, bias, state = draw(8, 4, batch=1)
    segments = Segments(torch.tensor([[-1, -1, 0, 0, 1, 2, 2, 2]]))
    y, last = short_conv(x, weight, bias, state_BWD=state, segments=segments)
    first, _ = by_hand(x[0, 2:4], weight, bias, state[0])
    second, _ = by_hand(x[0, 4:5], weight, bias, None)
    third, want_last = by_hand(x[0, 5:], weight, bias, None)
    torch.testing.assert_close(y[0, 2:], torch.cat([first, second, third]), rtol=0, atol=1e-13)
    torch.testing.assert_close(last[0], want_last, rtol=0, atol=1e-13)


def test_pieces_equal_the_whole() -> None:
    x, weight, bias, state = draw(9, 4)
    want, want_last = short_conv(x, weight, bias, state_BWD=state)
    parts = []
    for piece in (slice(0, 1), slice(1, 3), slice(3, 9)):
        y, state = short_conv(x[:, piece], weight, bias, state_BWD=state)
        parts.append(y)
    torch.testing.assert_close((torch.cat(parts, 1), state), (want, want_last), rtol=0, atol=1e-13)


def test_conv1d_refuses_packed_documents() -> None:
    x, weight, bias, _ = draw(4, 4)
    with pytest.raises(UserError, match="mix packed documents"):
        short_conv(x, weight, bias, segments=Segments(torch.zeros(2, 4, dtype=torch.long)), backend="conv1d")
