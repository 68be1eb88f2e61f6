"""The fused operators around the recurrence, short_conv, conv_gate, tempered_selection and gated_norm, against their
definitions in float64: in Triton's interpreter on a CPU, for real on a GPU.

Shapes: B batch, T time, M width, W convolution width, R rank.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hopper import compile_for_hopper
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.recompute import recomputed
from rodimus_lab.nn.rodimus import RodimusConfig
from rodimus_lab.ops import Segments, conv_gate, gated_norm, short_conv, tempered_selection, use_backend
from rodimus_lab.ops.conv_gate import LowRankGate

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
runs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="in the interpreter, by the first test here")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
PARAMETERS = ("down", "up", "up_bias", "weight", "bias", "feedthrough")
Tensors = dict[str, Tensor]


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_kernels_in_the_interpreter() -> None:
    """In a process of its own: triton must see the variable when it is first imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:]


def errors(run: Callable[..., Any], inputs: Tensors, dtype: torch.dtype) -> dict[str, float]:
    """||triton - naive|| / ||naive|| of every output and gradient. Tensors in `dtype`, parameters in float32, as under
    autocast; the definition in float64 on the same numbers."""
    inputs = {name: x.to(torch.float32 if name in PARAMETERS else dtype) for name, x in inputs.items()}

    def outputs_and_gradients(backend: str, cast: Callable[[Tensor], Tensor]) -> Tensors:
        leaves = {name: cast(x).to(DEVICE).clone().requires_grad_() for name, x in inputs.items()}
        outputs = run(backend, **leaves)
        generator = torch.Generator().manual_seed(7)
        drawn = [torch.randn(y.shape, generator=generator).to(dtype) for y in outputs]
        cotangents = [d.to(DEVICE, y.dtype) for d, y in zip(drawn, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        for x, gradient in zip(leaves.values(), gradients, strict=True):
            assert gradient.dtype == x.dtype
        named = {f"output {index}": y for index, y in enumerate(outputs)}
        named |= {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
        return {name: x.detach().cpu().double() for name, x in named.items()}

    want = outputs_and_gradients("naive", Tensor.double)
    got = outputs_and_gradients("triton", lambda x: x)
    return {name: ((got[name] - want[name]).norm() / (want[name].norm() or 1.0)).item() for name in want}


def check(found: dict[str, float], dtype: torch.dtype) -> None:
    wrong = {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]}
    assert not wrong, wrong


def conv_gate_errors(
    shape: tuple[int, int, int], dtype: torch.dtype, *, W: int = 4, R: int = 16, state: bool = False, ids: Any = None
) -> dict[str, float]:
    B, T, M = shape
    # x is the left half of a wider tensor, as the projection gives it.
    inputs = {
        "xz": torch.randn(B, T, 2 * M),
        "down": torch.randn(R, M) / M**0.5,
        "up": torch.randn(M, R) / R**0.5,
        "up_bias": torch.randn(M),
        "weight": torch.randn(M, W),
        "bias": torch.randn(M),
    }
    if state:
        inputs["state"] = torch.randn(B, W - 1, M)
    segments = None if ids is None else Segments(torch.as_tensor(ids, device=DEVICE))

    def run(
        backend: str, xz: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor, **more: Any
    ) -> Any:
        outputs = conv_gate(
            xz[..., :M], weight, bias, LowRankGate(down, up, up_bias),
            state_BWM=more.get("state"), segments=segments, backend=backend,
        )  # fmt: skip
        if segments is None:
            return outputs
        return *((y * segments.valid_BT.unsqueeze(-1)) for y in outputs[:2]), outputs[2]

    return errors(run, inputs, dtype)


def short_conv_errors(
    shape: tuple[int, int, int], dtype: torch.dtype, *, W: int = 4, bias: bool = True, silu: bool = True,
    state: bool = False, ids: Any = None,
) -> dict[str, float]:  # fmt: skip
    B, T, M = shape
    inputs = {"xz": torch.randn(B, T, 2 * M), "weight": torch.randn(M, W)}  # x is the right half of a wider tensor.
    inputs |= {"bias": torch.randn(M)} if bias else {}
    inputs |= {"state": torch.randn(B, W - 1, M)} if state else {}
    segments = None if ids is None else Segments(torch.as_tensor(ids, device=DEVICE))

    def run(backend: str, xz: Tensor, weight: Tensor, **more: Any) -> Any:
        y, last = short_conv(
            xz[..., M:], weight, more.get("bias"), silu=silu, state_BWD=more.get("state"), segments=segments,
            backend=backend.replace("naive", "taps"),
        )  # fmt: skip
        return (y if segments is None else y * segments.valid_BT.unsqueeze(-1)), last

    return errors(run, inputs, dtype)


def gated_norm_errors(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, float]:
    B, T, M = shape
    inputs = {"o": torch.randn(B, T, M), "x": torch.randn(B, T, M), "xz": torch.randn(B, T, 2 * M)}
    inputs |= {"feedthrough": torch.randn(M), "weight": torch.randn(M)}

    def run(backend: str, o: Tensor, x: Tensor, xz: Tensor, feedthrough: Tensor, weight: Tensor) -> Any:
        return [gated_norm(o, x, xz[..., M:], feedthrough, weight, eps=1e-3, backend=backend)]

    return errors(run, inputs, dtype)


def selection_errors(shape: tuple[int, int, int], dtype: torch.dtype, spread: float = 2.0) -> dict[str, float]:
    """Logits around 0, and `spread` apart."""
    B, T, K = shape
    # Queries, keys and logits are columns of one tensor, as the projection gives it.
    inputs = {"rows": spread * torch.randn(B, T, 4 * K), "bias": spread * torch.randn(2 * K)}

    def run(backend: str, rows: Tensor, bias: Tensor) -> Any:
        q, k, logits = rows.split([K, K, 2 * K], dim=-1)
        return *tempered_selection(k, logits, bias, backend=backend), q

    return errors(run, inputs, dtype)


FOUND = [short_conv_errors, conv_gate_errors, selection_errors, gated_norm_errors]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32])
@pytest.mark.parametrize("found", FOUND)
def test_autocast_around_both_passes_changes_nothing(found: Callable[..., Any], dtype: torch.dtype) -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        check(found((2, 61, 24), dtype), dtype)


