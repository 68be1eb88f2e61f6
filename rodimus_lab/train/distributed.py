"""One process or many: the ranks that `torchrun` starts, and the sharding of a model over them with FSDP2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rodimus_lab.device import device_type
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.ops.sequence import SequenceShard, sharded_sequence
from rodimus_lab.train.failures import Ledger, end_process

__all__ = ["World", "device_type", "end_process", "session", "whole"]

T = TypeVar("T")
MEETING = timedelta(minutes=10)
_sessions = count()


@dataclass(frozen=True)
class World:
    """The ranks of this run and the device of this one. With one rank every collective is the identity.

    The ranks form `replicas` groups that each hold the whole model, sharded among their ranks (HSDP; 1: FSDP). Each
    `parts` consecutive ranks share their sequences, of which each has a part (`ops/sequence.py`).
    """

    rank: int
    size: int
    device: torch.device
    replicas: int = 1
    parts: int = 1

    @property
    def data_rank(self) -> int:
        """Which share of a batch this rank reads, of `data_size`; ranks that share sequences read the same."""
        return self.rank // self.parts

    @property
    def data_size(self) -> int:
        return self.size // self.parts

    def part_of(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """This rank's part of the sequences in a batch of (B, T) tensors."""
        if self.parts == 1:
            return batch
        return tuple(tensor.chunk(self.parts, dim=1)[self.rank % self.parts] for tensor in batch)

    @property
    def main(self) -> bool:
        """Whether this rank writes records and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place, without waiting for the device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank. The flags travel between the processors and leave the devices alone."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """The main rank's value."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Until the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def place(self, model: LanguageModel) -> None:
        """Move the model to the device; with several ranks shard its parameters, block by block (FSDP2, or HSDP)."""
        if self.size == 1:
            model.to(self.device)
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if self.replicas == 1:
            mesh = init_device_mesh(self.device.type, (self.size,))
        else:
            shape, names = (self.replicas, self.size // self.replicas), ("replicate", "shard")
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for method in ("loss", "logits_at"):
            register_fsdp_forward_method(model, method)

    def share_gradients(self, model: LanguageModel, now: bool) -> None:
        """Whether the next backward pass of a placed model ends with the ranks' gradients added up and sharded. Else
        each rank keeps its own, whole, and the next pass adds to them."""
        if self.size > 1:
            model.set_requires_gradient_sync(now)  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (on every rank); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def session(device: str | None = None, *, replicas: int = 1, parts: int = 1) -> Iterator[World]:
    """The world of this process: its own, or that of `torchrun`, joined here and left at the end.

    `device` is "cpu" or "cuda", by default cuda where there is one; for `replicas` and `parts` see `World`. Where ranks
    fail, one of them raises, rank 0 where it can, and says which failed; the others end without a word. Raises
    `UserError` where the ranks do not find one another or cannot be grouped so.
    """
    name = device_type(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    for what, number in (("replicas", replicas), ("sequence_parallel", parts)):
        if number < 1 or size % number:
            raise UserError(
                f"{what} is {number}, which does not divide {size} rank{'s' * (size > 1)}; choose a divisor"
            )
    if size == 1:
        yield World(0, 1, torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name))
        return
    if name == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"rank {local} has no GPU of its own; start at most {torch.cuda.device_count()} a machine")
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=MEETING)))
        # The store outlives a session, and torchrun's a restart; what ranks left there would mislead those of now.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}-{next(_sessions)}", store)
        dist.init_process_group(backend, store=dist.PrefixStore("train", store), rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"rank {os.environ.get('RANK')} of {size} does not meet the others at {place} ({reason}); see that "
            "torchrun started all of them and that the address can be reached"
        ) from None
    ledger = Ledger(store, rank, size)
    try:
        shard = None
        if parts > 1:
            groups = [dist.new_group(list(range(start, start + parts))) for start in range(0, size, parts)]
            shard = SequenceShard(groups[rank // parts], rank % parts, parts)
        place_of_rank = torch.device(name, local) if name == "cuda" else torch.device(name)
        with sharded_sequence(shard):
            yield World(rank, size, place_of_rank, replicas, parts)
    except Exception as error:
        verdict = ledger.verdict(error)
        if verdict is error:
            raise
        raise verdict from None
    ledger.close()
    dist.destroy_process_group()
