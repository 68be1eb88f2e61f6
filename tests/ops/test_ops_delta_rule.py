"""The delta rule with decay: the definition against loops written here, every backend against the definition.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops import Segments, delta_rule

LENGTHS = (1, 7, 63, 64, 65, 257)
FORMS = ("gated", "keywise", "general")
K, V = 5, 6
Arguments = dict[str, Tensor]


def segments_for(kind: str, length: int) -> Segments | None:
    """Ids of two rows; `both` pads and packs."""
    if kind == "none":
        return None
    index = torch.arange(length)
    padding = torch.tensor([min(3, length - 1), 0]) if kind in ("padded", "both") else torch.tensor([0, 0])
    cuts = [length // 3, length // 3 + 1, 2 * length // 3] if kind in ("packed", "both") else []
    ids = sum((index >= cut).long() for cut in cuts if cut > 3) + torch.zeros(2, length, dtype=torch.long)
    ids[1] = ids[1].clamp(max=1)
    return Segments(ids.masked_fill(index < padding[:, None], -1))


def inputs(length: int, form: str, *, heads: int = 2, decay: float = 1.0, state: bool = True) -> Arguments:
    """In float64. `gated` and `keywise` are the delta rule with one gate a head or one a key channel, beta up to 2;
    `general` has an a and a b of its own."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, dtype=torch.float64)

    def unit() -> Tensor:
        return F.normalize(normal(length, heads, K), dim=-1)

    arguments = {
        "q_BTHK": normal(length, heads, K),
        "k_BTHK": unit(),
        "v_BTHV": normal(length, heads, V),
        "log_alpha_BTHK": -decay * torch.rand(2, length, heads, 1 if form == "gated" else K, dtype=torch.float64),
    }
    if form == "general":
        removed = unit()
        arguments["a_BTHK"] = torch.rand(2, length, heads, K, dtype=torch.float64) * removed
        arguments["b_BTHK"] = -removed
    else:
        arguments["beta_BTH"] = 2 * torch.rand(2, length, heads, dtype=torch.float64)
    return arguments | ({"state_BHKV": normal(heads, K, V)} if state else {})


