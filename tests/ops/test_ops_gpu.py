"""The operators on a CUDA device, against float64 definitions on the CPU.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from rodimus_lab.ops import (
    Segments,
    attention,
    cross_entropy,
    delta_rule,
    gated_linear,
    short_conv,
    ssd,
    use_backend,
)

pytestmark = pytest.mark.gpu

FP32, BF16 = torch.float32, torch.bfloat16
Leaves = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other libraries' kernels choose among about four candidates each: what is tested here is what they compute, and
    compiling all would take minutes.
    """
    from triton.runtime.autotuner import Autotuner

    every = Autotuner.prune_configs

    def few(self: Any, arguments: Any) -> list[Any]:
        configs = every(self, arguments)
        return configs[:: max(1, len(configs) // 4)]

    monkeypatch.setattr(Autotuner, "prune_configs", few)


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return ((got - want).norm() / want.norm().clamp(min=1e-12)).item()


def on_cuda(leaves: Leaves, dtype: torch.dtype, narrow: tuple[str, ...]) -> Leaves:
    """Copies on the device: those in `narrow` in `dtype`, the others in float32."""
    return {
        name: x.detach().to("cuda", dtype if name in narrow else FP32).requires_grad_() for name, x in leaves.items()
    }


def values_and_gradients(run: Any, leaves: Leaves) -> dict[str, Tensor]:
    outputs = run(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for x in outputs:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        total = total + (x.double() * weight).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    named = {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {f"output {index}": x for index, x in enumerate(outputs)} | named


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert all(error <= tolerance for error in errors.values()), errors


def recurrence(length: int = 257, K: int = 64, V: int = 128, mean_log_alpha: float = -0.05) -> Leaves:
    shapes = {"q_BTHK": K, "k_BTHK": K, "v_BTHV": V}
    # Rounded to bf16 first, so that every precision starts from the same numbers.
    leaves = {name: torch.randn(2, length, 2, width).bfloat16().double() for name, width in shapes.items()}
    leaves["log_alpha_BTHK"] = (2 * mean_log_alpha * torch.rand(2, length, 2, K)).double()
    leaves["state_BHKV"] = torch.randn(2, 2, K, V).double()
    return {name: x.requires_grad_() for name, x in leaves.items()}


def scan(backend: str, segments: Segments | None = None) -> Any:
    return lambda **leaves: gated_linear(**leaves, scale=0.125, segments=segments, backend=backend)


def ids(length: int) -> Tensor:
    index = torch.arange(length)
    rows = [(index >= 100).long() + (index >= 130).long(), (index >= 64).long()]
    rows[0][:5] = -1
    return torch.stack(rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mean_log_alpha", [-0.05, -10.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-4), (BF16, 1e-2)])
def test_chunked_recurrence(dtype: torch.dtype, tolerance: float, mean_log_alpha: float, packed: bool) -> None:
    leaves = recurrence(mean_log_alpha=mean_log_alpha)
    want = values_and_gradients(scan("naive", Segments(ids(257)) if packed else None), leaves)
    device_ids = Segments(ids(257).cuda()) if packed else None
    got = values_and_gradients(scan("chunked", device_ids), on_cuda(leaves, dtype, ("q_BTHK", "k_BTHK", "v_BTHV")))
    assert relative_error(got["output 0"], want["output 0"]) <= min(tolerance, 5e-3)
    assert_close(got, want, tolerance)


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed")
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 5e-3), (BF16, 2e-2)])
def test_fla_recurrence(dtype: torch.dtype, tolerance: float) -> None:
    """Its kernels take products in TF32 where the inputs are float32."""
    leaves = recurrence(length=256)
    got = values_and_gradients(scan("fla"), on_cuda(leaves, dtype, ("q_BTHK", "k_BTHK", "v_BTHV")))
    assert_close(got, values_and_gradients(scan("naive"), leaves), tolerance)


@pytest.mark.parametrize("package", ["fla", "causal_conv1d"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-4), (BF16, 1e-2)])
def test_peers_short_convolutions(dtype: torch.dtype, tolerance: float, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    leaves = {"x_BTD": (2, 100, 24), "weight_DW": (24, 4), "bias_D": (24,)}
    leaves = {name: torch.randn(shape).bfloat16().double().requires_grad_() for name, shape in leaves.items()}
    got = values_and_gradients(
        lambda **x: short_conv(**x, silu=True, backend=package), on_cuda(leaves, dtype, ("x_BTD",))
    )
    assert_close(got, values_and_gradients(lambda **x: short_conv(**x, silu=True, backend="taps"), leaves), tolerance)


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
@pytest.mark.parametrize("T", [100, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 5e-3), (BF16, 2e-2)])
def test_mamba_ssm_duality(dtype: torch.dtype, tolerance: float, T: int) -> None:
    """With an initial and a final state; as the one above, in TF32."""
    shapes = {"x_BTHP": (2, T, 4, 64), "B_BTN": (2, T, 128), "C_BTN": (2, T, 128), "state_BHNP": (2, 4, 128, 64)}
    leaves = {name: torch.randn(shape).bfloat16().double() for name, shape in shapes.items()}
    leaves |= {"dt_BTH": 0.1 * torch.rand(2, T, 4).double(), "A_H": -1 - torch.rand(4).double()}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    got = values_and_gradients(
        lambda **x: ssd(**x, backend="mamba_ssm"), on_cuda(leaves, dtype, ("x_BTHP", "B_BTN", "C_BTN"))
    )
    with use_backend(gated_linear="naive"):
        want = values_and_gradients(lambda **x: ssd(**x, backend="gated_linear"), leaves)
    assert_close(got, want, tolerance)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_compiled_recurrence_equals_eager(dtype: torch.dtype) -> None:
    leaves = on_cuda(recurrence(), dtype, ("q_BTHK", "k_BTHK", "v_BTHV"))
    eager = values_and_gradients(scan("chunked"), leaves)
    compiled = values_and_gradients(torch.compile(scan("chunked"), fullgraph=True), leaves)
    assert_close(compiled, eager, 1e-5 if dtype == FP32 else 1e-2)


def delta_leaves(form: str, length: int = 257, K: int = 64, V: int = 128) -> Leaves:
    """With one gate a head, one a key channel, or an a and b of their own, as Gated DeltaNet, KDA and RWKV-7 have."""
    leaves = recurrence(length, K, V)
    heads = leaves["q_BTHK"].shape[:3]
    unit = torch.nn.functional.normalize(leaves["k_BTHK"].detach(), dim=-1).bfloat16().double()
    if form == "general":
        rate = torch.rand(*heads, K).double()
        leaves |= {"a_BTHK": (unit * rate).bfloat16().double(), "b_BTHK": -unit, "k_BTHK": 0.1 * leaves["k_BTHK"]}
    else:
        leaves |= {"k_BTHK": unit, "beta_BTH": torch.rand(heads).bfloat16().double()}
    if form == "gated":
        leaves["log_alpha_BTHK"] = leaves["log_alpha_BTHK"][..., :1]
    return {name: x.detach().requires_grad_() for name, x in leaves.items()}


@pytest.mark.parametrize("form", ["gated", "keywise", "general"])
@pytest.mark.parametrize(("backend", "tolerance"), [("chunked", 1e-2), ("fla", 2e-2)])
def test_delta_rule(backend: str, tolerance: float, form: str) -> None:
    if backend == "fla" and importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")

    def run(backend: str) -> Any:
        return lambda **leaves: delta_rule(**leaves, scale=0.125, backend=backend)

    leaves = delta_leaves(form)
    narrow = tuple(name for name in leaves if name[0] in "qkvab")
    got = values_and_gradients(run(backend), on_cuda(leaves, BF16, narrow))
    assert_close(got, values_and_gradients(run("naive"), leaves), tolerance)


@pytest.mark.parametrize("backend", ["sdpa", "flex", "flash_attn"])
@pytest.mark.parametrize("window", [None, 256])
def test_attention(backend: str, window: int | None) -> None:
    """Shared-key heads of width 128 over 512 tokens, in bf16."""
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    heads = {"q_BTHK": 4, "k_BTGK": 1, "v_BTJV": 4}
    leaves = {
        name: torch.randn(2, 512, count, 128).bfloat16().double().requires_grad_() for name, count in heads.items()
    }

    def run(backend: str) -> Any:
        return lambda **leaves: attention(**leaves, window=window, backend=backend)[0]

    want = values_and_gradients(run("naive"), leaves)
    assert_close(values_and_gradients(run(backend), on_cuda(leaves, BF16, tuple(heads))), want, 1e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-4), (BF16, 1e-2)])
