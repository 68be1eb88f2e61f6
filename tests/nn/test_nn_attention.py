"""The attention sublayer: its head sharing, its window conventions and its rotary positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rodimus_lab.config import ConfigError
from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.rotary import rotary_table, rotate

SKA = HeadSharing.of("ska", 4)


def test_sharings_by_name() -> None:
    counts = {kind: HeadSharing.of(kind, 8, 2) for kind in ("mha", "gqa", "mqa", "ska")}
    assert {kind: (h.num_key_heads, h.num_value_heads) for kind, h in counts.items()} == {
        "mha": (8, 8),
        "gqa": (2, 2),
        "mqa": (1, 1),
        "ska": (1, 8),
    }


def test_bad_sharings_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_value_heads=3 does not divide num_heads=8"):
        HeadSharing(num_heads=8, num_key_heads=4, num_value_heads=3)
    with pytest.raises(ConfigError, match="number of groups"):
        HeadSharing.of("gqa", 8)
    with pytest.raises(ConfigError, match="'skaa'; did you mean 'ska'"):
        HeadSharing.of("skaa", 8)  # type: ignore[arg-type]


def test_bad_head_widths_are_refused_before_building() -> None:
    for cost in (lambda c: c.num_params(10), lambda c: c.build(10)):
        with pytest.raises(ConfigError, match="d_model=10 is not a multiple of num_heads=4"):
            cost(AttentionConfig(heads=SKA))
    for config, d_model in ((AttentionConfig(heads=SKA), 12), (AttentionConfig(heads=SKA, head_width=5), 16)):
        with pytest.raises(ConfigError, match="even head_width"):
            config.num_params(d_model)
    assert AttentionConfig(heads=SKA, head_width=5, rotary_base=None).num_params(16) == 16 * 5 * (4 + 4 + 1 + 4)


@pytest.mark.parametrize(
    ("convention", "window", "keys"), [("keys", 2048, 2048), ("official", 2048, 1025), ("official", 5, 3)]
)
def test_window_conventions(convention: str, window: int, keys: int) -> None:
    assert AttentionConfig(heads=SKA, window=window, window_convention=convention).keys_in_window == keys  # type: ignore[arg-type]


@pytest.mark.parametrize(("convention", "seen"), [("keys", 4), ("official", 3)])
def test_a_token_sees_exactly_its_window(convention: str, seen: int) -> None:
    mixer = AttentionConfig(heads=SKA, window=4, window_convention=convention).build(16).double()  # type: ignore[arg-type]
    mixer.init_weights(Initializer(std=0.3))
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    y, _ = mixer(x)
    (gradient,) = torch.autograd.grad(y[0, 8].sum(), x)
    reached = gradient[0].abs().amax(-1) > 0
    assert reached.tolist() == [False] * (9 - seen) + [True] * seen


def test_rotation_turns_halves_by_the_position() -> None:
    width, base = 6, 100.0
    x = torch.randn(1, 3, 1, width, dtype=torch.float64)
    positions = torch.tensor([[0, 7, 123]])
    y = rotate(x, rotary_table(positions, width, base, x.dtype))
    for t, position in enumerate(positions[0].tolist()):
        for i in range(width // 2):
            angle = position * base ** (-2 * i / width)
            a, b = x[0, t, 0, i].item(), x[0, t, 0, i + width // 2].item()
            assert y[0, t, 0, i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-12)
            assert y[0, t, 0, i + width // 2].item() == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=1e-12
            )


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def at(x: Tensor, position: int) -> Tensor:
        return rotate(x, rotary_table(torch.tensor([[position]]), 8, 1e4, x.dtype))

    products = [(at(q, t) * at(k, t - 5)).sum() for t in (5, 90, 4000)]
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(products[0], products[2])
    assert at(q.bfloat16(), 3).dtype == torch.bfloat16


def test_far_positions_keep_their_angle_in_float32() -> None:
    """A product of position and frequency in float32 would be off by a thousandth of a turn at position 100,000."""
    position = torch.tensor([[99_999]])
    narrow = rotary_table(position, 64, 1e4, torch.bfloat16)
    assert narrow.dtype == torch.float32
    wide = rotary_table(position, 64, 1e4, torch.float64)
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-7)
