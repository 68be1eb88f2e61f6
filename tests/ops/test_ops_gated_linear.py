"""The gated linear recurrence: the definition against loops written here, every backend against the definition.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops import Segments, gated_linear

LENGTHS = (1, 7, 63, 64, 65, 257)


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


def inputs(
    length: int, *, alpha: str = "full", beta: str = "none", state: bool = True, heads: int = 2, decay: float = 1.0
) -> dict[str, Tensor | None]:
    """Leaves in float64; gates are `full`, `one` (last dimension 1) or `none`."""
    K, V = 5, 6

    def leaf(*shape: int) -> Tensor:
        return torch.randn(2, *shape, dtype=torch.float64).requires_grad_()

    def gate(kind: str, width: int) -> Tensor | None:
        if kind == "none":
            return None
        shape = (2, length, heads, width if kind == "full" else 1)
        return (-decay * torch.rand(shape, dtype=torch.float64)).requires_grad_()

    return {
        "q_BTHK": leaf(length, heads, K),
        "k_BTHK": leaf(length, heads, K),
        "v_BTHV": leaf(length, heads, V),
        "log_alpha_BTHK": gate(alpha, K),
        "log_beta_BTHV": gate(beta, V),
        "state_BHKV": leaf(heads, K, V) if state else None,
    }


def outputs_and_gradients(
    arguments: dict[str, Tensor | None], segments: Segments | None, backend: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """o, the final state and the gradient of each input of a fixed random function of both."""
    leaves = {
        name: None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)
        for name, x in arguments.items()
    }
    o, state = gated_linear(**leaves, scale=0.7, segments=segments, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in (o, state)]
    ((o * weights[0]).sum() + (state * weights[1]).sum()).backward()
    gradients = {f"d_{name}": x.grad for name, x in leaves.items() if x is not None and x.grad is not None}
    return {"o": o.detach(), "state": state.detach()} | gradients


def assert_agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        error = (got[name].double() - x.double()).abs().max().item() / max(1.0, x.abs().max().item())
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def by_hand(arguments: dict[str, Tensor | None], segments: Segments | None, scale: float) -> tuple[Tensor, Tensor]:
    """Eq. 7, element by element."""
    q, k, v = (arguments[name] for name in ("q_BTHK", "k_BTHK", "v_BTHV"))
    batch, length, heads, K = q.shape
    V = v.shape[-1]
    log_alpha, log_beta, first = (arguments[name] for name in ("log_alpha_BTHK", "log_beta_BTHV", "state_BHKV"))
    zero = torch.zeros(1, 1, 1, 1, dtype=q.dtype)
    alpha = (zero if log_alpha is None else log_alpha).exp().expand(batch, length, heads, K)
    beta = (zero if log_beta is None else log_beta).exp().expand(batch, length, heads, V)
    o = torch.zeros(batch, length, heads, V, dtype=q.dtype)
    last = torch.zeros(batch, heads, K, V, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            S = torch.zeros(K, V, dtype=q.dtype) if first is None else first[b, h].clone()
            document = 0
            for t in range(length):
                here = 0 if segments is None else int(segments.ids_BT[b, t])
                if here < 0:
                    continue
                if here != document:
                    S, document = torch.zeros_like(S), here
                S = torch.outer(alpha[b, t, h], beta[b, t, h]) * S + torch.outer(k[b, t, h], v[b, t, h])
                o[b, t, h] = scale * (q[b, t, h] @ S)
            last[b, h] = S
    return o, last


@pytest.mark.parametrize("kind", ["none", "padded", "packed", "both"])
@pytest.mark.parametrize(("alpha", "beta"), [("full", "full"), ("one", "none"), ("none", "one")])
def test_naive_is_the_definition(kind: str, alpha: str, beta: str) -> None:
    arguments, segments = inputs(11, alpha=alpha, beta=beta), segments_for(kind, 11)
    with torch.no_grad():
        o, state = gated_linear(**arguments, scale=0.3, segments=segments, backend="naive")
        want_o, want_state = by_hand(arguments, segments, 0.3)
    torch.testing.assert_close(o, want_o, rtol=0, atol=1e-13)
    torch.testing.assert_close(state, want_state, rtol=0, atol=1e-13)


CASES = [(length, "full", "full", True, kind) for length in LENGTHS for kind in ("none", "both")]
CASES += [
    (65, "full", "none", True, "padded"),
    (65, "full", "none", False, "packed"),
    (65, "one", "one", True, "both"),
    (65, "one", "none", False, "none"),
    (65, "none", "full", True, "packed"),
    (65, "none", "none", True, "both"),
    (7, "one", "none", True, "both"),
    (257, "one", "none", True, "both"),
    (130, "full", "none", True, "none"),
    (130, "full", "none", True, "both"),
]


@pytest.mark.parametrize(("length", "alpha", "beta", "state", "kind"), CASES)
def test_chunked_equals_naive(length: int, alpha: str, beta: str, state: bool, kind: str) -> None:
    arguments, segments = inputs(length, alpha=alpha, beta=beta, state=state), segments_for(kind, length)
    want = outputs_and_gradients(arguments, segments, "naive", torch.float64)
    assert_agree(outputs_and_gradients(arguments, segments, "chunked", torch.float64), want, 1e-10)
    assert_agree(outputs_and_gradients(arguments, segments, "chunked", torch.float32), want, 1e-4)


@pytest.mark.parametrize("kind", ["none", "both"])
def test_gradcheck(kind: str) -> None:
    arguments, segments = inputs(18, alpha="full", beta="full", heads=1), segments_for(kind, 18)
    leaves = {name: x[:1, ..., :2].detach().requires_grad_() for name, x in arguments.items() if x is not None}
    leaves["state_BHKV"] = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    one_row = None if segments is None else Segments(segments.ids_BT[:1])

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return gated_linear(**dict(zip(leaves, tensors, strict=True)), segments=one_row, backend="chunked")

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


def with_alpha(arguments: dict[str, Tensor | None], log_alpha: Tensor) -> dict[str, Tensor | None]:
    return arguments | {"log_alpha_BTHK": log_alpha.requires_grad_()}


DECAYS = {
    "-200 over a chunk": lambda shape: torch.full(shape, -200 / 64),
    "-20 a step": lambda shape: torch.full(shape, -20.0),
    "-20 on average": lambda shape: -40 * torch.rand(shape),
    "mostly mild": lambda shape: -20 * torch.rand(shape) ** 8,
}


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("name", DECAYS)
def test_strong_decay(name: str, kind: str) -> None:
    arguments, segments = inputs(130, beta="full"), segments_for(kind, 130)
    arguments = with_alpha(arguments, DECAYS[name]((2, 130, 2, 5)).double())
    want = outputs_and_gradients(arguments, segments, "naive", torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        got = outputs_and_gradients(arguments, segments, "chunked", dtype)
        assert all(x.isfinite().all() for x in got.values())
        assert_agree(got, want, tolerance)


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("name", [*DECAYS, "a huge one"])
def test_one_strong_gate_a_head(name: str, kind: str) -> None:
    """The path without K-wide decays, with q and k shared by the heads, in outputs and gradients."""
    arguments, segments = inputs(130, alpha="one"), segments_for(kind, 130)
    shape = (2, 130, 2, 1)
    log_alpha = DECAYS[name](shape) if name in DECAYS else -0.01 * torch.rand(shape)
    if name == "a huge one":
        log_alpha[:, [3, 20, 70]] = -1e30
    arguments = with_alpha(arguments, log_alpha.double())
    for shared in ("q_BTHK", "k_BTHK"):
        arguments[shared] = torch.randn(2, 130, 1, 5, dtype=torch.float64).requires_grad_()

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in arguments.items() if x is not None}
        shared = {name: leaves[name].expand(-1, -1, 2, -1) for name in ("q_BTHK", "k_BTHK")}
        o, state = gated_linear(**(leaves | shared), scale=0.7, segments=segments, backend=backend)
        (o.square().sum() + state.square().sum()).backward()
        gradients = {name: x.grad for name, x in leaves.items() if x.grad is not None}
        return {"o": o.detach(), "state": state.detach()} | gradients

    want = run("naive", torch.float64)
    assert set(want) == {"o", "state", "q_BTHK", "k_BTHK", "v_BTHV", "log_alpha_BTHK", "state_BHKV"}
    assert_agree(run("chunked", torch.float64), want, 1e-10)
    got = run("chunked", torch.float32)
    assert all(x.isfinite().all() for x in got.values())
    assert_agree(got, want, 1e-4)


@pytest.mark.parametrize("huge", [-50.0, -1e4, -1e30])
def test_a_huge_decay_leaves_the_mild_ones_after_it_precise(huge: float) -> None:
    """Differences of cumulated gates would lose the mild decays to the huge one's rounding."""
    arguments = inputs(130)
    log_alpha = -0.01 * torch.rand(2, 130, 2, 5, dtype=torch.float64)
    log_alpha[:, [3, 20, 70]] = huge
    arguments = with_alpha(arguments, log_alpha)
    want = outputs_and_gradients(arguments, None, "naive", torch.float64)
    assert_agree(outputs_and_gradients(arguments, None, "chunked", torch.float32), want, 2e-5)


