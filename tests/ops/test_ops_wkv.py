"""RWKV-4's weighted means: every backend against softmaxes in float64; the kernels in Triton's interpreter on a CPU,
for real on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from hopper import compile_for_hopper
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops import Segments, wkv

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="in the interpreter, by the first test here")
BACKENDS = ("naive", "scan", pytest.param("triton", marks=KERNELS))


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_kernels_in_the_interpreter() -> None:
    """In a process of its own: triton must see the variable when it is first imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:]


def by_hand(k: Tensor, v: Tensor, log_w: Tensor, bonus: Tensor) -> Tensor:
    """The weighted means, each by a softmax over the tokens so far."""
    outputs = []
    for t in range(k.shape[1]):
        age = torch.arange(t - 1, -1, -1, dtype=k.dtype)[None, :, None]
        exponents = torch.cat([k[:, :t] + age * log_w, (k[:, t] + bonus)[:, None]], dim=1)
        outputs.append((exponents.softmax(1) * v[:, : t + 1]).sum(1))
    return torch.stack(outputs, dim=1)


def inputs(batch: int, length: int, channels: int, size: float = 1.0, mean: float = 0.0) -> list[Tensor]:
    k, v = size * torch.randn(batch, length, channels).double(), mean + torch.randn(batch, length, channels).double()
    return [k, v, -torch.logspace(-6, 6, channels).double(), torch.randn(channels).double()]


def check(leaves: list[Tensor], backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs and all gradients, each by its largest."""
    leaves = [leaves[0].to(dtype).double(), leaves[1].to(dtype).double(), *leaves[2:]]
    weight = torch.randn(leaves[1].shape).to(dtype).double()

    def with_gradients(run, leaves: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        o = run(*leaves)
        gradients = torch.autograd.grad((o * weight.to(o)).sum(), leaves, materialize_grads=True)
        return [x.detach().cpu().double() for x in (o, *gradients)]

    want = with_gradients(by_hand, leaves)
    wide = torch.promote_types(dtype, torch.float32)
    cast = [x.to(DEVICE, dtype if index < 2 else wide) for index, x in enumerate(leaves)]
    got = with_gradients(lambda *x: wkv(*x, last_state=False, backend=backend)[0], cast)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 8, 37])
def test_float32(length: int, backend: str) -> None:
    check(inputs(3, length, 6), backend, torch.float32, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_far_from_0_in_16_bits(backend: str) -> None:
    """The gradients are of differences from the mean."""
    check(inputs(2, 200, 6, mean=5.0), backend, torch.float16, 4e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [300.0, 1e5])
def test_any_key_is_held(size: float, backend: str) -> None:
    check(inputs(2, 37, 6, size), backend, torch.float32, math.inf)
    if backend != "triton":
        check(inputs(2, 37, 6, size), backend, torch.float64, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_channels_than_a_block(backend: str) -> None:
    check(inputs(2, 11, 150), backend, torch.float32, 1e-4)


@pytest.mark.gpu
def test_triton_at_real_shapes() -> None:
    check(inputs(64, 256, 512), "triton", torch.bfloat16, 2e-2)
    check(inputs(8, 300, 64), "triton", torch.float32, 1e-4)


@pytest.mark.gpu
def test_triton_gives_the_same_bits_every_time() -> None:
    leaves = [x.float().cuda().requires_grad_() for x in inputs(32, 200, 256)]
    runs = []
    for _ in range(3):
        o, _, _ = wkv(*leaves, last_state=False, backend="triton")
        runs.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("backend", ["naive", "scan"])
def test_a_new_document_forgets_larger_keys_than_its_own(backend: str) -> None:
    k = torch.cat([torch.full((1, 5, 2), 500.0), torch.randn(1, 6, 2) - 500], dim=1)
    v, log_w, bonus = torch.randn(1, 11, 2), torch.full((2,), -1e-3), torch.zeros(2)
    got, sums, _ = wkv(k, v, log_w, bonus, segments=Segments.from_lengths([5, 6]), backend=backend)
    want, want_sums, _ = wkv(k[:, 5:], v[:, 5:], log_w, bonus, backend=backend)
    torch.testing.assert_close((got[:, 5:], sums), (want, want_sums))


def test_padding_leaves_the_state_alone() -> None:
    k, v, log_w, bonus = inputs(2, 9, 5)
    padded = Segments.from_mask((torch.arange(9) >= torch.tensor([[0], [4]])).long())
    (o, sums, top), (want, want_sums, want_top) = (
        wkv(k, v, log_w, bonus, segments=padded, backend=backend) for backend in ("scan", "naive")
    )
    torch.testing.assert_close(o[padded.valid_BT], want[padded.valid_BT])
    torch.testing.assert_close(sums[..., 1].log() + top, want_sums[..., 1].log() + want_top)


@pytest.mark.parametrize("backend", ["naive", "scan"])
def test_the_state_goes_on(backend: str) -> None:
    k, v, log_w, bonus = inputs(2, 20, 5)
    want, want_sums, want_top = wkv(k, v, log_w, bonus, backend="scan")
    first, sums, top = wkv(k[:, :13], v[:, :13], log_w, bonus, backend=backend)
    second, sums, top = wkv(k[:, 13:], v[:, 13:], log_w, bonus, sums, top, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], dim=1), want)
    torch.testing.assert_close(
        (sums.log() + top.unsqueeze(-1))[..., 1], (want_sums.log() + want_top.unsqueeze(-1))[..., 1]
    )


@KERNELS
def test_what_triton_cannot_do_is_said() -> None:
    k, v, log_w, bonus = (x.float().to(DEVICE) for x in inputs(1, 4, 3))
    with pytest.raises(UserError, match="it takes no state and gives none"):
        wkv(k, v, log_w, bonus, backend="triton")
    with pytest.raises(UserError, match="no float64"):
        wkv(k.double(), v.double(), log_w, bonus, last_state=False, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in the compiler's place")
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
def test_triton_kernels_compile_for_hopper_without_one(name: str) -> None:
    """To machine code; the interpreter takes programs that the compiler refuses."""
    pytest.importorskip("triton")
    float32 = {"log_w_ptr", "bonus_ptr", "log_ptr", "log_out", "sums_out", "o_ptr", "o_out", "do_ptr"}

    def type_of(argument: str) -> str:
        if not argument.endswith(("_ptr", "_out")):
            return "i32"
        return "*fp32" if argument in float32 else "*bf16"

    kernel = getattr(importlib.import_module("rodimus_lab.ops.wkv.triton"), name)
    compile_for_hopper(kernel, {"BD": 64, "U": 8}, type_of, num_warps=1)