@runs_kernels
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("length", [1, 2, 61])
def test_short_conv_at_odd_lengths(length: int, state: bool) -> None:
    check(short_conv_errors((2, length, 24), torch.float32, state=state), torch.float32)


@runs_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_short_conv_with_and_without_bias_and_silu(silu: bool, bias: bool) -> None:
    check(short_conv_errors((2, 21, 40), torch.float32, silu=silu, bias=bias), torch.float32)


@runs_kernels
@pytest.mark.parametrize(("width", "taps"), [(40, 2), (136, 3), (16, 5), (7, 8)])
def test_short_conv_at_odd_widths(width: int, taps: int) -> None:
    check(short_conv_errors((1, 67, width), torch.float32, W=taps, state=True), torch.float32)


@runs_kernels
def test_short_conv_over_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("rodimus_lab.ops.short_conv.sliding"), "LONGEST", 8)
    for state in (False, True):
        check(short_conv_errors((2, 72, 24), torch.float32, state=state), torch.float32)


def documents_and_padding() -> Tensor:
    """Of 80 tokens: one row of some of each, one of many documents, and one of padding alone."""
    ids = torch.randint(0, 20, (3, 80)).sort(dim=1).values - 1
    ids[0] = torch.arange(80) // 70 - (torch.arange(80) < 5).long()
    ids[2] = -1
    return ids


@runs_kernels
@pytest.mark.parametrize("silu", [False, True])
def test_short_conv_keeps_documents_and_padding_apart(silu: bool) -> None:
    check(short_conv_errors((3, 80, 24), torch.float32, silu=silu, ids=documents_and_padding()), torch.float32)


@runs_kernels
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("length", [1, 2, 61])
def test_conv_gate_at_odd_lengths(length: int, state: bool) -> None:
    check(conv_gate_errors((2, length, 24), torch.float32, state=state), torch.float32)


