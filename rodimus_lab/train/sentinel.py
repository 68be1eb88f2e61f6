"""Watching for values that are not finite, and naming where they came from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rodimus_lab.errors import UserError


class NonFiniteError(UserError):
    """Training met a NaN or an infinity."""


class Sentinel:
    """Remembers on the device the first step at which a watched value was not finite, so that no step has to wait."""

    def __init__(self, device: torch.device):
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, step: int | Tensor, *values: Tensor) -> Tensor:
        """1.0 (float32 scalar) from the first step on at which one of `values` is not finite, before it 0.0. `step` may
        be on the device (int64 scalar), as it must where the call is captured."""
        bad = ~torch.stack([value.float() for value in values]).isfinite().all()
        self._first_bad.copy_(torch.where((self._first_bad < 0) & bad, step, self._first_bad))
        return (self._first_bad >= 0).float()

    def first_bad_step(self) -> int | None:
        """Waits for the device."""
        step = int(self._first_bad)
        return None if step < 0 else step


def find_non_finite(model: nn.Module, backward: Callable[[], Tensor]) -> str | None:
    """Run `backward` (forward and backward of one batch, returning the loss) and name the first thing that is not
    finite: a module's output, in the order in which modules end; the loss; else a parameter's gradient."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if not found and not _finite(output):
                found.append(f"the output of {name}")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):
            loss = backward()
    finally:
        for handle in handles:
            handle.remove()
    if not found and not _finite(loss):
        found.append("the loss")
    if not found:
        found += [
            f"the gradient of {n}" for n, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)
        ]
    return found[0] if found else None


def _finite(value: object) -> bool:
    if isinstance(value, Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        return not local.is_floating_point() or bool(local.isfinite().all())
    if isinstance(value, tuple | list):
        return all(_finite(part) for part in value)
    return True
