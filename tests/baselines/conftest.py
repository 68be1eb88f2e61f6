"""What mixers are compared with: flash-linear-attention's references, read from its files so that no GPU is needed."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor


@pytest.fixture
def fla_reference() -> Callable[[str, str], Callable[..., Any]]:
    """`fla_reference("gla/naive.py", "naive_recurrent_gla")`: a function of one of the files under `fla/ops`."""
    package = importlib.util.find_spec("fla")
    if package is None or package.origin is None:
        pytest.skip("flash-linear-attention is not installed")
    ops = Path(package.origin).parent / "ops"

    def load(path: str, function: str) -> Callable[..., Any]:
        spec = importlib.util.spec_from_file_location("fla_reference", ops / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)

    return load


class Call(NamedTuple):
    """One call of `gated_linear`, with gates as wide as they came."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_alpha: Tensor | None
    scale: float
    o: Tensor


@pytest.fixture
def recurrence(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Call]:
    """`recurrence(module, mixer, x)`: how the mixer, whose recurrence is called in `module`, calls it."""

    def run(module: Any, mixer: Any, x_BTD: Tensor) -> Call:
        calls: list[Call] = []
        original = module.gated_linear

        def spy(
            q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor | None = None, *, scale: float = 1.0, **rest: Any
        ) -> Any:
            o, state = original(q, k, v, log_alpha, scale=scale, **rest)
            calls.append(Call(q, k, v, log_alpha, scale, o))
            return o, state

        with monkeypatch.context() as patch:
            patch.setattr(module, "gated_linear", spy)
            mixer(x_BTD)
        (call,) = calls
        return call

    return run


@pytest.fixture
def delta_recurrence(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`delta_recurrence(module, mixer, x)`: of the one call of `delta_rule` that the mixer makes in `module`, the
    arguments by name and the output `o`."""

    def run(module: Any, mixer: Any, x_BTD: Tensor) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []
        original = module.delta_rule

        def spy(*arguments: Any, **options: Any) -> Any:
            o, state = original(*arguments, **options)
            bound = inspect.signature(original).bind(*arguments, **options)
            bound.apply_defaults()
            calls.append({name.partition("_B")[0]: value for name, value in bound.arguments.items()} | {"o": o})
            return o, state

        with monkeypatch.context() as patch:
            patch.setattr(module, "delta_rule", spy)
            mixer(x_BTD)
        (call,) = calls
        return call

    return run