@runs_kernels
@pytest.mark.parametrize(("width", "rank", "taps"), [(40, 3, 1), (136, 20, 2), (16, 32, 5)])
def test_conv_gate_at_odd_widths(width: int, rank: int, taps: int) -> None:
    check(conv_gate_errors((1, 67, width), torch.float32, W=taps, R=rank, state=taps > 1), torch.float32)


@runs_kernels
def test_conv_gate_over_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("rodimus_lab.ops.conv_gate.triton")
    monkeypatch.setattr(importlib.import_module("rodimus_lab.ops.short_conv.sliding"), "LONGEST", 8)
    monkeypatch.setattr(kernels, "GATE_STRETCH", 64)
    for state in (False, True):
        check(conv_gate_errors((2, 72, 24), torch.float32, state=state), torch.float32)


@runs_kernels
def test_conv_gate_keeps_documents_and_padding_apart() -> None:
    check(conv_gate_errors((3, 80, 24), torch.float32, ids=documents_and_padding()), torch.float32)


@runs_kernels
@pytest.mark.parametrize("shape", [(2, 1, 24), (1, 5, 256), (2, 9, 40), (2, 150, 40)])
def test_gated_norm_at_odd_sizes(shape: tuple[int, int, int]) -> None:
    check(gated_norm_errors(shape, torch.float32), torch.float32)


@runs_kernels
@pytest.mark.parametrize("shape", [(2, 1, 24), (1, 5, 256), (2, 9, 64), (2, 150, 40), (1, 3, 1)])
def test_tempered_selection_at_odd_sizes(shape: tuple[int, int, int]) -> None:
    check(selection_errors(shape, torch.float32), torch.float32)


@runs_kernels
@pytest.mark.parametrize("found", [short_conv_errors, conv_gate_errors])
def test_convolutions_without_a_single_row(found: Callable[..., Any]) -> None:
    check(found((0, 5, 24), torch.float32), torch.float32)


@runs_kernels
@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)])
@pytest.mark.parametrize("found", [selection_errors, gated_norm_errors])
def test_without_a_single_row(found: Callable[..., Any], shape: tuple[int, int, int]) -> None:
    check(found(shape, torch.float32), torch.float32)


@runs_kernels
def test_tempered_selection_far_from_where_gates_start() -> None:
    """Every number by itself, as a small gate is lost in the norm of all; the definition in float64."""
    a = torch.tensor([-500.0, -88.0, -40.0, -29.9, -16.0, -15.1, -14.9, -5.0, -1e-6, 0.0, 1.0, 16.0, 21.0, 300.0])
    t = torch.tensor([-60.0, -3.0, 0.0, 4.0, 60.0])
    logits = torch.cat([a.repeat_interleave(5), t.repeat(14)]).expand(3, 2, 140)
    k = torch.stack([torch.randn(2, 70), 1e-15 * torch.randn(2, 70), torch.zeros(2, 70)])
    found = []
    for backend, dtype in (("naive", torch.float64), ("triton", torch.float32)):
        leaves = [x.to(DEVICE, dtype).clone().requires_grad_() for x in (k, logits, torch.zeros(140))]
        log_alpha, taken = tempered_selection(*leaves, backend=backend)
        weights = torch.linspace(0.5, 2.0, 70, device=DEVICE, dtype=dtype)
        gradients = torch.autograd.grad((log_alpha * weights).sum() + (taken * weights.flip(0)).sum(), leaves)
        found.append([log_alpha, taken, *gradients[:2]])
    for name, want, got in zip(("log alpha", "keys", "dk", "dlogits"), *found, strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-4 if ON_GPU else 2e-5, atol=1e-30, msg=lambda text, name=name: f"{name}: {text}"
        )


@runs_kernels
def test_a_state_does_not_keep_the_inputs_in_memory() -> None:
    x, weight, state = (torch.randn(*size, device=DEVICE) for size in ((2, 9, 32), (16, 4), (2, 3, 16)))
    gate = LowRankGate(*(torch.randn(*size, device=DEVICE) for size in ((4, 16), (16, 4), (16,))))
    _, of_conv = short_conv(x[..., :16], weight, state_BWD=state, backend="triton")
    *_, of_both = conv_gate(x[..., :16], weight, weight[:, 0], gate, state_BWM=state, backend="triton")
    for last in (of_conv, of_both):
        assert last is not None
        assert last.untyped_storage().nbytes() == last.nbytes


