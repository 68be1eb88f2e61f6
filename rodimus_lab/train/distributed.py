"""One process or many: the ranks that `torchrun` starts, and the sharding of a model over them with FSDP2."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rodimus_lab.device import device_type
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.train.signals import Interrupted

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks of this run and the device of this one. With one rank every collective is the identity."""

    rank: int
    size: int
    device: torch.device

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
        """Move the model to the device; with several ranks shard its parameters, block by block (FSDP2)."""
        if self.size == 1:
            model.to(self.device)
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "loss")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (on every rank); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def session(device: str | None = None) -> Iterator[World]:
    """The world of this process: its own, or that of `torchrun`, joined here and left at the end.

    `device` is "cpu" or "cuda", by default cuda where there is one. Where ranks fail, one of them raises, and
    names itself; the others end without a word.
    """
    name = device_type(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name))
        return
    if name == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"rank {local} has no GPU of its own; start at most {torch.cuda.device_count()} a machine")
        torch.cuda.set_device(local)
    store, rank, size = next(iter(dist.rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("train", store), rank=rank, world_size=size)
    try:
        yield World(rank, size, torch.device(name, local) if name == "cuda" else torch.device(name))
    except Exception as error:
        if store.add("failures", 1) > 1:
            time.sleep(1)  # torchrun ends the others when one rank ends: let the one that speaks finish.
            end_process(error.exit_code if isinstance(error, Interrupted) else 2 if isinstance(error, UserError) else 1)
        if isinstance(error, UserError) and not isinstance(error, Interrupted) and rank > 0:
            raise UserError(f"rank {rank}: {error}") from None
        error.add_note(f"on rank {rank} of {size}")
        raise
    dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End a process that was a rank, without Python's own tidying up: sharded models leave the threads of their process
    group behind, and one of these may abort the process while Python goes down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
