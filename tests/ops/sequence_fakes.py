"""What one of several ranks does in the tests of split sequences.

Each computes the whole sequence by itself, then its part together with the others; rank 0 writes the largest
differences, name by name, to FOLDER/found.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import Size, model_config
from rodimus_lab.ops import Segments, attention, conv_gate, gated_linear, short_conv, ssd
from rodimus_lab.ops.sequence import SequenceShard, gather, sequence_shard, sharded_sequence

LENGTH, BATCH = 24, 2
MODELS = ("rodimus", "rodimus+", "transformer++", "mamba2", "gla", "hgrn2", "linear_attention", "transformer")
REFUSED = ("mamba", "rwkv6", "retnet", "gated_deltanet", "streaming_llm")


def tiny(name: str, **changes: dict) -> LanguageModelConfig:
    return model_config(name, size=Size("testing", 2, 16, 2, 32, LENGTH), **changes)


def operators() -> dict[str, tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]]:
    """Name -> (function, inputs along time, weights); all drawn alike on every rank."""
    draw = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def decay(*shape: int) -> Tensor:
        return -torch.rand(*shape, generator=draw, dtype=torch.float64) * 0.3

    heads = (BATCH, LENGTH, 2)
    q, k, v = rand(*heads, 4), rand(*heads, 4), rand(*heads, 3)
    gates, values = decay(*heads, 4), decay(*heads, 3)
    key, wide = rand(BATCH, LENGTH, 1, 4), rand(*heads, 4)
    x, weight, bias = rand(BATCH, LENGTH, 6), rand(6, 4), rand(6)
    by_state = [v, -gates[..., 0], q[:, :, 0], k[:, :, 0]]
    found = {
        "gated_linear": (lambda q, k, v, a: gated_linear(q, k, v, a, scale=0.5)[0], [q, k, v, gates], []),
        "gated_linear, by head": (lambda q, k, v, a: gated_linear(q, k, v, a)[0], [q, k, v, gates[..., :1]], []),
        "gated_linear, ungated": (lambda q, k, v: gated_linear(q, k, v, None)[0], [q, k, v], []),
        "gated_linear, beta": (lambda q, k, v, a, b: gated_linear(q, k, v, a, b)[0], [q, k, v, gates, values], []),
        "short_conv": (lambda x, w, b: short_conv(x, w, b)[0], [x], [weight, bias]),
        "conv_gate": (lambda x, w, b: torch.cat(conv_gate(x, w, b, None)[:2], -1), [x], [weight, bias]),
        "ssd": (lambda x, dt, B, C, A: ssd(x, dt, -A.exp(), B, C)[0], by_state, [rand(2)]),
    }  # fmt: skip
    for window in (None, 1, 3, 8, 9, 20, 100):
        found[f"attention, {window}"] = (
            lambda q, k, v, window=window: attention(q, k, v, window=window)[0],
            [q, key, wide],
            [],
        )
    return found


def part(x: Tensor, rank: int, size: int) -> Tensor:
    share = x.shape[1] // size
    return x[:, rank * share : (rank + 1) * share]


def compare_operator(
    function: Callable[..., Tensor], along: list[Tensor], weights: list[Tensor], shard: SequenceShard
) -> float:
    whole = [x.clone().requires_grad_() for x in (*along, *weights)]
    expected = function(*whole)
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * pull).sum().backward()

    mine = [part(x, shard.rank, shard.size).clone().requires_grad_() for x in along]
    mine += [x.clone().requires_grad_() for x in weights]
    with sharded_sequence(shard):
        o = function(*mine)
        (o * part(pull, shard.rank, shard.size)).sum().backward()
    worst = float((o - part(expected, shard.rank, shard.size)).abs().max())
    for own, of_whole in zip(mine, whole, strict=True):
        if own.shape == of_whole.shape:
            dist.all_reduce(own.grad)
            difference = own.grad - of_whole.grad
        else:
            difference = own.grad - part(of_whole.grad, shard.rank, shard.size)
        worst = max(worst, float(difference.abs().max()))
    return worst


def compare_model(config: LanguageModelConfig, shard: SequenceShard, recompute: bool = False) -> float:
    torch.manual_seed(0)
    model = config.build().double()
    for block in model.blocks:
        block.recompute = recompute
    ids = torch.randint(32, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    expected = model.loss(ids[:, :-1], ids[:, 1:], reduction="none")
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with sharded_sequence(shard):
        inputs, targets = (part(x, shard.rank, shard.size) for x in (ids[:, :-1], ids[:, 1:]))
        loss = model.loss(inputs, targets, reduction="none")
        loss.sum().backward()
    worst = float((loss - part(expected, shard.rank, shard.size)).abs().max())
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        worst = max(worst, float((parameter.grad - gradients[name]).abs().max()))
    return worst


def stray_gradient(shard: SequenceShard) -> float:
    """How far the gradient of what is added to gathered tensors is from 1."""
    x, added = torch.ones(2, 3, requires_grad=True), torch.zeros(shard.size, 2, 3, requires_grad=True)
    view = added.view_as(added)
    (gather(shard, x) + view).backward(torch.ones(shard.size, 2, 3))
    assert added.grad is not None
    return float((added.grad - 1).abs().max())


def refusals(shard: SequenceShard) -> dict[str, str]:
    """What is said of models and calls that do not run split; none of them may reach the other ranks."""
    x = torch.zeros(1, 2, 6)
    asked: dict[str, Callable[[], object]] = {
        name: lambda name=name: tiny(name).build().check_splits_sequence() for name in REFUSED
    }
    asked["packed"] = lambda: tiny("rodimus").build()(torch.zeros(1, 8).long(), segments=Segments.from_lengths([3, 5]))
    asked["state"] = lambda: short_conv(x, torch.zeros(6, 4), state_BWD=torch.zeros(1, 3, 6))
    asked["too short"] = lambda: short_conv(x, torch.zeros(6, 4))
    said = {}
    with sharded_sequence(shard):
        for name, ask in asked.items():
            try:
                ask()
                said[name] = ""
            except UserError as error:
                said[name] = str(error)
    return said


def main(rank: int, size: int, folder: str) -> int:
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    shard = SequenceShard(dist.group.WORLD, rank, size)
    found: dict[str, float] = {}
    for name, (function, along, weights) in operators().items():
        found[name] = compare_operator(function, along, weights, shard)
    for name in MODELS:
        found[name] = compare_model(tiny(name), shard)
    beta = {"rank": 4, "temperature": 16}
    found["rodimus with beta, recomputed"] = compare_model(tiny("rodimus", rodimus={"beta": beta}), shard, True)
    found["gather, beside another"] = stray_gradient(shard)
    said = refusals(shard)
    assert sequence_shard() is None
    ranks: list = [None] * size
    dist.all_gather_object(ranks, found)
    if rank == 0:
        worst = {name: max(one[name] for one in ranks) for name in found}
        Path(folder, "found.json").write_text(json.dumps({"differences": worst, "refusals": said}))
    dist.barrier()
    return 0