def test_a_gate_of_exactly_zero_forgets_everything() -> None:
    arguments = inputs(70, beta="full")
    log_alpha = -torch.rand(2, 70, 2, 5, dtype=torch.float64)
    log_alpha[:, 40] = -math.inf
    arguments = with_alpha(arguments, log_alpha)
    want = outputs_and_gradients(arguments, None, "naive", torch.float64)
    assert_agree(outputs_and_gradients(arguments, None, "chunked", torch.float64), want, 1e-10)
    alone = {name: None if x is None else x[:, 40:] for name, x in arguments.items()} | {"state_BHKV": None}
    o, _ = gated_linear(**alone, scale=0.7)
    torch.testing.assert_close(want["o"][:, 40:], o)


def test_bfloat16_is_within_half_a_percent() -> None:
    arguments = inputs(257, decay=0.1)
    rounded = {name: None if x is None else x.detach() for name, x in arguments.items()}
    narrow = {name: x.bfloat16() for name, x in rounded.items() if x is not None and name[0] in "qkv"}
    wide = rounded | {name: x.double() for name, x in narrow.items()}
    float32 = {name: None if x is None else x.float() for name, x in rounded.items()}
    want_o, want_state = gated_linear(**wide, scale=0.5, backend="naive")
    o, state = gated_linear(**(float32 | narrow), scale=0.5, backend="chunked")
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (o - want_o).norm() / want_o.norm() <= 5e-3
    assert (state - want_state).norm() / want_state.norm() <= 5e-3


