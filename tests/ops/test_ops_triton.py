"""The Triton kernels against the naive recurrence in float64: in Triton's interpreter on a CPU, for real on a GPU."""

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
from rodimus_lab.ops import Segments, gated_linear

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
runs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="in the interpreter, by the first test here")
TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.float16: (2e-3, 5e-3), torch.bfloat16: (5e-3, 1e-2)}
NAMES = ("o", "state", "dq", "dk", "dv", "dgate", "dstate")


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_kernels_in_the_interpreter() -> None:
    """In a process of its own: triton must see the variable when it is first imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:]


def errors(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    *,
    documents: str = "",
    gate: float = 1.0,
    forgotten: float = 0.0,
) -> dict[str, float]:
    """||triton - naive|| / ||naive|| of outputs and gradients, the naive ones in float64 on the same inputs."""
    B, T, H, K, V = shape
    generator = torch.Generator().manual_seed(T + K + V)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    tensors = [normal(B, T, H, K), normal(B, T, H, K) / K**0.5, normal(B, T, H, V)]
    tensors = [x.to(dtype) for x in tensors]
    log_alpha = -gate * torch.nn.functional.softplus(normal(B, T, H, K) - 1).float()
    if forgotten:  # Here and there, amid mild gates, one that leaves nothing.
        log_alpha[normal(B, T, H, K) > 1.3] = -forgotten
    tensors += [log_alpha, normal(B, H, K, V).float()]
    do, dstate = normal(B, T, H, V).to(dtype), normal(B, H, K, V).float()
    segments = None
    if documents == "packed":
        segments = Segments(torch.randint(0, 4, (B, T), generator=generator).sort(dim=1).values)
    elif documents == "padded":
        segments = Segments.from_mask((torch.arange(T) >= torch.arange(B).unsqueeze(1) * 5).long())

    def run(backend: str, device: str, cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [cast(x).to(device).clone().requires_grad_() for x in tensors]
        q, k, v, log_alpha, state = leaves
        placed = None if segments is None else Segments(segments.ids_BT.to(device))
        o, final = gated_linear(q, k, v, log_alpha, scale=0.3, state_BHKV=state, segments=placed, backend=backend)
        loss = (o.to(final.dtype) * cast(do).to(device, final.dtype)).sum() + (final * cast(dstate).to(device)).sum()
        loss.backward()
        return [x.detach().cpu().double() for x in (o, final, *[leaf.grad for leaf in leaves])]

    want, got = run("naive", DEVICE, Tensor.double), run("triton", DEVICE, lambda x: x)
    return {name: ((a - b).norm() / (b.norm() or 1.0)).item() for name, a, b in zip(NAMES, got, want, strict=True)}


def check(found: dict[str, float], dtype: torch.dtype) -> None:
    forward, backward = TOLERANCE[dtype]
    wrong = {n: e for n, e in found.items() if not e <= (backward if n.startswith("d") else forward)}
    assert not wrong, wrong


@runs_kernels
@pytest.mark.parametrize("documents", ["", "packed", "padded"])
@pytest.mark.parametrize("length", [1, 70])
def test_float32_at_odd_lengths(length: int, documents: str) -> None:
    check(errors((2, length, 1, 16, 24), torch.float32, documents=documents), torch.float32)


@runs_kernels
@pytest.mark.parametrize(("key_width", "value_width"), [(20, 40), (128, 33)])
def test_float32_at_odd_widths(key_width: int, value_width: int) -> None:
    check(errors((1, 17, 2, key_width, value_width), torch.float32), torch.float32)


@runs_kernels
@pytest.mark.parametrize("forgotten", [20.0, 1e4])
def test_gates_that_forget_at_once(forgotten: float) -> None:
    check(errors((1, 80, 1, 16, 16), torch.float32, forgotten=forgotten, documents="packed"), torch.float32)


@runs_kernels
@pytest.mark.parametrize("gate", [0.01, 2.0, 5.0, 40.0])
def test_groups_of_every_size(gate: float) -> None:
    """The more is forgotten, the fewer tokens one product may take together."""
    check(errors((2, 64, 1, 16, 16), torch.float32, gate=gate), torch.float32)


@runs_kernels
@pytest.mark.parametrize("length", [70, 1100])
def test_parts_of_wider_tensors_without_states(length: int) -> None:
    """As a mixer in training calls it: nothing is asked of the last state, and none comes in."""
    torch.manual_seed(0)
    wide, v = torch.randn(2, length, 56, device=DEVICE), torch.randn(2, length, 1, 24, device=DEVICE)
    gate = -torch.rand(2, length, 1, 16, device=DEVICE)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (wide, v, gate)]
        q, _, k, _ = leaves[0].split([16, 16, 16, 8], dim=-1)
        o, state = gated_linear(q.unsqueeze(2), k.unsqueeze(2), *leaves[1:], last_state=False, backend=backend)
        assert state.numel() == 0
        return [o, *torch.autograd.grad(o.square().sum(), leaves)]

    for got, want in zip(run("triton", torch.float32), run("naive", torch.float64), strict=True):
        assert (got.double() - want).norm() <= 1e-3 * want.norm()


@runs_kernels
def test_strides_of_one_token_and_of_a_state() -> None:
    """torch calls a tensor of one token contiguous whatever its stride there; padded keys keep a state's order."""
    torch.manual_seed(0)
    q, k = (torch.randn(3, 2, 1, 24, device=DEVICE).transpose(1, 2) for _ in range(2))
    v, gate = torch.randn(3, 1, 2, 16, device=DEVICE), -torch.rand(3, 1, 2, 24, device=DEVICE)
    state = torch.randn(3, 24, 16, 2, device=DEVICE).permute(0, 3, 1, 2)
    for length in (1, 5):
        inputs = [x.expand(-1, length, -1, -1) for x in (q, k, v, gate)]
        got = gated_linear(*inputs, state_BHKV=state, backend="triton")
        want = gated_linear(*(x.double() for x in inputs), state_BHKV=state.double(), backend="naive")
        for a, b in zip(got, want, strict=True):
            assert (a.double() - b).norm() <= 1e-4 * b.norm()