@runs_kernels
@pytest.mark.parametrize("operator", ["short_conv", "conv_gate", "gated_norm"])
def test_vectors_of_parameters_may_be_strided(operator: str) -> None:
    x, weight, down, up = (torch.randn(*size, device=DEVICE) for size in ((2, 5, 16), (16, 4), (4, 16), (16, 4)))
    run = {
        "short_conv": lambda a, b: short_conv(x, weight, a, backend="triton")[0] * b,
        "conv_gate": lambda a, b: torch.cat(
            conv_gate(x, weight, a, LowRankGate(down, up, b), backend="triton")[:2], dim=-1
        ),
        "gated_norm": lambda a, b: gated_norm(x, x, x, a, b, eps=1e-3, backend="triton"),
    }[operator]
    strided = torch.randn(16, 2, device=DEVICE).requires_grad_()
    found = []
    for pair in (strided.unbind(1), strided.T.contiguous().unbind(0)):
        y = run(*pair)
        found.append([y, *torch.autograd.grad(y.square().sum(), strided)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@runs_kernels
def test_float16() -> None:
    check(short_conv_errors((1, 70, 48), torch.float16), torch.float16)
    check(conv_gate_errors((1, 70, 48), torch.float16), torch.float16)
    check(selection_errors((1, 7, 48), torch.float16), torch.float16)
    check(gated_norm_errors((1, 7, 48), torch.float16), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 2048, 4096), (32, 512, 1024), (3, 777, 1536), (1, 130, 3072)])
def test_bfloat16_at_real_shapes(shape: tuple[int, int, int]) -> None:
    check(short_conv_errors(shape, torch.bfloat16, state=shape[0] == 3), torch.bfloat16)
    check(conv_gate_errors(shape, torch.bfloat16, state=shape[0] == 3), torch.bfloat16)
    check(gated_norm_errors(shape, torch.bfloat16), torch.bfloat16)
    check(selection_errors((*shape[:2], 64), torch.bfloat16), torch.bfloat16)


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    x, z = torch.randn(4, 1000, 2048, device="cuda", dtype=torch.bfloat16).chunk(2, dim=-1)
    weights = [
        0.1 * torch.randn(*size, device="cuda") for size in ((1024, 4), (1024,), (16, 1024), (1024, 16), (1024,))
    ]
    leaves = [each.clone().requires_grad_() for each in (x, z, *weights)]
    runs = []
    for _ in range(3):
        x, z, weight, bias, *gate = leaves
        conv, v, _ = conv_gate(x, weight, bias, LowRankGate(*gate), backend="triton")
        other, _ = short_conv(z, weight, bias, silu=True, backend="triton")
        y = gated_norm(v, conv, other, bias, bias, eps=1e-5, backend="triton")
        log_alpha, k = tempered_selection(y[..., :512], conv, bias, backend="triton")
        y = y + torch.cat([log_alpha, k], dim=-1)
        runs.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@runs_kernels