def outputs_and_gradients(
    arguments: Arguments, segments: Segments | None, backend: str, dtype: torch.dtype
) -> Arguments:
    """o, the final state and the gradient of each input of a fixed random function of both."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in arguments.items()}
    o, state = delta_rule(**leaves, scale=0.7, segments=segments, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in (o, state)]
    ((o * weights[0]).sum() + (state * weights[1]).sum()).backward()
    gradients = {f"d_{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    assert len(gradients) == len(leaves)
    return {"o": o.detach(), "state": state.detach()} | gradients


def assert_agree(got: Arguments, want: Arguments, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        error = (got[name].double() - x.double()).abs().max().item() / max(1.0, x.abs().max().item())
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def by_hand(arguments: Arguments, segments: Segments | None, scale: float) -> tuple[Tensor, Tensor]:
    """The two formulas as they are written, with whole K x K transitions."""
    q, k, v, log_alpha = (arguments[name] for name in ("q_BTHK", "k_BTHK", "v_BTHV", "log_alpha_BTHK"))
    batch, length, heads, _ = q.shape
    o = torch.zeros_like(v)
    last = torch.zeros(batch, heads, K, V, dtype=q.dtype)
    for row in range(batch):
        for h in range(heads):
            S = arguments["state_BHKV"][row, h] if "state_BHKV" in arguments else last[row, h].clone()
            document = 0
            for t in range(length):
                here = 0 if segments is None else int(segments.ids_BT[row, t])
                if here < 0:
                    continue
                if here != document:
                    S, document = torch.zeros_like(S), here
                at = (row, t, h)
                decay = torch.diag(log_alpha[at].exp().expand(K))
                if "beta_BTH" in arguments:
                    beta = arguments["beta_BTH"][at]
                    transition = (torch.eye(K, dtype=q.dtype) - beta * torch.outer(k[at], k[at])) @ decay
                    S = transition @ S + beta * torch.outer(k[at], v[at])
                else:
                    transition = decay + torch.outer(arguments["a_BTHK"][at], arguments["b_BTHK"][at])
                    S = transition @ S + torch.outer(k[at], v[at])
                o[at] = scale * (q[at] @ S)
            last[row, h] = S
    return o, last


@pytest.mark.parametrize("kind", ["none", "padded", "packed", "both"])
@pytest.mark.parametrize("form", FORMS)
def test_naive_is_the_definition(form: str, kind: str) -> None:
    arguments, segments = inputs(11, form), segments_for(kind, 11)
    got = delta_rule(**arguments, scale=0.3, segments=segments, backend="naive")
    torch.testing.assert_close(got, by_hand(arguments, segments, 0.3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_naive(length: int, form: str, kind: str) -> None:
    arguments, segments = inputs(length, form), segments_for(kind, length)
    want = outputs_and_gradients(arguments, segments, "naive", torch.float64)
    assert_agree(outputs_and_gradients(arguments, segments, "chunked", torch.float64), want, 1e-10)
    assert_agree(outputs_and_gradients(arguments, segments, "chunked", torch.float32), want, 1e-4)


@pytest.mark.parametrize(("form", "kind"), [("keywise", "padded"), ("gated", "packed"), ("general", "packed")])
def test_chunked_equals_naive_from_an_empty_state(form: str, kind: str) -> None:
    arguments, segments = inputs(130, form, state=False, decay=0.01), segments_for(kind, 130)
    want = outputs_and_gradients(arguments, segments, "naive", torch.float64)
    assert_agree(outputs_and_gradients(arguments, segments, "chunked", torch.float64), want, 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    arguments, segments = inputs(11, form, heads=1), segments_for("both", 11)
    leaves = {name: x.requires_grad_() for name, x in arguments.items()}

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule(**dict(zip(leaves, tensors, strict=True)), segments=segments, backend="chunked")

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


DECAYS = {
    "-200 over a chunk": lambda shape: torch.full(shape, -200 / 64),
    "-20 a step": lambda shape: torch.full(shape, -20.0),
    "-20 on average": lambda shape: -40 * torch.rand(shape),
    "mostly mild": lambda shape: -20 * torch.rand(shape) ** 8,
}


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DECAYS)
def test_strong_decay(name: str, form: str, kind: str) -> None:
    arguments, segments = inputs(130, form), segments_for(kind, 130)
    arguments["log_alpha_BTHK"] = DECAYS[name](arguments["log_alpha_BTHK"].shape).double()
    want = outputs_and_gradients(arguments, segments, "naive", torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        got = outputs_and_gradients(arguments, segments, "chunked", dtype)
        assert all(x.isfinite().all() for x in got.values())
        assert_agree(got, want, tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("huge", [-50.0, -1e4, -1e30, -math.inf])
def test_a_huge_decay_leaves_the_mild_ones_after_it_precise(huge: float, form: str) -> None:
    """Differences of cumulated gates would lose the mild decays to the huge one's rounding."""
    arguments = inputs(130, form, decay=0.01)
    arguments["log_alpha_BTHK"][:, [3, 20, 70]] = huge
    want = outputs_and_gradients(arguments, None, "naive", torch.float64)
    assert_agree(outputs_and_gradients(arguments, None, "chunked", torch.float32), want, 2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_rounded_at_the_door_only(form: str) -> None:
    """Inside, and under autocast too, everything is float32."""
    arguments = inputs(257, form, decay=0.1)
    narrow = {name: arguments[name].bfloat16() for name in ("q_BTHK", "k_BTHK", "v_BTHV")}
    want_o, want_state = delta_rule(**(arguments | {n: x.double() for n, x in narrow.items()}), backend="naive")
    float32 = {name: x.float() for name, x in arguments.items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, state = delta_rule(**(float32 | narrow), backend="chunked")
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (o - want_o).norm() / want_o.norm() <= 3e-3
    assert (state - want_state).norm() / want_state.norm() <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_padding_may_hold_anything(form: str) -> None:
    arguments, segments = inputs(20, form), segments_for("padded", 20)
    assert segments is not None
    want = delta_rule(**arguments, segments=segments)
    spoilt = {
        name: x if name == "state_BHKV" else x.masked_fill(~segments.valid_BT[(..., *[None] * (x.ndim - 2))], value)
        for (name, x), value in zip(arguments.items(), (1e9, math.nan, math.inf, -1e9, *[math.nan] * 3), strict=False)
    }
    for backend in ("chunked", "naive"):
        got = delta_rule(**spoilt, segments=segments, backend=backend)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_pieces_equal_the_whole(form: str) -> None:
    arguments = inputs(70, form)
    want = delta_rule(**arguments)
    state, parts = arguments.pop("state_BHKV"), []
    for piece in (slice(0, 33), slice(33, 34), slice(34, 35), slice(35, 70)):
        o, state = delta_rule(**{name: x[:, piece] for name, x in arguments.items()}, state_BHKV=state)
        parts.append(o)
    torch.testing.assert_close((torch.cat(parts, 1), state), want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ids", [None, (0, 0), (0, 2), (-1, 1)])
def test_one_step_equals_the_definition(ids: tuple[int, int] | None, form: str) -> None:
    """A row that goes on, one that starts a document, one that is padding."""
    segments = None if ids is None else Segments(torch.tensor(ids).unsqueeze(1))
    arguments = inputs(1, form)
    want = outputs_and_gradients(arguments, segments, "naive", torch.float64)
    assert_agree(outputs_and_gradients(arguments, segments, "step", torch.float64), want, 1e-12)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("form", ["keywise", "general"])
def test_what_is_compiled_around_it_has_its_gradients(form: str) -> None:
    """At a length that is no whole number of chunks, where the compiler must not come in."""
    arguments = inputs(70, form, heads=1)
    leaves = {name: x.requires_grad_() for name, x in arguments.items()}

    def run(*tensors: Tensor) -> Tensor:
        return delta_rule(**dict(zip(leaves, tensors, strict=True)))[0].tanh()

    want, got = run(*leaves.values()), torch.compile(run)(*leaves.values())
    weight = torch.randn_like(want)
    gradients = [torch.autograd.grad((o * weight).sum(), list(leaves.values())) for o in (want, got)]
    torch._dynamo.reset()
    torch.testing.assert_close((got, *gradients[1]), (want, *gradients[0]), rtol=1e-9, atol=1e-9)


def test_an_expanded_gate_is_one_gate() -> None:
    arguments = inputs(70, "gated")
    want = delta_rule(**arguments)
    arguments["log_alpha_BTHK"] = arguments["log_alpha_BTHK"].expand(-1, -1, -1, K)
    torch.testing.assert_close(delta_rule(**arguments), want, rtol=0, atol=0)
    arguments["log_alpha_BTHK"] = arguments["log_alpha_BTHK"].contiguous()
    torch.testing.assert_close(delta_rule(**arguments), want)


def test_the_plain_delta_rule_replaces_what_a_key_holds() -> None:
    """Without decay and with beta = 1 a key read back gives the value last written to it."""
    arguments = inputs(9, "gated", decay=0.0) | {"beta_BTH": torch.ones(2, 9, 2, dtype=torch.float64)}
    arguments["q_BTHK"] = arguments["k_BTHK"]
    torch.testing.assert_close(delta_rule(**arguments)[0], arguments["v_BTHV"])


def test_it_takes_one_form() -> None:
    delta, general = inputs(4, "gated"), inputs(4, "general")
    for wrong in (delta | general, {n: x for n, x in delta.items() if n != "beta_BTH"}):
        with pytest.raises(UserError, match="either beta, or both a and b"):
            delta_rule(**wrong)
    del general["b_BTHK"]
    with pytest.raises(UserError, match="either beta, or both a and b"):
        delta_rule(**general)


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(UserError, match=r"'step' backend .* one token at a time"):
        delta_rule(**inputs(2, "gated"), backend="step")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"'fla' backend of delta_rule cannot run here: .*CUDA device"):
            delta_rule(**inputs(4, "gated"), backend="fla")
