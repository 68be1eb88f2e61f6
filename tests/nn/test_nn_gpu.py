"""Whole models on a CUDA device: compiled block by block against eager, and against the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rodimus_lab.nn.zoo import Size, build_model

pytestmark = pytest.mark.gpu

TINY = Size("tiny", num_layers=1, d_model=128, num_heads=2, vocab_size=1000, context=256)
NAMES = ("rodimus", "rodimus+", "transformer++")


def loss_and_gradients(model: Any, ids: Tensor, autocast: bool) -> list[Tensor]:
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def relative_errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(got, want, strict=True)]
    return [((a - b).norm() / b.norm().clamp(min=1e-8)).item() for a, b in pairs]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["rodimus+"])  # every sublayer of the others is in it, and compiling takes long
def test_compiled_blocks_equal_eager_ones(name: str, autocast: bool) -> None:
    model = build_model(name, size=TINY).cuda()
    ids = torch.randint(0, 1000, (2, 257), device="cuda")
    eager = loss_and_gradients(model, ids, autocast)
    for block in model.blocks:
        block.compile(fullgraph=True)
    compiled = loss_and_gradients(model, ids, autocast)
    assert max(relative_errors(compiled, eager)) < (5e-2 if autocast else 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_device_agrees_with_the_cpu(name: str) -> None:
    model = build_model(name, size=TINY)
    ids = torch.randint(0, 1000, (2, 257))
    wide = model.double()
    want = wide.loss(ids[:, :-1], ids[:, 1:])
    want.backward()
    expected = [want.detach(), *(parameter.grad.clone() for parameter in wide.parameters())]
    got = loss_and_gradients(model.float().cuda(), ids.cuda(), autocast=False)
    assert max(relative_errors(got, expected)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_decoding_agrees_with_one_pass(name: str, dtype: torch.dtype) -> None:
    model = build_model(name, size=TINY).to("cuda", dtype).eval()
    ids = torch.randint(0, 1000, (2, 160), device="cuda")
    want, _ = model(ids)
    logits, state = model(ids[:, :150], model.init_state(2, context=160))
    parts = [logits]
    for t in range(150, 160):
        logits, state = model(ids[:, t : t + 1], state)
        parts.append(logits)
    error = (torch.cat(parts, dim=1) - want).norm() / want.norm()
    assert error < (1e-4 if dtype == torch.float32 else 3e-2)
