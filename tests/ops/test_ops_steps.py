"""The kernels of a decoding step against their definitions in float64: in Triton's interpreter on a CPU, for real on a
GPU. Every test runs several steps, so the state that one leaves is what the next one reads.

Shapes: B rows, D model width, M inner width, n state expansion, R rank, W convolution width, E outputs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hopper import compile_for_hopper
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops import attention_step, linear_step, rodimus_step
from rodimus_lab.ops.attention import KVCache
from rodimus_lab.ops.linear_step import RMS
from rodimus_lab.ops.rodimus_step import RodimusWeights

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
runs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="in the interpreter, by the first test here")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HEADS = {
    "mha": (4, 4, 4),
    "gqa": (4, 2, 2),
    "mqa": (4, 1, 1),
    "ska": (4, 1, 4),
    "odd": (8, 2, 4),
    "more_keys": (4, 4, 1),
}


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_kernels_in_the_interpreter() -> None:
    """In a process of its own: triton must see the variable when it is first imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:]


def normal(*size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*size, dtype=torch.float64)


def placed(value: Any, dtype: torch.dtype, device: str) -> Any:
    """A tensor, or a tuple of tensors and numbers, in a dtype on a device; whole numbers keep theirs."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None, copy=True)
    if isinstance(value, tuple):
        parts = [placed(part, dtype, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def error(got: Tensor, want: Tensor) -> float:
    return ((got.cpu().double() - want).norm() / want.norm()).item()


def both(value: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """What a kernel gets, and the same, rounded values for the definition."""
    narrow = placed(value, dtype, DEVICE)
    return narrow, placed(narrow, torch.float64, "cpu")


def check_linear(B: int, D: int, E: int, dtype: torch.dtype, backend: str, **parts: bool) -> None:
    inputs = (
        normal(B, D * (2 if parts.get("gated") else 1)),
        normal(E, D, scale=D**-0.5),
        normal(E) if parts.get("bias") else None,
        RMS(1 + normal(D), 1e-5) if parts.get("norm") else None,
        normal(B, E) if parts.get("base") else None,
    )

    def run(values: Any, backend: str, dtype: torch.dtype | None = None) -> Tensor:
        x, weight, bias, norm, base = values
        gated = parts.get("gated", False)
        return linear_step(x, weight, bias, norm=norm, gated=gated, base_BE=base, dtype=dtype, backend=backend)

    narrow, wide = both(inputs, dtype)
    want = run(wide, "naive")
    assert error(run(narrow, backend), want) < TOLERANCE[dtype]
    assert run(narrow, backend, torch.float32).dtype == torch.float32


@runs_kernels
@torch.no_grad()
@pytest.mark.parametrize("backend", ["gemv", "skinny", "gemm"])
@pytest.mark.parametrize(
    ("B", "D", "E", "parts"),
    [
        (1, 40, 24, ()),
        (1, 2056, 6, ("norm", "base")),
        (3, 136, 10, ("norm", "bias", "base")),
        (3, 72, 5, ("gated", "base")),
        (2, 64, 64, ("bias",)),
    ],
)
def test_a_linear_layer(
    B: int, D: int, E: int, parts: tuple[str, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_skinny(monkeypatch)
    check_linear(B, D, E, torch.float32, backend, **dict.fromkeys(parts, True))
    check_linear(B, D, E, torch.float16, backend, **dict.fromkeys(parts, True))


def allow_skinny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("rodimus_lab.ops.linear_step.dispatch"), "SKINNY_ROWS", 16)


def drawn_weights(D: int, M: int, n: int, R: int, W: int) -> RodimusWeights:
    return RodimusWeights(
        norm=RMS(1 + 0.3 * normal(D), 1e-5),
        fc_2MD=normal(2 * M, D, scale=D**-0.5),
        conv_MW=normal(M, W, scale=0.5),
        conv_bias_M=normal(M, scale=0.3),
        state_proj_EM=normal(4 * n, M, scale=3 * M**-0.5),
        gate_bias_2n=normal(2 * n, scale=3.0) - 2,
        gate_down_RM=normal(R, M, scale=M**-0.5),
        gate_up_MR=normal(M, R),
        gate_up_bias_M=normal(M),
        feedthrough_M=1 + normal(M, scale=0.3),
        out_norm=RMS(1 + 0.3 * normal(M), 1e-5),
        out_DM=normal(D, M, scale=M**-0.5),
    )


def check_rodimus(B: int, D: int, M: int, n: int, R: int, W: int, dtype: torch.dtype, steps: int = 2) -> None:
    weights, wide_weights = both(drawn_weights(D, M, n, R, W), dtype)
    state, wide_state = both((normal(B, W - 1, M), normal(B, 1, n, M)), dtype)
    for _ in range(steps):
        x, wide_x = both((normal(B, D), normal(B, D)), dtype)
        y = rodimus_step(*x, *state, weights, backend="triton")
        want = rodimus_step(*wide_x, *wide_state, wide_weights, backend="naive")
        assert y.dtype == dtype
        for got, expected in zip((y, *state), (want, *wide_state), strict=True):
            assert error(got, expected) < TOLERANCE[dtype]


@runs_kernels
@torch.no_grad()
@pytest.mark.parametrize(
    ("B", "D", "M", "n", "R", "W"),
    [(1, 32, 40, 16, 16, 4), (3, 24, 34, 5, 3, 2), (9, 32, 72, 8, 4, 3), (2, 16, 24, 20, 7, 5)],
)
def test_rodimus(B: int, D: int, M: int, n: int, R: int, W: int) -> None:
    check_rodimus(B, D, M, n, R, W, torch.float32)
    if B < 9:
        check_rodimus(B, D, M, n, R, W, torch.float16)


@runs_kernels
@torch.no_grad()
def test_rodimus_in_skinny_products(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_skinny(monkeypatch)
    check_rodimus(9, 32, 72, 8, 4, 3, torch.float32)
    check_rodimus(16, 24, 34, 5, 3, 2, torch.float16)


def check_attention(
    heads: tuple[int, int, int],
    K: int,
    slots: int,
    lengths: list[int],
    dtype: torch.dtype,
    rotary: bool,
    steps: int = 3,
) -> None:
    H, G, J = heads
    B = len(lengths)
    frequency = 10000.0 ** -(torch.arange(0, K, 2, dtype=torch.float64) / K) if rotary else None
    cache = KVCache(normal(B, slots, G, K), normal(B, slots, J, K), torch.tensor(lengths))
    cache, wide_cache = both(cache, dtype)
    for step in range(steps):
        # Parts of one row, as a joint projection gives them.
        row, wide_row = both(normal(B, (H + G + J) * K), dtype)
        parts, wide_parts = (
            [x.unflatten(-1, (-1, K)) for x in r.split([H * K, G * K, J * K], dim=-1)] for r in (row, wide_row)
        )
        placed_frequency = None if frequency is None else frequency.to(DEVICE)
        o = attention_step(*parts, cache, frequency_K=placed_frequency, backend="triton")
        want = attention_step(*wide_parts, wide_cache, frequency_K=frequency, backend="naive")
        assert error(o, want) < TOLERANCE[dtype]
        assert error(cache.k_BSGK, wide_cache.k_BSGK) < TOLERANCE[dtype]
        assert error(cache.v_BSJV, wide_cache.v_BSJV) < TOLERANCE[dtype]
        assert cache.length_B.tolist() == [length + step + 1 for length in lengths]


@runs_kernels
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", HEADS)
def test_attention_of_all_heads(kind: str, dtype: torch.dtype) -> None:
    """Rows of unequal lengths: empty, filling, full within these steps, gone round several times."""
    check_attention(HEADS[kind], 16, 140, [0, 70, 139, 500], dtype, rotary=True, steps=2)


@runs_kernels
@torch.no_grad()
@pytest.mark.parametrize(("K", "slots", "rotary"), [(6, 5, True), (40, 1, True), (16, 300, False)])
def test_attention_at_odd_sizes(K: int, slots: int, rotary: bool) -> None:
    check_attention((2, 1, 2), K, slots, [0, 3, 299], torch.float32, rotary)


@runs_kernels
def test_what_they_cannot_do_is_said() -> None:
    x, weight = torch.zeros(9, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    with pytest.raises(UserError, match="no backward pass"):
        linear_step(x, weight, backend="gemv")
    with torch.no_grad():
        with pytest.raises(UserError, match="9 rows are more than 3"):
            linear_step(x, weight, backend="gemv")
        with pytest.raises(UserError, match="no float64"):
            linear_step(x[:1].double(), weight.double(), backend="gemv")
        empty = KVCache(*(torch.zeros(9, 0, 1, 8, device=DEVICE) for _ in range(2)), torch.zeros(9, device=DEVICE))
        with pytest.raises(UserError, match="no slot"):
            attention_step(x.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1), empty)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("B", [1, 3, 9, 64])
def test_real_shapes(B: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rodimus(B, 2048, 4096, 64, 16, 4, dtype)
    backend = "gemv" if B <= 4 else "gemm"
    if 4 < B <= 16:
        allow_skinny(monkeypatch)
        check_rodimus(B, 2048, 4096, 64, 16, 4, dtype)
        backend = "skinny"
    check_linear(B, 2048, 5001, dtype, backend, norm=True)
    check_linear(B, 5464, 2048, dtype, backend, gated=True, base=True)
    for kind in ("ska", "gqa", "mha"):
        lengths = torch.linspace(0, 5000, B).long().tolist()
        check_attention(HEADS[kind], 128, 1024, lengths, dtype, rotary=True)


@pytest.mark.gpu
@torch.no_grad()
def test_the_same_bits_every_time() -> None:
    H, K, S = 16, 128, 1024
    weights = placed(drawn_weights(2048, 4096, 64, 16, 4), torch.bfloat16, "cuda")
    start = placed((normal(2, 3, 4096), normal(2, 1, 64, 4096)), torch.bfloat16, "cuda")
    cache = placed(KVCache(normal(2, S, 1, K), normal(2, S, H, K), torch.tensor([5, 5000])), torch.bfloat16, "cuda")
    x = placed(normal(2, 2048), torch.bfloat16, "cuda")
    runs = []
    for _ in range(3):
        state, ring = placed(start, torch.bfloat16, "cuda"), placed(cache, torch.bfloat16, "cuda")
        y = rodimus_step(x, x, *state, weights, backend="triton")
        q, k, v = (part.unflatten(-1, (-1, K)) for part in (x, x[:, :K], x))
        runs.append([y, *state, attention_step(q, k, v, KVCache(*ring), backend="triton"), *ring])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


class Stack:
    """A few sublayers one after another, and the same in float64 for the definition."""

    def __init__(self, layers: int, B: int, D: int, dtype: torch.dtype):
        M = 2 * D
        made = [both(drawn_weights(D, M, 64, 16, 4), dtype) for _ in range(layers)]
        self.weights, self.wide_weights = ([pair[i] for pair in made] for i in (0, 1))
        made = [both((normal(B, 3, M), normal(B, 1, 64, M)), dtype) for _ in range(layers)]
        self.states, self.wide_states = ([pair[i] for pair in made] for i in (0, 1))
        self.x, self.y = torch.zeros(B, D, dtype=dtype, device="cuda"), torch.zeros(B, D, dtype=dtype, device="cuda")
        self.wide_weights = [placed(weights, torch.float64, "cuda") for weights in self.wide_weights]
        self.wide_states = [placed(state, torch.float64, "cuda") for state in self.wide_states]

    def step(self) -> None:
        x = self.x
        for state, weights in zip(self.states, self.weights, strict=True):
            x = rodimus_step(x, x, *state, weights, backend="triton")
        self.y.copy_(x)

    def error_of_step(self, x: Tensor) -> float:
        """Of the step that read `x`, and of the states after it."""
        y = x.double()
        for state, weights in zip(self.wide_states, self.wide_weights, strict=True):
            y = rodimus_step(y, y, *state, weights, backend="naive")
        pairs = [(self.y, y)]
        for state, wide in zip(self.states, self.wide_states, strict=True):
            pairs += zip(state, wide, strict=True)
        return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)


def captured(step: Any) -> torch.cuda.CUDAGraph:
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())  # On which the states were made, and copied.
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.gpu
@pytest.mark.timeout(300)
@torch.no_grad()
@pytest.mark.parametrize(
    ("B", "dtype"),
    [(1, torch.bfloat16), (1, torch.float32), (2, torch.bfloat16), (3, torch.float16), (4, torch.bfloat16)],
)
def test_graphs_replayed_often(B: int, dtype: torch.dtype) -> None:
    """Two models on one stream, in graphs of several sublayers: no kernel overtakes one whose work it reads."""
    stacks = [Stack(3, B, 2048, dtype), Stack(2, B, 768, dtype)]
    start = [[placed(state, dtype, "cuda") for state in stack.states] for stack in stacks]
    graphs = [captured(stack.step) for stack in stacks]
    for stack, states in zip(stacks, start, strict=True):
        for state, before in zip(stack.states, states, strict=True):
            for part, value in zip(state, before, strict=True):
                part.copy_(value)
    for step in range(200):
        for stack, graph in zip(stacks, graphs, strict=True):
            stack.x.normal_()
            graph.replay()
            worst = stack.error_of_step(stack.x)
            assert worst < 2 * TOLERANCE[dtype], step


WIDE = {
    "fp32": "narrow_ptr narrow_out low_ptr low_out part_ptr top_ptr sum_ptr top_out sum_out state_ptr",
    "i64": "length_ptr",
    "fp64": "frequency_ptr",
}
POINTERS = {name: kind for kind, names in WIDE.items() for name in names.split()}
LINEAR = {"D": 4096, "E": 2048, "B": 1, "BB": 1, "BE": 4, "BD": 2048, "NORM": True, "GATED": False}
MEMORY = {"M": 4096, "N": 64, "BN": 64, "R": 16, "BR": 16}
HEAD = {"K": 64, "V": 64, "BK": 32, "BV": 64, "P": 16, "BS": 64, "ROTARY": True}
HOPPER = [
    ("linear_step.triton", "_gemv_kernel", LINEAR | {"BIAS": False, "BASE": True}),
    ("linear_step.triton", "_gemv_kernel", LINEAR | {"B": 4, "BB": 4, "BE": 2, "BIAS": True, "BASE": False}),
    (
        "linear_step.triton",
        "_skinny_kernel",
        {"D": 2048, "E": 8192, "B": 8, "BB": 16, "BE": 64, "BD": 256, "STAGES": 4, "BIAS": False, "BASE": False},
    ),
    ("linear_step.triton", "_ready_kernel", {"D": 5464, "BD": 8192, "NORM": False, "GATED": True}),
    (
        "rodimus_step.triton",
        "_enter_kernel",
        {"D": 2048, "M": 4096, "W": 4, "BW": 4, "B": 1, "BB": 1, "BE": 4, "BD": 2048},
    ),
    ("rodimus_step.triton", "_conv_kernel", {"M": 4096, "W": 4, "BW": 4, "BM": 256}),
    (
        "rodimus_step.triton",
        "_narrow_kernel",
        {"M": 4096, "E": 256, "R": 16, "B": 1, "BB": 1, "BE": 2, "BD": 4096, "num_warps": 8},
    ),
    ("rodimus_step.triton", "_memory_kernel", MEMORY | {"BM": 32}),
    ("attention.step_triton", "_stretch_kernel", HEAD | {"H": 32, "G": 1, "J": 32, "R": 1, "BR": 1}),
    ("attention.step_triton", "_stretch_kernel", HEAD | {"H": 32, "G": 8, "J": 8, "R": 4, "BR": 16}),
    ("attention.step_triton", "_join_kernel", {"H": 32, "V": 64, "BV": 64, "P": 16, "BP": 16}),
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in the compiler's place")
@pytest.mark.parametrize(("module", "name", "constants"), HOPPER)
def test_the_kernels_compile_for_hopper_without_one(module: str, name: str, constants: dict[str, Any]) -> None:
    """To machine code, in which a kernel's weights are loaded before it waits for the one before it."""
    kernel = getattr(importlib.import_module(f"rodimus_lab.ops.{module}"), name)
    constants = constants | {"PDL": True}
    num_warps = constants.pop("num_warps", 4)

    def type_of(argument: str) -> str:
        if argument.endswith(("_ptr", "_out")):
            return "*" + POINTERS.get(argument, "bf16")
        return "fp32" if argument in ("scale", "eps") else "i32"

    compiled = compile_for_hopper(kernel, constants, type_of, aligned=True, num_warps=num_warps, launch_pdl=True)
    before, after = compiled.asm["ptx"].split("griddepcontrol.wait", 1)
    assert ("griddepcontrol.launch_dependents" in before) == (name not in ("_narrow_kernel", "_skinny_kernel"))
    assert ("ld.global" in before) == (
        name not in ("_ready_kernel", "_skinny_kernel", "_stretch_kernel", "_join_kernel")
    )
    assert "st.global" not in before
    assert "st.global" in after
