"""Several corpora read at once, by weights that change from stage to stage of a run.

Every row of a batch is of one corpus, drawn by its stage's weights; each corpus is read block by block in an order of
its own, and begins anew at its end.

Legend: B batch, T time (sequence length).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from rodimus_lab.config import Config
from rodimus_lab.data.loader import Batch, BlockLoader, TokenBlocks, rng
from rodimus_lab.errors import UserError

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
NEARLY = 1e-6
DRAWS = 0x6D6978  # Keeps the choice of corpora apart from the order of blocks under the same seed.


class StageConfig(Config):
    """A stage: its `share` of the run's tokens, and by corpus the weights of its rows, which make 1."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    share: Share
    weights: Annotated[dict[str, Share], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> StageConfig:
        if abs(math.fsum(self.weights.values()) - 1) > NEARLY:
            raise ValueError(f"the weights of stage {self.name!r} make {math.fsum(self.weights.values()):g}, not 1")
        return self


class MixtureConfig(Config):
    """Corpora in one tokenizer, cut into blocks of `seq_len` tokens, in stages one after another."""

    task: Literal["mixture"] = "mixture"
    tokenizer: str
    seq_len: Positive
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> MixtureConfig:
        if abs(math.fsum(stage.share for stage in self.stages) - 1) > NEARLY:
            raise ValueError(f"the stages' shares make {math.fsum(stage.share for stage in self.stages):g}, not 1")
        return self

    @property
    def corpora(self) -> list[str]:
        """Every corpus of any stage, in the order of their names, which a recipe on disk keeps."""
        return sorted({name for stage in self.stages for name in stage.weights})

    @property
    def corpus(self) -> str:
        return "+".join(self.corpora)

    def first_steps(self, steps: int) -> list[int]:
        """The step, from 0 on, at which each stage begins in a run of so many."""
        shares = [0.0, *(stage.share for stage in self.stages[:-1])]
        return [round(steps * share) for share in np.cumsum(shares)]


class MixtureLoader:
    """Endless training batches: what a row is of is drawn from (seed, step), whatever the number of ranks.

    `blocks` are the corpora's, `batch_size` is global and `steps` those of the run, which place the stages; after the
    last step the last stage goes on. `next()` gives this rank's rows as int64 inputs_BT and targets_BT.
    """

    def __init__(
        self,
        data: MixtureConfig,
        blocks: Mapping[str, TokenBlocks],
        batch_size: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"the batch of {batch_size} does not divide over {world_size} ranks; choose a multiple of it"
            )
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self._loaders = {name: BlockLoader(blocks[name], 1, seed) for name in data.corpora}
        self._first_steps = data.first_steps(steps)
        share = batch_size // world_size
        self._mine = range(rank * share, (rank + 1) * share)
        self._step = 0

    def stage(self, step: int) -> StageConfig:
        """The stage that a step, from 0 on, is in."""
        return self.data.stages[max(number for number, first in enumerate(self._first_steps) if first <= step)]

    def draw(self, step: int) -> list[str]:
        """The corpus of every row of a step's global batch."""
        stage = self.stage(step)
        names = sorted(stage.weights)
        weights = np.array([stage.weights[name] for name in names])
        drawn = rng(self.seed ^ DRAWS, step).choice(len(names), self.batch_size, p=weights / weights.sum())
        return [names[number] for number in drawn]

    def __iter__(self) -> MixtureLoader:
        return self

    def __next__(self) -> Batch:
        names = self.draw(self._step)
        self._step += 1
        rows: dict[int, Batch] = {}
        for name in dict.fromkeys(names):
            places = [place for place, drawn in enumerate(names) if drawn == name]
            taken = self._loaders[name].take(len(places))
            mine = [number for number, place in enumerate(places) if place in self._mine]
            if mine:
                inputs, targets = self._loaders[name].blocks.batch(taken[mine])
                rows |= {places[number]: (inputs[row], targets[row]) for row, number in enumerate(mine)}
        inputs_BT, targets_BT = zip(*(rows[place] for place in self._mine), strict=True)
        return torch.stack(inputs_BT), torch.stack(targets_BT)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on all ranks."""
        return {"step": self._step, "corpora": {name: each.state_dict() for name, each in self._loaders.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises `UserError` where the corpora or the order are not."""
        if list(state.get("corpora", ())) != list(self._loaders):
            raise UserError(
                f"the loader state is of the corpora {', '.join(state.get('corpora', ())) or 'none'}, and now they are "
                f"{', '.join(self._loaders)}; resume with the same recipe"
            )
        for name, loader in self._loaders.items():
            loader.load_state_dict(state["corpora"][name])
        self._step = state["step"]


def mixed(parts: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Weights by corpus, those of one that is named twice together; without those of 0."""
    weights: dict[str, float] = {}
    for corpus, weight in parts:
        if weight > 0:
            weights[corpus] = weights.get(corpus, 0.0) + weight
    return weights
