"""The embedding's own gradient, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rodimus_lab.nn.embedding import FILLER, PARTS, Embedding, look_up


def both_gradients(ids: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    gradients = []
    for lookup in (look_up, torch.nn.functional.embedding):
        leaf = weight.clone().requires_grad_()
        y = lookup(ids, leaf)
        gradients += [y.detach(), *torch.autograd.grad(y, leaf, dy)]
    return gradients


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, PARTS)])
@pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
def test_equals_torchs(shape: tuple[int, int], share: float) -> None:
    ids = torch.randint(1, 40, shape).masked_fill(torch.rand(shape) < share, FILLER)
    weight, dy = torch.randn(40, 6, dtype=torch.float64), torch.randn(*shape, 6, dtype=torch.float64)
    y, grad, y_expected, expected = both_gradients(ids, weight, dy)
    assert torch.equal(y, y_expected)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_compiled() -> None:
    ids, dy = torch.randint(0, 3, (2, 7)), torch.randn(2, 7, 6)
    weight = torch.randn(40, 6, requires_grad=True)
    y = torch.compile(look_up, fullgraph=True, dynamic=False)(ids, weight)
    assert torch.equal(y, weight[ids])
    assert torch.equal(*(torch.autograd.grad(z, weight, dy)[0] for z in (y, look_up(ids, weight))))


@pytest.mark.gpu
def test_on_cuda_the_same_bits_every_time() -> None:
    embedding = Embedding(8192, 64).cuda()
    ids = torch.randint(8192, (512, 128), device="cuda").masked_fill(torch.rand(512, 128, device="cuda") < 0.8, FILLER)
    dy = torch.randn(512, 128, 64, device="cuda")
    gradients = [torch.autograd.grad(embedding(ids), embedding.weight, dy)[0] for _ in range(3)]
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
    expected = torch.zeros(8192, 64, dtype=torch.float64, device="cuda")
    expected.index_add_(0, ids.flatten(), dy.flatten(0, 1).double())
    torch.testing.assert_close(gradients[0].double(), expected, rtol=1e-4, atol=1e-3)