def test_padding_may_hold_anything() -> None:
    arguments, segments = inputs(20, beta="full"), segments_for("padded", 20)
    assert segments is not None
    want = outputs_and_gradients(arguments, segments, "chunked", torch.float64)
    spoilt = {
        name: x
        if x is None or name == "state_BHKV"
        else x.detach().masked_fill(~segments.valid_BT[..., None, None], 1e9)
        for name, x in arguments.items()
    }
    spoilt["k_BTHK"] = arguments["k_BTHK"].detach().masked_fill(~segments.valid_BT[..., None, None], math.nan)
    for backend in ("chunked", "naive"):
        o, state = gated_linear(**spoilt, scale=0.7, segments=segments, backend=backend)
        torch.testing.assert_close((o, state), (want["o"], want["state"]))


def test_pieces_equal_the_whole() -> None:
    arguments = {name: None if x is None else x.detach() for name, x in inputs(70, beta="full").items()}
    want_o, want_state = gated_linear(**arguments)
    state, parts = arguments.pop("state_BHKV"), []
    for piece in (slice(0, 33), slice(33, 34), slice(34, 35), slice(35, 70)):
        part = {name: None if x is None else x[:, piece] for name, x in arguments.items()}
        o, state = gated_linear(**part, state_BHKV=state)
        parts.append(o)
    torch.testing.assert_close((torch.cat(parts, 1), state), (want_o, want_state))


def test_one_token_takes_the_step_backend() -> None:
    arguments = inputs(2)
    with pytest.raises(UserError, match=r"'step' backend .* one token at a time"):
        gated_linear(**arguments, backend="step")
    one = inputs(1)
    torch.testing.assert_close(gated_linear(**one, backend="step"), gated_linear(**one, backend="chunked"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a backend that cannot run")
def test_fla_without_cuda_says_why() -> None:
    with pytest.raises(UserError, match=r"'fla' backend of gated_linear cannot run here: .*CUDA device"):
        gated_linear(**inputs(4), backend="fla")


def test_unknown_backend_lists_the_good_ones() -> None:
    with pytest.raises(UserError, match=r"'chunkd'; did you mean 'chunked'\? known: .*chunked, fla, naive"):
        gated_linear(**inputs(4), backend="chunkd")


@pytest.mark.parametrize("beta", ["none", "full"])
@pytest.mark.parametrize("ids", [None, (0, 0), (0, 2), (-1, 1)])
def test_one_step_equals_the_definition(ids: tuple[int, int] | None, beta: str) -> None:
    """A row that goes on, one that starts a document, one that is padding."""
    segments = None if ids is None else Segments(torch.tensor(ids).unsqueeze(1))
    arguments = inputs(1, beta=beta)
    want = outputs_and_gradients(arguments, segments, "naive", torch.float64)
    assert_agree(outputs_and_gradients(arguments, segments, "step", torch.float64), want, 1e-12)
