"""Power laws: what is put in comes out, and bands hold the truth as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rodimus_lab.errors import UserError
from rodimus_lab.report.power_law import fit_power_law, student_t

FLOPS = [10.0**power for power in (15, 15.6, 16.3, 17, 17.5)]
EXPONENT, SCALE = 0.06, 30.0


def law(x: float) -> float:
    return SCALE * x**-EXPONENT


def test_an_exact_law_comes_back_and_has_no_band():
    fit = fit_power_law(FLOPS, [law(x) for x in FLOPS])
    assert fit.exponent == pytest.approx(EXPONENT, rel=1e-9)
    assert fit.scale == pytest.approx(SCALE, rel=1e-9)
    for x in (1e14, 1e16, 1e20):
        low, high = fit.band(x)
        assert low == pytest.approx(law(x), rel=1e-9) == pytest.approx(high, rel=1e-9)


@pytest.mark.parametrize(
    ("confidence", "freedom", "table"),
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.99, 5, 4.032),
        (0.9, 30, 1.697),
        (0.95, 1001, 1.962),
    ],
)
def test_t_is_that_of_the_tables(confidence, freedom, table):
    assert student_t(confidence, freedom) == pytest.approx(table, abs=5.1e-4)


def test_bands_hold_the_truth_as_often_as_they_say():
    """400 noisy draws: both the law beyond the points and its exponent lie inside in 95 % of them, within 3 sigma."""
    draw = np.random.default_rng(0)
    inside = np.zeros(2)
    trials, x = 400, 1e19
    for _ in range(trials):
        noisy = [law(point) * math.exp(0.01 * draw.standard_normal()) for point in FLOPS]
        fit = fit_power_law(FLOPS, noisy)
        (low, high), (least, most) = fit.band(x), fit.exponent_interval()
        inside += [low <= law(x) <= high, least <= EXPONENT <= most]
    assert np.all(np.abs(inside / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials))


def test_a_band_is_narrowest_among_the_points_and_grows_with_the_noise():
    noise = [0.01, -0.02, 0.015, 0.005, -0.01]
    widths = []
    for factor in (1, 2):
        fit = fit_power_law(FLOPS, [law(x) * math.exp(factor * e) for x, e in zip(FLOPS, noise, strict=True)])
        (l1, h1), (l2, h2) = fit.band(math.exp(fit.centre)), fit.band(1e20)
        assert h1 / l1 < h2 / l2
        widths.append(math.log(h2 / l2))
    assert widths[1] == pytest.approx(2 * widths[0])


@pytest.mark.parametrize(
    ("xs", "ys", "told"),
    [
        ([1.0, 2.0], [3.0, 2.0], "at least 3 points"),
        ([1.0, 2.0, 2.0], [3.0, 2.0, 2.1], "at least 3 points at different x; there are 2"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 0.0], "0.0 is none"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, math.nan], "nan is none"),
    ],
)
def test_what_cannot_be_fitted_is_told(xs, ys, told):
    with pytest.raises(UserError, match=told):
        fit_power_law(xs, ys)
