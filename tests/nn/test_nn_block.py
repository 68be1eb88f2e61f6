"""The wiring of hops (Eq. 13 of the paper) against hand-written compositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rodimus_lab.config import ConfigError
from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.block import Block, BlockConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.rodimus import RodimusConfig, ValueGate

D = 16
RODIMUS = RodimusConfig(n=4, beta_hat=ValueGate(rank=3))
ATTENTION = AttentionConfig(heads=HeadSharing.of("ska", 2), window=3)
FEED_FORWARD = FeedForwardConfig(width=24)


def built(*hops: tuple[Any, ...], **options: Any) -> nn.Module:
    block = Block(BlockConfig(hops=hops, **options), D).double()
    block.init_weights(Initializer(std=0.3))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def normed(block: Any, index: int, x: Tensor) -> Tensor:
    """RMSNorm written out."""
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * block.norms[index].weight


def sublayer(block: Any, index: int, x: Tensor) -> Tensor:
    return block.mixers[index](normed(block, index, x))[0]


@torch.no_grad()
def check(block: nn.Module, want: Any) -> None:
    x = torch.randn(2, 7, D, dtype=torch.float64)
    y, nothing = block(x)
    assert nothing is None
    torch.testing.assert_close(y, want(block, x), rtol=0, atol=1e-12)


def test_two_hop_residual_of_rodimus_plus() -> None:
    def eq_13(block: Any, x: Tensor) -> Tensor:
        x_state = x + sublayer(block, 0, x)
        x_hat = x_state + sublayer(block, 1, x_state)
        return x_state + sublayer(block, 2, x_hat)

    check(built((RODIMUS,), (ATTENTION, FEED_FORWARD)), eq_13)


def test_without_the_two_hop_residual() -> None:
    def one_hop_each(block: Any, x: Tensor) -> Tensor:
        for index in range(3):
            x = x + sublayer(block, index, x)
        return x

    check(built((RODIMUS,), (ATTENTION,), (FEED_FORWARD,)), one_hop_each)


def test_swapped_hops_of_table_18() -> None:
    def x_then_rodimus(block: Any, x: Tensor) -> Tensor:
        x_hat = x + sublayer(block, 0, x)
        x = x + sublayer(block, 1, x_hat)
        return x + sublayer(block, 2, x)

    check(built((ATTENTION, FEED_FORWARD), (RODIMUS,)), x_then_rodimus)


def test_three_sublayers_in_one_hop() -> None:
    def one_hop(block: Any, x: Tensor) -> Tensor:
        first = x + sublayer(block, 0, x)
        second = first + sublayer(block, 1, first)
        return x + sublayer(block, 2, second)

    check(built((RODIMUS, ATTENTION, FEED_FORWARD)), one_hop)


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_changes_no_gradient(compiled: bool) -> None:
    block: Any = built((RODIMUS,), (ATTENTION, FEED_FORWARD))
    x = torch.randn(2, 70, D, dtype=torch.float64)

    def gradients(recompute: bool) -> tuple[list[Tensor], int]:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        block.recompute = recompute
        torch.compiler.reset()
        run = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y, _ = run(x)
        return list(torch.autograd.grad(y.square().sum(), block.parameters())), sum(kept.values())

    want, bytes_kept = gradients(recompute=False)
    got, fewer = gradients(recompute=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    if compiled:  # An eager recomputation keeps its own list.
        assert fewer < 0.8 * bytes_kept


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputing_draws_again_what_was_drawn_and_else_leaves_the_random_state_alone(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such state may be read while a CUDA graph is captured."""
    block: Any = Block(BlockConfig(hops=((RODIMUS,), (FEED_FORWARD,))), D, dropout).double()
    block.init_weights(Initializer(std=0.3))
    x, read = torch.randn(2, 7, D, dtype=torch.float64), []
    state_of = torch.get_rng_state

    def gradients(recompute: bool) -> list[Tensor]:
        block.recompute = recompute
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_rng_state", lambda: read.append(recompute) or state_of())
            y, _ = block(x)
            torch.rand(3)  # As the blocks after this one may.
            return list(torch.autograd.grad(y.square().sum(), block.parameters()))

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b)
    assert bool(read) == (dropout > 0)


def test_states_stand_in_the_order_of_the_sublayers() -> None:
    block: Any = built((RODIMUS,), (ATTENTION, FEED_FORWARD))
    state = block.init_state(2, context=9, dtype=torch.float64)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    with torch.no_grad():
        y, new = block(x, state)
        want, _ = block(x)
    assert [type(part) for part in new] == [type(part) for part in state]
    torch.testing.assert_close(y, want)


def test_layer_norm_and_its_count() -> None:
    config = BlockConfig(hops=((FEED_FORWARD,),), norm="layer")
    block: Any = built((FEED_FORWARD,), norm="layer")
    assert config.num_params(D) == sum(p.numel() for p in block.parameters()) == 3 * D * 24 + 2 * D
    x = torch.randn(1, 3, D, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    inner = (
        centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * block.norms[0].weight + block.norms[0].bias
    )
    torch.testing.assert_close(block(x)[0], x + block.mixers[0](inner)[0])


def test_dropout_is_on_what_joins_a_stream() -> None:
    block = Block(BlockConfig(hops=((FEED_FORWARD,),)), D, dropout=0.5)
    block.init_weights(Initializer(std=0.3))
    x = torch.randn(4, 50, D)
    with torch.no_grad():
        added = block.eval()(x)[0] - x
        dropped = block.train()(x)[0] - x
    kept = dropped.abs() > 1e-6
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * added[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hops", [(), ((),)])
def test_an_empty_block_or_hop_is_refused(hops: Any) -> None:
    with pytest.raises(ConfigError, match="hops"):
        BlockConfig(hops=hops)
