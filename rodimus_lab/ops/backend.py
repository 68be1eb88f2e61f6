"""Choosing among the implementations of an operator.

Each operator lists its backends best first. `auto` takes the first that can run the call and is worth it there; a
backend asked for by name that cannot run raises `UserError` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from rodimus_lab.config import did_you_mean
from rodimus_lab.errors import UserError

OPERATORS: dict[str, tuple[Backend, ...]] = {}
EXAMPLES: dict[str, dict[str, Any]] = {}
_forced: dict[str, str] = {}
_watchers: list[dict[str, str]] = []


class Backend(NamedTuple):
    """`why_not(**facts)` says in a few words why the call described by `facts` cannot run here, or None if it can;
    `pays(**facts)` whether it is then faster than the backends after it."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda **facts: None
    pays: Callable[..., bool] = lambda **facts: True


def declare(operator: str, *backends: Backend, example: dict[str, Any]) -> None:
    """Enter an operator. `example` are the facts, but for the device, of a typical training call."""
    OPERATORS[operator] = backends
    EXAMPLES[operator] = example


def survey(operator: str, device: str) -> dict[str, str | None]:
    """Backend name -> why it cannot run a typical training call on a device type, None where it can; best first."""
    facts = EXAMPLES[operator] | {"device": device}
    return {backend.name: backend.why_not(**facts) for backend in OPERATORS[operator]}


def usual(operator: str, device: str) -> str:
    """The name of the backend that `auto` takes for a typical training call on a device type."""
    return _chosen(operator, "auto", EXAMPLES[operator] | {"device": device}).name


def choose(operator: str, requested: str, facts: Mapping[str, Any]) -> Backend:
    """The backend that runs this call."""
    backend = _chosen(operator, requested, facts)
    for choices in _watchers:
        choices[operator] = backend.name
    return backend


def _chosen(operator: str, requested: str, facts: Mapping[str, Any]) -> Backend:
    if requested == "auto":
        requested = _forced.get(operator, "auto")
    backends = OPERATORS[operator]
    if requested == "auto":
        return next(b for b in backends if b.why_not(**facts) is None and b.pays(**facts))
    for backend in backends:
        if backend.name == requested:
            reason = backend.why_not(**facts)
            if reason:
                raise UserError(
                    f"the {requested!r} backend of {operator} cannot run here: {reason}; use backend='auto'"
                )
            return backend
    names = [backend.name for backend in backends]
    raise UserError(f"{operator} has no backend {requested!r}{did_you_mean(requested, names)}")


def refuse_no_tokens(operator: str, length: int) -> None:
    """Raise `UserError` where the sequences have no token, of which a recurrence gives nothing."""
    if length == 0:
        raise UserError(f"{operator} was given sequences without a token; give it at least one")


@contextmanager
def use_backend(**choices: str) -> Iterator[None]:
    """Within the block, calls with backend="auto" use the named one: `with use_backend(gated_linear="naive"): ...`"""
    for operator, name in choices.items():
        if operator not in OPERATORS:
            raise UserError(f"there is no operator named {operator!r}{did_you_mean(operator, OPERATORS)}")
        if name != "auto" and name not in [backend.name for backend in OPERATORS[operator]]:
            names = [backend.name for backend in OPERATORS[operator]]
            raise UserError(f"{operator} has no backend {name!r}{did_you_mean(name, names)}")
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def watch_backends() -> Iterator[dict[str, str]]:
    """Gives operator -> backend of the calls within the block: `with watch_backends() as chosen: ...`"""
    choices: dict[str, str] = {}
    _watchers.append(choices)
    try:
        yield choices
    finally:
        _watchers[:] = [watcher for watcher in _watchers if watcher is not choices]
