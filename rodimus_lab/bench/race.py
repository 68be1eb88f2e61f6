"""The backends of one operator on one problem: each checked against the definition first, then timed.

A backend whose output or gradients are wrong gets no time. The check runs the backend at full size, but with an output
gradient that is zero outside a sample; only the sample is computed by the definition, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rodimus_lab.bench.measure import median_seconds, peak_bytes
from rodimus_lab.bench.result import Row
from rodimus_lab.errors import UserError
from rodimus_lab.ops.backend import OPERATORS, survey

Tensors = Mapping[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]
Part = tuple[slice, ...]
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
WHOLE: Part = ()


@dataclass(frozen=True)
class Problem:
    """One operator at one shape.

    `run(inputs, backend)` is the call; `definition(inputs)` its slow, certain twin. `sample` says which part of an
    input decides the part `sample_output` of the output (an input that is not named is needed whole). `output` is a
    meta tensor like the output, or a tuple of them if there are several. `unmeasured` names backends that are left out
    at this size and says why; `compilable` those that torch.compile may fuse.
    """

    operator: str
    case: str
    shape: Mapping[str, int | str]
    inputs: Tensors
    run: Callable[[Tensors, str], Outputs]
    definition: Callable[[Tensors], Outputs]
    output: Outputs
    sample: Mapping[str, Part] = field(default_factory=dict)
    sample_output: Part = WHOLE
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    compilable: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return _several(self.output)


def race(problem: Problem, repeats: int, bytes_per_second: float, *, compile: bool = False) -> list[Row]:
    """One row a backend: seconds of the forward pass (without gradients) and of forward and backward, their ratio to
    the memory floor, the peak of memory, and `relative_error`, the largest relative error of output and gradients.

    The floor reads each input and writes the output once; the backward pass reads both again, the output's gradient
    in place of the output, and writes each input's gradient.
    """
    expected, floors = _Expected(problem), _floors(problem, bytes_per_second)
    reasons = survey(problem.operator, problem.device.type)
    rows = []
    for name in (backend.name for backend in OPERATORS[problem.operator]):
        for compiled in [False] + [True] * (compile and name in problem.compilable):
            row = describe(problem, name + " (compiled)" * compiled)
            if reasons[name]:
                row["note"] = f"cannot run: {reasons[name]}"
            elif name in problem.unmeasured:
                row["note"] = f"left out: {problem.unmeasured[name]}"
            else:
                row |= _attempt(lambda n=name, c=compiled: _measure(problem, n, expected, repeats, floors, c))  # type: ignore[misc]
            rows.append(row)
    return rows


def run_alone(problem: Problem, name: str, repeats: int, bytes_per_second: float) -> Row:
    """The row of a peer: an operator of its own, held to its own definition."""
    floors = _floors(problem, bytes_per_second)
    return describe(problem, name) | _attempt(
        lambda: _measure(problem, name, _Expected(problem), repeats, floors, compiled=False)
    )


def describe(problem: Problem, name: str) -> Row:
    return {
        "operator": problem.operator,
        "case": problem.case,
        "shape": dict(problem.shape),
        "backend": name,
        "dtype": str(next(iter(problem.inputs.values())).dtype).removeprefix("torch."),
    }


def _floors(problem: Problem, bytes_per_second: float) -> tuple[float, float]:
    """Seconds that the bytes of the forward pass, and of forward and backward, take to move."""
    read = sum(x.numel() * x.element_size() for x in problem.inputs.values())
    written = sum(x.numel() * x.element_size() for x in problem.outputs)
    return (read + written) / bytes_per_second, (3 * read + 2 * written) / bytes_per_second


def _attempt(measure: Callable[[], Row]) -> Row:
    """What was measured, or a note: a kernel that breaks, in whatever way, must not cost the others their rows."""
    try:
        return measure()
    except UserError as error:
        return {"note": f"cannot run: {error}"}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"note": "out of memory"}
    except Exception as error:
        return {"note": f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def _measure(
    problem: Problem, backend: str, expected: _Expected, repeats: int, floors: tuple[float, float], compiled: bool
) -> Row:
    def call(inputs: Tensors) -> Outputs:
        return problem.run(inputs, backend)

    run = torch.compile(call, dynamic=False) if compiled else call
    error, where = expected.error(run)
    if not error <= expected.tolerance:  # NaN is no pass.
        return {
            "relative_error": error if math.isfinite(error) else None,
            "note": f"wrong at {problem.case}: {where} is off by {error:.1e}; it gets no time",
        }
    leaves = {name: x.detach().requires_grad_() for name, x in problem.inputs.items()}
    cotangents = [torch.ones_like(output, device=problem.device) for output in problem.outputs]

    def forward() -> None:
        with torch.no_grad():
            run(problem.inputs)

    def both() -> None:
        torch.autograd.grad(_several(run(leaves)), list(leaves.values()), cotangents)

    times = [median_seconds(each, problem.device, repeats, head_start=True) for each in (forward, both)]
    return {
        "relative_error": error,
        "forward_seconds": times[0],
        "both_seconds": times[1],
        "forward_over_floor": times[0] / floors[0],
        "both_over_floor": times[1] / floors[1],
        "forward_peak_bytes": peak_bytes(forward, problem.device),
        "peak_bytes": peak_bytes(both, problem.device),
    }


class _Expected:
    """Output and gradients of the sample by the definition."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.tolerance = TOLERANCE[next(iter(problem.inputs.values())).dtype]
        self._parts = [problem.sample.get(name, WHOLE) for name in problem.inputs]
        shapes = [output[problem.sample_output].shape for output in problem.outputs]
        self._drawn = [torch.randn(shape, device=problem.device) for shape in shapes]
        self._values = _outputs_and_gradients(
            problem.definition,
            {name: problem.inputs[name][part].double() for name, part in zip(problem.inputs, self._parts, strict=True)},
            self._drawn,
        )

    def error(self, run: Callable[[Tensors], Outputs]) -> tuple[float, str]:
        """The largest relative error, |a - b| / |b| over all elements, and what it is of."""
        problem = self.problem
        cotangents = [torch.zeros_like(output, device=problem.device) for output in problem.outputs]
        for cotangent, drawn in zip(cotangents, self._drawn, strict=True):
            cotangent[problem.sample_output] = drawn.to(cotangent.dtype)
        values = _outputs_and_gradients(run, problem.inputs, cotangents)
        parts = [problem.sample_output] * len(cotangents) + self._parts
        names = ["the output"] * len(cotangents) + [f"the gradient of {name}" for name in problem.inputs]
        return max(
            (_relative_error(value[part], expected), name)
            for value, part, expected, name in zip(values, parts, self._values, names, strict=True)
        )


def _several(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _outputs_and_gradients(
    run: Callable[[Tensors], Outputs], inputs: Tensors, cotangents: list[Tensor]
) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = _several(run(leaves))
    cotangents = [cotangent.to(output.dtype) for cotangent, output in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return [*(output.detach() for output in outputs), *gradients]


def _relative_error(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        return math.inf
    error = ((value.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()
    return math.inf if math.isnan(error) else error
