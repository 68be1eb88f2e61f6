"""pass@k by the unbiased estimator, over programs that ran in the sandbox, in the form of the `code_eval` metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import comb
from statistics import fmean
from typing import Any

from evals.execution.sandbox import DEFAULT, Limits, Verdict, best_isolation, run_programs

METRIC = "code_eval"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The probability that among k of the samples, drawn without replacement, one passes (Chen et al., 2021, Eq. 1).

    Raises `ValueError` where there are fewer than k samples or more passed than there are.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be had of {samples} samples of which {passed} passed")
    return 1 - comb(samples - passed, k) / comb(samples, k)


class CodeEval:
    """Stands where lm-eval's tasks expect `evaluate.load("code_eval")`, whose own does not confine what it runs."""

    def __init__(self, limits: Limits = DEFAULT):
        self.limits, self.isolation = limits, best_isolation()

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        **_: Any,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """`pass@k` of each k that the samples allow, the mean over problems; and the verdicts of each problem.

        `references` are the tests, a text a problem; `predictions` the samples of each. A sample passes where it and
        then the tests run to their end.
        """
        programs = [
            f"{sample}\n{tests}" for tests, samples in zip(references, predictions, strict=True) for sample in samples
        ]
        verdicts = iter(run_programs(programs, self.limits, self.isolation))
        found = [[next(verdicts) for _ in samples] for samples in predictions]
        fewest = min(map(len, found), default=0)
        scores = {
            f"pass@{count}": fmean(pass_at_k(len(each), sum(v.passed for v in each), count) for each in found)
            for count in k
            if count <= fewest
        }
        return scores, {number: list(_told(each)) for number, each in enumerate(found)}


def _told(verdicts: Sequence[Verdict]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, verdict in enumerate(verdicts):
        yield number, {"passed": verdict.passed, "result": verdict.reason or "passed"}


@contextmanager
def confined(metric: CodeEval) -> Iterator[None]:
    """Within, `evaluate.load("code_eval")` gives `metric`. Tasks load theirs when they are read."""
    import evaluate

    original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return metric if path == METRIC else original(path, *arguments, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original
