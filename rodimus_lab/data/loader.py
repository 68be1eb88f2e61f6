"""Blocks of tokens, and the order in which training and evaluation read them.

Legend: B batch, T time (sequence length).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rodimus_lab.data.prepared import PreparedData
from rodimus_lab.errors import UserError

IGNORED = -100

Batch = tuple[torch.Tensor, torch.Tensor]


def rng(seed: int, index: int) -> np.random.Generator:
    """The random numbers of one epoch, or one row, of a seed."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))


class TokenBlocks:
    """A split cut into contiguous blocks, whatever documents and shards they span.

    Block i is the tokens [i T, (i+1) T], T+1 of them, the last being a target only. The tokens after the last whole
    block are dropped; with `keep_tail` they are one more block, filled up with targets of -100 (`IGNORED`), so that
    every token of the split but its first is a target exactly once.
    """

    def __init__(self, prepared: PreparedData, split: str, seq_len: int, keep_tail: bool = False):
        if seq_len < 1:
            raise UserError(f"seq_len is {seq_len}; it must be at least 1")
        self.seq_len = seq_len
        self.fingerprint = prepared.fingerprint(split)
        self.num_tokens = prepared.split(split).tokens
        self._shards = prepared.shards(split)
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self._filler = prepared.manifest.eos_id
        needed = 1 if keep_tail else seq_len
        if self.num_tokens - 1 < needed:
            raise UserError(
                f"the {split} split of {prepared.manifest.corpus} has {self.num_tokens} tokens, fewer than the "
                f"{needed + 1} of one block; shorten the sequence or choose a larger corpus"
            )
        self._num_blocks = -(-(self.num_tokens - 1) // seq_len) if keep_tail else (self.num_tokens - 1) // seq_len

    def __len__(self) -> int:
        return self._num_blocks

    def batch(self, indices: np.ndarray) -> Batch:
        """The blocks of those numbers as int64 inputs_BT and targets_BT. A number past the end is a blank block."""
        tokens = np.full((len(indices), self.seq_len + 1), self._filler, dtype=np.int64)
        targets = np.full((len(indices), self.seq_len), IGNORED, dtype=np.int64)
        for row, index in enumerate(indices):
            length = self._read(int(index) * self.seq_len, tokens[row])
            targets[row, : max(0, length - 1)] = tokens[row, 1:length]
        return torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])), torch.from_numpy(targets)

    def _read(self, start: int, into: np.ndarray) -> int:
        """Copies the tokens from `start` on into `into` and returns how many there were."""
        length = max(0, min(len(into), self.num_tokens - start))
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < length:
            tokens = self._shards[shard]
            offset = start + done - (int(self._ends[shard]) - len(tokens))
            piece = tokens[offset : offset + length - done]
            into[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return length


def eval_batches(
    prepared: PreparedData, split: str, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Every token of the split but the first as a target, once, over all ranks: int64 inputs_BT and targets_BT.

    B is `batch_size` (less in the last batch). Every rank gets as many batches of the same shapes; what a rank lacks is
    filled with blocks whose targets are all -100.
    """
    _check_ranks(rank, world_size)
    if batch_size < 1:
        raise UserError(f"the evaluation batch is {batch_size}; it must be at least 1")
    blocks = TokenBlocks(prepared, split, seq_len, keep_tail=True)
    rounds = -(-len(blocks) // world_size)
    mine = rank + world_size * np.arange(rounds)
    for start in range(0, rounds, batch_size):
        yield blocks.batch(mine[start : start + batch_size])


class BlockLoader:
    """Endless training batches. Each epoch takes every block once, in an order drawn from (seed, epoch).

    `batch_size` is global: the order of the blocks does not depend on `world_size`, and rank r takes the r-th slice of
    each batch, `batch_size / world_size` blocks. A batch begun at an epoch's end is filled from the next epoch.
    `next()` gives int64 inputs_BT and targets_BT.
    """

    def __init__(self, blocks: TokenBlocks, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        _check_ranks(rank, world_size)
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"the batch of {batch_size} does not divide over {world_size} ranks; choose a multiple of it"
            )
        if seed < 0:
            raise UserError(f"the data seed is {seed}; it must not be negative")
        self.blocks, self.batch_size, self.seed = blocks, batch_size, seed
        self.data_fingerprint = blocks.fingerprint
        share = batch_size // world_size
        self._slice = slice(rank * share, (rank + 1) * share)
        self._epoch, self._position = 0, 0
        self._order = self._draw(0)

    def __iter__(self) -> BlockLoader:
        return self

    def __next__(self) -> Batch:
        return self.blocks.batch(self.take(self.batch_size)[self._slice])

    def state_dict(self) -> dict[str, Any]:
        """Plain values. `position` counts the blocks taken in the current epoch, over all ranks."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self.seed,
            "num_blocks": len(self.blocks),
            "fingerprint": self.data_fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises `UserError` where the data or the order are not the same."""
        current = self.state_dict()
        if missing := sorted(current.keys() - state.keys()):
            raise UserError(f"the loader state lacks {missing[0]!r}; take it from a whole checkpoint")
        for key in ("seed", "num_blocks", "fingerprint"):
            if state[key] != current[key]:
                raise UserError(
                    f"the loader state was taken with {key} {state[key]}, and now it is {current[key]}; resume with "
                    "the same seed, sequence length and prepared data"
                )
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < len(self.blocks):
            raise UserError(
                f"the loader state is at block {position} of epoch {epoch}, which does not exist; discard it"
            )
        self._epoch, self._position = epoch, position
        self._order = self._draw(epoch)

    def order_hash(self, count: int = 10_000) -> str:
        """SHA-256 of the numbers of the first `count` blocks from the start of training, as little-endian int64."""
        start = BlockLoader(self.blocks, 1, self.seed)
        return hashlib.sha256(start.take(count).astype("<i8").tobytes()).hexdigest()

    def _draw(self, epoch: int) -> np.ndarray:
        return rng(self.seed, epoch).permutation(len(self.blocks))

    def take(self, count: int) -> np.ndarray:
        """The numbers of the next `count` blocks, over all ranks, which then are read."""
        parts = []
        while count:
            part = self._order[self._position : self._position + count]
            parts.append(part)
            count -= len(part)
            self._position += len(part)
            if self._position == len(self.blocks):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._draw(self._epoch)
        return np.concatenate(parts)


def _check_ranks(rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size} does not exist; ranks go from 0 to world size - 1")