@runs_kernels
@pytest.mark.parametrize("documents", ["", "packed"])
def test_time_is_split_where_little_else_is(documents: str) -> None:
    from rodimus_lab.ops.gated_linear.triton import _plan_of

    shape = (1, 1100, 1, 16, 16)
    q = torch.empty(shape[:4], device=DEVICE)
    assert _plan_of(q, q, None).stretches(directions=2)[0] > 1
    check(errors(shape, torch.float32, documents=documents, gate=0.05), torch.float32)


@runs_kernels
def test_float16() -> None:
    check(errors((1, 66, 1, 32, 48), torch.float16), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("documents", ["", "packed"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1000, 1, 64, 4096),
        (4, 512, 1, 32, 1024),
        (2, 777, 4, 128, 256),
        (1, 300, 2, 256, 128),
        (1, 16384, 1, 64, 256),
    ],
)
def test_bfloat16_at_real_shapes(shape: tuple[int, int, int, int, int], documents: str) -> None:
    check(errors(shape, torch.bfloat16, documents=documents, gate=3.0), torch.bfloat16)


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 700, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 700, 1, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gate = -torch.rand(2, 700, 1, 64, device="cuda")
    runs = []
    for _ in range(3):
        o, state = gated_linear(q, k, v, gate, backend="triton")
        runs.append([o, state, *torch.autograd.grad(o.float().square().sum(), (q, k, v))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@runs_kernels
@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocab", [37, 64, 9000])
def test_losses_of_logits_and_their_gradients_in_place(vocab: int, bias: bool, differentiate: bool) -> None:
    """Rows with padding, longer than a block, and targets that do not count."""
    from rodimus_lab.ops.cross_entropy.triton import losses_and_gradient

    width, targets = -(-vocab // 64) * 64, torch.randint(0, vocab, (6,), device=DEVICE)
    targets[2] = -100
    logits = 4 * torch.randn(6, width, device=DEVICE)
    shift = torch.randn(width, device=DEVICE) if bias else None
    wide = (logits if shift is None else logits + shift)[:, :vocab].double().requires_grad_()
    want = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    (gradient,) = torch.autograd.grad(want.sum(), wide)
    given = logits.clone()
    losses, _ = losses_and_gradient(given, targets, shift, vocab, -100, differentiate)
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-5, atol=1e-5)
    if not differentiate:
        assert torch.equal(given, logits)
        return
    torch.testing.assert_close(given[:, :vocab].double(), gradient, rtol=1e-5, atol=1e-6)
    assert not given[:, vocab:].any()


@runs_kernels
def test_what_it_cannot_do_is_said() -> None:
    q = torch.zeros(1, 2, 1, 16, device=DEVICE)
    with pytest.raises(UserError, match="no value gate"):
        gated_linear(q, q, q, -torch.ones_like(q), -torch.ones_like(q), backend="triton")
    with pytest.raises(UserError, match="no float64"):
        gated_linear(q.double(), q.double(), q.double(), None, backend="triton")


FLOAT32 = (
    "losses",
    "dstart",
    "dend",
    "gate",
    "decay",
    "sum",
    "start",
    "state",
    "end",
    "dscore",
    "ddecay",
    "dgate",
    "dq",
    "dk",
)
NARROW = {"H": 1, "K": 32, "BK": 32, "KB": 32, "C": 64, "LEVELS": 6, "PACKED": True, "PRECISION": "tf32"}
WIDE = {"H": 1, "BK": 64, "BV": 128, "C": 64, "PRECISION": "tf32"}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in the compiler's place")
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_prepare_kernel", NARROW),
        ("_walk_kernel", WIDE | {"ZERO": True, "KEEP": True}),
        ("_states_kernel", WIDE | {"D": 2, "KEEP": True, "ZERO": False, "DZERO": True, "END": False, "DEND": True}),
        ("_chunk_backward_kernel", WIDE | {"BV": 64}),
        ("_narrow_backward_kernel", NARROW),
        ("_cross_entropy_kernel", {"V": 50265, "P": 50304, "BLOCK": 8192, "BIAS": False, "DIFFERENTIATE": True}),
    ],
)
def test_the_kernels_compile_for_hopper_without_one(name: str, constants: dict[str, Any]) -> None:
    """To machine code; the interpreter takes programs that the compiler refuses."""
    import triton

    operator = "cross_entropy" if name == "_cross_entropy_kernel" else "gated_linear"
    kernel = getattr(importlib.import_module(f"rodimus_lab.ops.{operator}.triton"), name)
    if "DOT" in kernel.arg_names:
        constants = constants | {"DOT": triton.language.bfloat16}

    def type_of(argument: str) -> str:
        if not argument.endswith(("_ptr", "_out")):
            return "fp32" if argument == "scale" else "i32"
        whole = {"document_ptr": "*i32", "targets_ptr": "*i64"}
        return whole.get(argument, "*fp32" if argument[:-4] in FLOAT32 else "*bf16")

    compile_for_hopper(kernel, constants, type_of)
