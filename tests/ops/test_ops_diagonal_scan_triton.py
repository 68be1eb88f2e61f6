"""The diagonal recurrences' Triton kernels against the definitions in float64: in Triton's interpreter on a CPU, for
real on a GPU.

Shapes: B batch, T time, M channels, N state expansion.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hopper import compile_for_hopper
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops import Segments, diagonal_scan, selective_scan

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
runs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="in the interpreter, by the first test here")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_kernels_in_the_interpreter() -> None:
    """In a process of its own: triton must see the variable when it is first imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:]


def segments_for(kind: str, batch: int, length: int) -> Segments | None:
    if kind == "packed":
        return Segments(torch.randint(0, 4, (batch, length)).sort(dim=1).values)
    if kind == "padded":
        return Segments.from_mask((torch.arange(length) >= torch.arange(batch).unsqueeze(1) * 5).long())
    return None


def check(
    operator: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32, kind: str = ""
) -> None:
    """Outputs and gradients, by their norms; inputs that are not gates or states come in `dtype`."""
    inputs = {name: x.to(dtype) if name[0] in "xuBC" else x for name, x in inputs.items()}
    first = next(iter(inputs.values()))
    segments = segments_for(kind, *first.shape[:2])
    generator = torch.Generator().manual_seed(1)

    def run(backend: str, cast: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        leaves = {name: cast(x).to(DEVICE).clone().requires_grad_() for name, x in inputs.items()}
        placed = None if segments is None else Segments(segments.ids_BT.to(DEVICE))
        o, state = operator(**leaves, segments=placed, backend=backend)
        generator.manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).to(DEVICE) for x in (o, state)]
        (o * cast(weights[0]).to(o.dtype)).sum().add((state * weights[1]).sum()).backward()
        gradients = {f"d_{name}": x.grad for name, x in leaves.items()}
        return {name: x.detach().cpu().double() for name, x in ({"o": o, "state": state} | gradients).items()}

    want, got = run("naive", Tensor.double), run("triton", lambda x: x)
    errors = {name: ((got[name] - x).norm() / (x.norm() or 1.0)).item() for name, x in want.items()}
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    assert not wrong, wrong


def diagonal(batch: int, length: int, *channels: int, gate: float = 1.0) -> dict[str, Tensor]:
    return {
        "x_BTX": torch.randn(batch, length, *channels),
        "log_a_BTX": -gate * torch.rand(batch, length, *channels),
        "state_BX": torch.randn(batch, *channels),
    }


def selective(batch: int, length: int, M: int, N: int, *, fixed: str = "", gate: float = 1.0) -> dict[str, Tensor]:
    """`fixed` names what is constant in time."""
    return {
        "u_BTM": torch.randn(batch, length, M),
        "dt_BTM": gate * torch.rand(batch, length, M),
        "A_MN": -torch.rand(M, N),
        "B": torch.randn(M, N) if "B" in fixed else torch.randn(batch, length, N),
        "C": torch.randn(M, N) if "C" in fixed else torch.randn(batch, length, N),
        "state_BMN": torch.randn(batch, M, N),
    }


@runs_kernels
@pytest.mark.parametrize("kind", ["", "packed", "padded"])
@pytest.mark.parametrize("length", [1, 70])
def test_the_diagonal_scan(length: int, kind: str) -> None:
    check(diagonal_scan, diagonal(2, length, 5, 30), kind=kind)


@runs_kernels
@pytest.mark.parametrize("kind", ["", "packed", "padded"])
@pytest.mark.parametrize(("length", "channels"), [(1, 37), (21, 37), (24, 32), (128, 16)])
def test_the_selective_scan(length: int, channels: int, kind: str) -> None:
    """With tokens, channels and states left over, and without."""
    check(selective_scan, selective(2, length, channels, 16, gate=2 / length), kind=kind)


@runs_kernels
@pytest.mark.parametrize("fixed", ["B", "C", "B C"])
def test_what_is_constant_in_time(fixed: str) -> None:
    check(selective_scan, selective(2, 20, 20, 5, fixed=fixed), kind="packed")


@runs_kernels
@pytest.mark.parametrize("kind", ["", "packed"])
def test_time_is_split_where_little_else_is(kind: str) -> None:
    from rodimus_lab.ops.diagonal_scan.stretches import split

    for multiple in (1, 8):
        stretches, tokens = split(131, 2, multiple, on_gpu=ON_GPU)
        assert stretches == 2
        assert tokens % multiple == 0
        assert tokens < 131 <= 2 * tokens
    check(diagonal_scan, diagonal(2, 131, 8, gate=0.02), kind=kind)
    check(selective_scan, selective(1, 131, 4, 4, gate=0.02, fixed="B" if kind else ""), kind=kind)