@pytest.mark.parametrize("compiled", [False, True])
def test_the_mixer_on_either_backend(compiled: bool) -> None:
    """Compiled: traced whole, with the kernels as opaque operators."""
    mixer = RodimusConfig(n=16).build(16)
    mixer.init_weights(Initializer())
    mixer = mixer.to(DEVICE)
    u = torch.randn(2, 9, 16, device=DEVICE, requires_grad=True)
    found = []
    for backend in ("naive", "triton"):
        with use_backend(
            conv_gate=backend, tempered_selection=backend, gated_norm=backend, short_conv="taps", gated_linear="chunked"
        ):
            run: Any = mixer
            if compiled and backend == "triton":
                run = torch.compile(mixer, backend="aot_eager", fullgraph=True)
            y, _ = run(u)
        found.append([y, *torch.autograd.grad(y.square().sum(), [u, *mixer.parameters()])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@runs_kernels
def test_recomputed_without_a_compiler() -> None:
    """Every saved tensor is looked at once, as recomputation demands."""
    mixer = RodimusConfig(n=16).build(16)
    mixer.init_weights(Initializer())
    mixer = mixer.to(DEVICE)
    u = torch.randn(1, 9, 16, device=DEVICE, requires_grad=True)
    found = []
    with use_backend(conv_gate="triton", tempered_selection="triton", gated_norm="triton", gated_linear="triton"):
        for run in (mixer, partial(recomputed, mixer)):
            y, _ = run(u)
            found.append(torch.autograd.grad(y.square().sum(), [u, *mixer.parameters()]))
    torch.testing.assert_close(found[1], found[0])


@runs_kernels
def test_what_they_cannot_do_is_said() -> None:
    x = torch.zeros(1, 2, 16, device=DEVICE)
    with pytest.raises(UserError, match="a convolution with bias and a gate together"):
        conv_gate(x, None, None, None, backend="triton")
    with pytest.raises(UserError, match="the width 9 is over 8"):
        short_conv(x, x.new_zeros(16, 9), backend="triton")
    with pytest.raises(UserError, match="no float64"):
        gated_norm(x.double(), x, x, x[0, 0], x[0, 0], eps=1.0, backend="triton")
    with pytest.raises(UserError, match="no float64"):
        tempered_selection(x.double(), x.repeat(1, 1, 2), x.new_zeros(32), backend="triton")
    with pytest.raises(UserError, match="logits of g and tau"):
        tempered_selection(x, x, x.new_zeros(16), backend="triton")
    with pytest.raises(UserError, match="takes a feedthrough"):
        gated_norm(x, x, x, None, x[0, 0], eps=1.0, backend="triton")


FP32 = (
    "bias_ptr", "weight_ptr", "feed_ptr", "rstd_ptr", "rstd_out", "up_ptr", "up_bias_ptr", "down_ptr", "sums_out",
    "log_alpha_out", "dlog_alpha_ptr",
)  # fmt: skip
GATE = {"R": 16, "BR": 16, "BM": 64, "STAGES": 2, "PRECISION": "tf32"}
TILE = GATE | {"W": 4, "S": 16, "U": 4}
CONV = {"W": 4, "U": 8, "BIAS": True, "SILU": True}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in the compiler's place")
@pytest.mark.parametrize(
    ("operator", "name", "warps", "constants"),
    [
        ("short_conv", "_forward_kernel", 4, CONV | {"S": 4, "BM": 128, "STATE": True, "PACKED": False}),
        ("short_conv", "_backward_kernel", 4, CONV | {"S": 8, "BM": 64, "STATE": False, "PACKED": True}),
        ("conv_gate", "_forward_kernel", 4, TILE | {"STATE": True, "PACKED": False}),
        ("conv_gate", "_backward_kernel", 4, TILE | {"STATE": False, "PACKED": True}),
        ("conv_gate", "_gate_kernel", 4, GATE | {"BT": 64}),
        ("tempered_selection", "_forward_kernel", 8, {"BN": 32, "BM": 64, "STAGES": 1}),
        ("tempered_selection", "_backward_kernel", 8, {"BN": 32, "BM": 64, "STAGES": 1}),
        ("gated_norm", "_forward_kernel", 8, {"BN": 1, "BM": 4096, "STAGES": 1}),
        ("gated_norm", "_backward_kernel", 16, {"BN": 4, "BM": 1024, "STAGES": 2}),
    ],
)
def test_the_kernels_compile_for_hopper_without_one(
    operator: str, name: str, warps: int, constants: dict[str, int | str]
) -> None:
    """To machine code; the interpreter takes programs that the compiler refuses."""
    kernel = getattr(importlib.import_module(f"rodimus_lab.ops.{operator}.triton"), name)

    def type_of(argument: str) -> str:
        if not argument.endswith(("_ptr", "_out")):
            return "fp32" if argument == "eps" else "i32"
        return "*fp32" if argument in FP32 else "*i32" if argument == "id_ptr" else "*bf16"

    compile_for_hopper(kernel, constants, type_of, num_warps=warps)
