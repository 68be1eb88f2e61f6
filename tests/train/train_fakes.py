"""A tiny recipe and data in memory, and a process that trains it: what the tests of the trainer share."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rodimus_lab.errors import UserError
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.model import IGNORE, LanguageModelConfig
from rodimus_lab.nn.rodimus import RodimusConfig, ValueGate
from rodimus_lab.recipe import BudgetConfig, DataConfig, OptimizerConfig, Recipe, ScheduleConfig
from rodimus_lab.train import Interrupted, TrainOptions, train
from rodimus_lab.train.distributed import World
from rodimus_lab.train.feed import Batch, Feed

VOCAB, SEQ_LEN, BATCH = 64, 16, 8


def tiny_model(dropout: float = 0.0, tie_embeddings: bool = True, mixing: bool = False) -> LanguageModelConfig:
    mixers = (RodimusConfig(n=8, beta_hat=ValueGate(rank=4)),) if mixing else ()
    block = BlockConfig(hops=((*mixers, FeedForwardConfig(width=32, bias=True)),))
    return LanguageModelConfig(
        vocab_size=VOCAB, d_model=16, pattern=(block,), repeats=2, dropout=dropout, tie_embeddings=tie_embeddings
    )


def tiny_recipe(
    steps: int = 12,
    *,
    dropout: float = 0.1,
    eval_every: int = 5,
    patience: int | None = None,
    lr: float = 1e-2,
    mixing: bool = False,
) -> Recipe:
    return Recipe(
        experiment="testing",
        label="tiny",
        model=tiny_model(dropout, mixing=mixing),
        data=DataConfig(corpus="memory", tokenizer="none", seq_len=SEQ_LEN),
        optimizer=OptimizerConfig(lr=lr),
        schedule=ScheduleConfig(warmup_steps=2, min_lr=1e-4),
        budget=BudgetConfig(name="smoke", steps=steps, batch_size=BATCH, eval_every=eval_every, patience=patience),
        precision="fp32",
    )


def sequence(starts: torch.Tensor) -> torch.Tensor:
    """Tokens that follow one another by x -> 5 x + 3 modulo the vocabulary: SEQ_LEN + 1 for every start."""
    tokens = [starts]
    for _ in range(SEQ_LEN):
        tokens.append((5 * tokens[-1] + 3) % VOCAB)
    return torch.stack(tokens, dim=1)


class MemoryLoader:
    """Batch number i is drawn from (seed, i). `faults` maps a batch number to what happens there."""

    def __init__(self, seed: int, batch_size: int, world: World, faults: dict[str, Any]):
        self.seed, self.batch_size, self.world, self.faults = seed, batch_size, world, faults
        self.number = 0

    def __next__(self) -> Batch:
        self.number += 1
        fault = self.faults.get(str(self.number))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if fault == "kill rank 1, then fill its disk":
            if self.world.rank == 1 and attempt == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.world.rank == 1 and attempt == "1":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if fault == "terminate twice":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
        if fault == "fail on rank 1" and self.world.rank == 1:
            raise UserError("the shard train-00003.bin is corrupt; delete it")
        draw = torch.Generator().manual_seed(1000 * self.seed + self.number)
        tokens = sequence(torch.randint(VOCAB, (self.batch_size,), generator=draw))
        # As many tokens count as chance has it, so that the mean over ranks and micro-batches must weigh them.
        dropped = torch.rand(self.batch_size, SEQ_LEN, generator=draw) < 0.3
        share = self.batch_size // self.world.data_size
        mine = slice(self.world.data_rank * share, (self.world.data_rank + 1) * share)
        return tokens[mine, :-1], tokens[:, 1:].masked_fill(dropped, IGNORE)[mine]

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def evaluation(world: World, blocks: int) -> Any:
    tokens = sequence(torch.arange(blocks) * 7 % VOCAB)

    def batches(rows: int) -> Iterator[Batch]:
        rounds = -(-blocks // world.data_size)
        for start in range(0, rounds, rows):
            numbers = world.data_rank + world.data_size * torch.arange(start, min(start + rows, rounds))
            there = tokens[numbers.clamp(max=blocks - 1)]
            yield there[:, :-1], there[:, 1:].masked_fill((numbers >= blocks)[:, None], IGNORE)

    return batches


def memory_feed(recipe: Recipe, world: World, faults: dict[str, Any] | None = None) -> Feed:
    return Feed(
        train=MemoryLoader(recipe.seed, recipe.budget.batch_size, world, faults or {}),
        evaluation={"valid": evaluation(world, 11), "test": evaluation(world, 21)},
        words={"valid": 90, "test": 170},
        facts={"fingerprints": {"train": "memory"}},
    )


def options(root: Path, **changes: Any) -> TrainOptions:
    settings = {"device": "cpu", "progress": False, "checkpoint_every": 4} | changes
    return TrainOptions(runs_root=root / "runs", checkpoints_root=root / "checkpoints", **settings)


def run_folder(root: Path, recipe: Recipe) -> Path:
    return root / "runs" / recipe.experiment / recipe.id


def checkpoint_folder(root: Path, recipe: Recipe) -> Path:
    return root / "checkpoints" / recipe.experiment / recipe.id


def main(root: str, recipe: str, settings: str, faults: str) -> int:
    """With the recipe's changes, `TrainOptions` and the data's faults as JSON; the command line's exit code."""
    try:
        train(
            tiny_recipe(**json.loads(recipe)),
            options(Path(root), **json.loads(settings)),
            open_feed=lambda recipe, world: memory_feed(recipe, world, json.loads(faults)),
        )
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