@runs_kernels
def test_gates_of_nothing_and_of_one() -> None:
    inputs = diagonal(1, 110, 6)
    inputs["log_a_BTX"][:, :, 0] = 0.0
    inputs["log_a_BTX"][:, 30, 1:] = float("-inf")
    inputs["log_a_BTX"][:, 100, 2:] = -1e30
    check(diagonal_scan, inputs)
    inputs = selective(1, 20, 6, 3)
    inputs["dt_BTM"][:, 10] = 1e5
    inputs["dt_BTM"][:, :, 2] = 0.0
    check(selective_scan, inputs)


@runs_kernels
def test_bfloat16() -> None:
    check(diagonal_scan, diagonal(1, 40, 20), torch.bfloat16)
    check(selective_scan, selective(1, 40, 20, 16), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["", "packed"])
def test_real_shapes(kind: str) -> None:
    check(diagonal_scan, diagonal(8, 2048, 1024, gate=0.1), kind=kind)
    check(selective_scan, selective(4, 2048, 1536, 16, gate=0.1), kind=kind)
    check(selective_scan, selective(8, 512, 1024, 16, gate=0.1), torch.bfloat16, kind=kind)


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    for operator, inputs in ((diagonal_scan, diagonal(2, 700, 512)), (selective_scan, selective(2, 700, 512, 16))):
        leaves = {name: x.cuda().requires_grad_() for name, x in inputs.items()}
        runs = []
        for _ in range(3):
            o, state = operator(**leaves, backend="triton")
            runs.append([o, state, *torch.autograd.grad(o.square().sum(), list(leaves.values()))])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@runs_kernels
def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="no float64"):
        diagonal_scan(**{name: x.double().to(DEVICE) for name, x in diagonal(1, 2, 3).items()}, backend="triton")
    with pytest.raises(UserError, match="state expansion 65 is over 64"):
        selective_scan(**{name: x.to(DEVICE) for name, x in selective(1, 2, 3, 65).items()}, backend="triton")


BLOCKS = {"M": 1000, "N": 15, "BM": 16, "BN": 16, "CHUNK": 8, "EVEN": False}
BLOCKS |= {"VARIES_B": True, "VARIES_C": True, "PACKED": True, "KEEP": True}
NARROW = {"x_ptr", "h_ptr", "h_out", "dh_ptr", "dx_out", "u_ptr", "y_out", "dy_ptr", "du_out", "B_ptr", "C_ptr"}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in the compiler's place")
@pytest.mark.parametrize(
    ("file", "name", "constants"),
    [
        ("triton", "_walk_kernel", {"BX": 128, "KEEP": True}),
        ("triton", "_walk_kernel", {"BX": 128, "KEEP": False}),
        ("triton", "_backward_kernel", {"BX": 128, "KEEP": True}),
        ("triton", "_backward_kernel", {"BX": 128, "KEEP": False}),
        ("selective_triton", "_forward_kernel", BLOCKS),
        ("selective_triton", "_forward_kernel", BLOCKS | {"KEEP": False, "VARIES_B": False, "PACKED": False}),
        ("selective_triton", "_reverse_kernel", BLOCKS),
        ("selective_triton", "_backward_kernel", BLOCKS),
        ("selective_triton", "_backward_kernel", BLOCKS | {"M": 1024, "N": 16, "EVEN": True}),
        ("selective_triton", "_backward_kernel", BLOCKS | {"VARIES_B": False, "VARIES_C": False}),
    ],
)
def test_the_kernels_compile_for_hopper_without_one(file: str, name: str, constants: dict[str, Any]) -> None:
    """To machine code; the interpreter takes programs that the compiler refuses."""
    kernel = getattr(importlib.import_module(f"rodimus_lab.ops.diagonal_scan.{file}"), name)

    def type_of(argument: str) -> str:
        if not argument.endswith(("_ptr", "_out")):
            return "i32"
        return "*i8" if argument == "starts_ptr" else "*bf16" if argument in NARROW else "*fp32"

    own = {key: value for key, value in constants.items() if key in kernel.arg_names}
    compile_for_hopper(kernel, own, type_of, num_warps=4 if file == "triton" else 1)