def test_cross_entropy(dtype: torch.dtype, tolerance: float, reduction: Any, bias: bool) -> None:
    """A vocabulary that is no multiple of 64, so that the padding inside is at work."""
    leaves = {"x_ND": torch.randn(300, 64), "weight_VD": 0.1 * torch.randn(1001, 64)}
    if bias:
        leaves["bias_V"] = torch.randn(1001)
    leaves = {name: x.bfloat16().double().requires_grad_() for name, x in leaves.items()}
    targets = torch.randint(0, 1001, (300,))
    targets[::7] = -100

    def run(backend: str, targets: Tensor) -> Any:
        return lambda **leaves: cross_entropy(**leaves, targets_N=targets, reduction=reduction, backend=backend)

    want = values_and_gradients(run("naive", targets), leaves)
    got = values_and_gradients(run("chunked", targets.cuda()), on_cuda(leaves, dtype, ("x_ND", "weight_VD")))
    assert_close(got, want, tolerance)


@pytest.mark.parametrize("packed", [False, True])
def test_short_conv(packed: bool) -> None:
    leaves = {"x_BTD": torch.randn(2, 257, 24), "weight_DW": torch.randn(24, 4), "bias_D": torch.randn(24)}
    leaves = {name: x.double().requires_grad_() for name, x in leaves.items()}

    def run(device: str) -> Any:
        segments = Segments(ids(257).to(device)) if packed else None
        kept = (ids(257) >= 0).to(device).unsqueeze(-1) if packed else 1  # What padding itself gives is arbitrary.

        def convolve(**leaves: Tensor) -> tuple[Tensor, Tensor]:
            y_BTD, state_BWD = short_conv(**leaves, segments=segments)
            return y_BTD * kept, state_BWD

        return convolve

    got = values_and_gradients(run("cuda"), on_cuda(leaves, FP32, ()))
    assert_close(got, values_and_gradients(run("cpu"), leaves), 1e-5)
