"""Runs for a sweep whose label says what happens to them, and a command that sweeps over some.

As a program: `python sweep_fakes.py ROOT LABEL...` over Ray, two at once; it ends as the command line would.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from train_fakes import MemoryLoader, checkpoint_folder, memory_feed, options, tiny_recipe

from rodimus_lab.data import cache_root, data_root
from rodimus_lab.errors import UserError
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import runs_root
from rodimus_lab.sweep import SweepOptions, sweep
from rodimus_lab.train import TrainOptions, train
from rodimus_lab.train.distributed import World
from rodimus_lab.train.feed import Batch, Feed
from rodimus_lab.weights import checkpoints_root

FAULTS = {"killed": {"11": "kill"}, "terminated": {"6": "terminate"}}


class SlowLoader(MemoryLoader):
    def __next__(self) -> Batch:
        time.sleep(0.2)
        return super().__next__()


def recipe(label: str, steps: int = 12, **changes: Any) -> Recipe:
    return tiny_recipe(steps).replace(label=label, **changes)


def run(recipe: Recipe, options: TrainOptions) -> dict[str, Any]:
    """Train it. Faults, an exception or a signal, are met in the first attempt alone; a user's error in every one."""
    assert options.checkpoints_root is not None
    mark = options.checkpoints_root / f"{recipe.id}.attempts"
    attempts = int(mark.read_text()) if mark.exists() else 0
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(str(attempts + 1))
    if recipe.label == "hopeless":
        raise UserError("the corpus is corrupt; fetch it again")
    if recipe.label == "broken" or (recipe.label == "fragile" and not attempts):
        raise RuntimeError("out of luck")

    def feed(recipe: Recipe, world: World) -> Feed:
        made = memory_feed(recipe, world, {} if attempts else FAULTS.get(recipe.label))
        if recipe.label.startswith("slow") and not attempts:
            made.train.__class__ = SlowLoader
        return made

    return train(recipe, options, open_feed=feed)


def attempts(root: Path, recipe: Recipe) -> int:
    return int((checkpoint_folder(root, recipe).parents[1] / f"{recipe.id}.attempts").read_text())


def places(recipe: Recipe, options: TrainOptions) -> dict[str, Any]:
    """What a worker sees of the machine and of where the project's files are.

    Runs of a `pair` wait for one another, so that they end only if both are there at once; one that is `single` must
    find no other.
    """
    roots = {root.__name__: str(root()) for root in (cache_root, data_root, runs_root, checkpoints_root)}
    mark = checkpoints_root() / f"{recipe.label}.here"
    mark.touch()
    others = [path for path in mark.parent.glob(f"{recipe.label[:-1]}?.here") if path != mark]
    if recipe.label.startswith("single"):
        if others:
            raise UserError(f"{others[0].stem} is here too")
        time.sleep(0.5)
        mark.unlink()
    deadline = time.monotonic() + 60
    while recipe.label.startswith("pair") and len(list(mark.parent.glob("pair?.here"))) < 2:
        if time.monotonic() > deadline:
            raise UserError("the other run did not come")
        time.sleep(0.05)
    return roots | {"pid": os.getpid(), "cwd": os.getcwd(), "device": options.device}


if __name__ == "__main__":
    try:
        sweep([recipe(label, 30) for label in sys.argv[2:]], SweepOptions(jobs=2), options(Path(sys.argv[1])), run=run)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
