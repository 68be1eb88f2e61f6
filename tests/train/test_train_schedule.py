import math

import pytest

from rodimus_lab.recipe import ScheduleConfig
from rodimus_lab.train.schedule import learning_rate

PEAK, STEPS = 5e-4, 25_000


def rate(step, **settings):
    return learning_rate(ScheduleConfig(**settings), PEAK, step, STEPS)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_last_step_is_exactly_the_minimum(kind):
    assert rate(STEPS, kind=kind) == 1e-5


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_warm_up_rises_linearly_to_the_peak(kind):
    assert rate(1, kind=kind) == pytest.approx(PEAK / 2000)
    assert rate(500, kind=kind) == pytest.approx(PEAK / 4)
    assert rate(2000, kind=kind) == PEAK


def test_half_way():
    middle = 2000 + (STEPS - 2000) // 2
    assert rate(middle) == pytest.approx((PEAK + 1e-5) / 2)
    assert rate(middle, kind="linear") == pytest.approx((PEAK + 1e-5) / 2)
    quarter = 2000 + (STEPS - 2000) // 4
    assert rate(quarter) == pytest.approx(1e-5 + (PEAK - 1e-5) * (1 + math.sqrt(0.5)) / 2)


def test_inverse_square_root():
    assert rate(8000, kind="inverse_sqrt") == pytest.approx(PEAK / 2)
    assert rate(8000, kind="inverse_sqrt", min_lr=4e-4) == 4e-4
    assert rate(4, kind="inverse_sqrt", warmup_steps=0) == PEAK / 2


def test_constant_keeps_the_peak():
    assert rate(STEPS, kind="constant", warmup_steps=0) == PEAK


@pytest.mark.parametrize("kind", ["cosine", "linear", "inverse_sqrt"])
def test_never_rises_after_the_warm_up(kind):
    rates = [rate(step, kind=kind) for step in range(2000, STEPS + 1, 100)]
    assert rates == sorted(rates, reverse=True)
