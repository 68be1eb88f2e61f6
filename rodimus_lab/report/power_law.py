"""Power laws through a few points, and how far they can be trusted.

    y = scale * x^-exponent

fitted by least squares of ln y on ln x. With so few points as a scaling law has (four to six) a third parameter, the
loss that no model gets below, would not be determined, so there is none; within two decades the straight line holds.
Bands are those of ordinary regression: normal errors of one variance in ln y, Student's t with n - 2 degrees of
freedom (Draper & Smith, Applied Regression Analysis, 1.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rodimus_lab.errors import UserError

LEAST_POINTS = 3


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law. `residual` is the standard deviation of ln y about it, `spread` the sum of squared deviations of
    ln x from their mean `centre`, `count` the number of points."""

    exponent: float
    scale: float
    residual: float
    centre: float
    spread: float
    count: int

    def __call__(self, x: float) -> float:
        return self.scale * x**-self.exponent

    def band(self, x: float, confidence: float = 0.95) -> tuple[float, float]:
        """Where the law itself (not a further point) lies at `x`, with that confidence."""
        error = self.residual * math.sqrt(1 / self.count + (math.log(x) - self.centre) ** 2 / self.spread)
        factor = math.exp(student_t(confidence, self.count - 2) * error)
        return self(x) / factor, self(x) * factor

    def exponent_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        half = student_t(confidence, self.count - 2) * self.residual / math.sqrt(self.spread)
        return self.exponent - half, self.exponent + half


def fit_power_law(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw:
    """The law through points of positive coordinates.

    Raises `UserError` for fewer than three points, for two or fewer different x, and for a coordinate that is not
    positive and finite.
    """
    if len(xs) != len(ys):
        raise ValueError(f"{len(xs)} x for {len(ys)} y")
    if len(set(xs)) < LEAST_POINTS:
        raise UserError(f"a power law needs at least {LEAST_POINTS} points at different x; there are {len(set(xs))}")
    for value in (*xs, *ys):
        if not (math.isfinite(value) and value > 0):
            raise UserError(
                f"a power law goes through positive numbers only, and {value} is none; leave that point out"
            )
    x, y = np.log(np.asarray(xs, dtype=np.float64)), np.log(np.asarray(ys, dtype=np.float64))
    centre = float(x.mean())
    spread = float(((x - centre) ** 2).sum())
    slope = float(((x - centre) * (y - y.mean())).sum()) / spread
    left = y - y.mean() - slope * (x - centre)
    residual = math.sqrt(float((left**2).sum()) / (len(x) - 2))
    scale = math.exp(float(y.mean()) - slope * centre)
    return PowerLaw(-slope, scale, residual, centre, spread, len(x))


def student_t(confidence: float, freedom: int) -> float:
    """The t that |T| stays below with probability `confidence`, T of Student's distribution with an integer number of
    degrees of freedom; by the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    if not 0 < confidence < 1 or freedom < 1:
        raise ValueError(f"there is no t for confidence {confidence} and {freedom} degrees of freedom")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < confidence else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _inside(angle: float, freedom: int) -> float:
    """P(|T| < t) with t = tan(angle) * sqrt(freedom)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = (cosine if odd else 1.0) if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
