"""What is said to torch.compile about a function. `torch.compiler`'s own marks load Dynamo at once, which takes longer
than most commands run; these leave that to whoever compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Its result does not change, and is a constant in what is compiled (`torch.compiler.assume_constant_result`)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: Function) -> Function:
    """It runs as it is, between what is compiled before it and after it (`torch.compiler.disable`)."""
    return cast(Function, torch._disable_dynamo(function))
