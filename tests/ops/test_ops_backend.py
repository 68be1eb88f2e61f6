"""Choosing among the implementations of an operator, shown on one made for the purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from rodimus_lab.errors import UserError
from rodimus_lab.ops import delta_rule, diagonal_scan, gated_linear, selective_scan, ssd, use_backend, wkv
from rodimus_lab.ops.backend import EXAMPLES, OPERATORS, Backend, choose, declare, survey, watch_backends


def even_only(size: int, device: str) -> str | None:
    return None if size % 2 == 0 and device == "cpu" else "it takes even sizes on a CPU"


@pytest.fixture(autouse=True)
def _halve() -> Iterator[None]:
    table = Backend("table", [0, 0, 1, 1].__getitem__, pays=lambda size, **_: size < 4)
    fast = Backend("fast", lambda size: size >> 1, even_only)
    slow = Backend("slow", lambda size: size // 2)
    declare("halve", table, fast, slow, example={"size": 8})
    yield
    del OPERATORS["halve"], EXAMPLES["halve"]


def chosen(requested: str = "auto", size: int = 8) -> str:
    return choose("halve", requested, {"size": size, "device": "cpu"}).name


def test_auto_takes_the_first_that_can_run_and_pays() -> None:
    assert chosen(size=2) == "table"
    assert chosen(size=8) == "fast"
    assert chosen(size=7) == "slow"
    assert chosen("table", size=8) == "table"


def test_a_named_backend_runs_or_says_why_not() -> None:
    assert chosen("fast") == "fast"
    assert chosen("slow") == "slow"
    with pytest.raises(UserError, match=r"'fast' backend of halve cannot run here: it takes even sizes"):
        chosen("fast", size=7)
    with pytest.raises(UserError, match=r"halve has no backend 'slew'; did you mean 'slow'\? known: fast, slow, table"):
        chosen("slew")


def test_use_backend_reaches_calls_that_leave_the_choice_open() -> None:
    with use_backend(halve="slow"):
        assert chosen() == "slow"
        assert chosen("fast") == "fast"
        with use_backend(halve="auto"):
            assert chosen() == "fast"
        assert chosen() == "slow"
    assert chosen() == "fast"


def test_use_backend_is_undone_by_an_error() -> None:
    with pytest.raises(RuntimeError), use_backend(halve="slow"):
        raise RuntimeError
    assert chosen() == "fast"


@pytest.mark.parametrize("choices", [{"halvs": "slow"}, {"halve": "slew"}])
def test_use_backend_refuses_unknown_names(choices: dict[str, str]) -> None:
    with pytest.raises(UserError, match="did you mean"), use_backend(**choices):
        pass


def test_a_survey_says_of_each_backend_whether_it_can_run() -> None:
    assert survey("halve", "cpu") == {"table": None, "fast": None, "slow": None}
    assert survey("halve", "cuda") == {"table": None, "fast": "it takes even sizes on a CPU", "slow": None}


def test_every_operator_has_a_backend_everywhere() -> None:
    for operator in OPERATORS:
        for device in ("cpu", "cuda"):
            assert None in survey(operator, device).values()


def test_watch_backends_tells_what_ran() -> None:
    with watch_backends() as outer:
        chosen(size=8)
        with watch_backends() as inner:
            assert inner == {}
            chosen(size=7)
        assert inner == {"halve": "slow"}
        chosen(size=6)
    chosen(size=7)
    assert (outer, inner) == ({"halve": "fast"}, {"halve": "slow"})


def test_sequences_without_a_token_are_refused_by_the_recurrences_name() -> None:
    x, heads = torch.zeros(2, 0, 3), torch.zeros(2, 0, 2, 3)
    calls: dict[str, Callable[..., object]] = {
        "gated_linear": lambda: gated_linear(heads, heads, heads, None),
        "delta_rule": lambda: delta_rule(heads, heads, heads, heads, heads[..., 0]),
        "diagonal_scan": lambda: diagonal_scan(x, x),
        "selective_scan": lambda: selective_scan(x, x, x.new_zeros(3, 4), x, x),
        "ssd": lambda: ssd(heads, heads[..., 0], x.new_zeros(2), x, x),
        "wkv": lambda: wkv(x, x, x.new_zeros(3), x.new_zeros(3)),
    }
    for operator, call in calls.items():
        with pytest.raises(UserError, match=f"{operator} was given sequences without a token"):
            call()
