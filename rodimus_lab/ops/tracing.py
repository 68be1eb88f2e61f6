"""What is said to torch.compile and to autocast about a function. `torch.compiler`'s own marks load Dynamo at once,
which takes longer than most commands run; these leave that to whoever compiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.library import CustomOpDef

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Its result does not change, and is a constant in what is compiled (`torch.compiler.assume_constant_result`)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: Function) -> Function:
    """It runs as it is, between what is compiled before it and after it (`torch.compiler.disable`)."""
    return cast(Function, torch._disable_dynamo(function))


def opaque_operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """The function, whose first argument is a tensor, as the operator rodimus_lab::`name` (`torch.library.custom_op`),
    which the compiler takes as it is.

    It runs without autocast, under which sums and products would have other types than the kernels beside them take.
    """

    def declare(function: Callable[..., Any]) -> CustomOpDef:
        @wraps(function)
        def run(x: Tensor, *more: Any) -> Any:
            with torch.autocast(x.device.type, enabled=False):
                return function(x, *more)

        schema = torch.library.infer_schema(function, mutates_args=())
        return torch.library.custom_op(f"rodimus_lab::{name}", run, mutates_args=(), schema=schema)

    return declare
