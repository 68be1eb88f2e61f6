"""`bench train`: whole training steps of several models, one after another in one process, by the trainer's own step.

Shapes: B batch, T time.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rodimus_lab.bench.measure import peak_bytes, seconds_of
from rodimus_lab.bench.result import AsJson, Column, Device, Result, Row, app, show, surroundings
from rodimus_lab.config import did_you_mean
from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import SIZES, model_config, slug
from rodimus_lab.recipe import BudgetConfig, DataConfig, Recipe, ScheduleConfig
from rodimus_lab.records import RunDir
from rodimus_lab.train import Trainer, TrainOptions
from rodimus_lab.train.distributed import World, session
from rodimus_lab.train.feed import Batch, Feed
from rodimus_lab.train.throughput import median, utilization

MODELS = ("transformer++", "rodimus", "rodimus+")
WARMUP = 3
COLUMNS = (
    Column("model", "model"),
    Column("params", "parameters M", 1e-6, 2),
    Column("tokens_per_second", "tokens/s"),
    Column("over_first", "x first", 1, 2),
    Column("mfu", "MFU %", 100, 1),
    Column("mfu_6n", "MFU 6N %", 100, 1),
    Column("peak_bytes", "peak GB", 1e-9, 2),
    Column("micro_batch_size", "micro-batch"),
    Column("loss", "loss", 1, 3),
)


class RandomTokens:
    """A loader that gives the same random batch again and again."""

    def __init__(self, vocab_size: int, batch_size: int, seq_len: int):
        self._batch: Batch = tuple(torch.randint(vocab_size, (batch_size, seq_len)) for _ in range(2))  # type: ignore[assignment]

    def __next__(self) -> Batch:
        return self._batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def recipe_of(model: str, size: str, batch_size: int, seq_len: int, precision: str) -> Recipe:
    config = model_config(model, size=size)
    return Recipe(
        experiment="bench",
        label=slug(model),
        model=config,
        data=DataConfig(corpus="random", tokenizer="none", seq_len=seq_len),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        budget=BudgetConfig(name="smoke", steps=1_000_000, batch_size=batch_size),
        precision=precision,  # type: ignore[arg-type]
    )


def measure_steps(recipe: Recipe, world: World, options: TrainOptions, steps: int) -> Row:
    """Median tokens a second and peak memory of `steps` steps (loss, backward, clipping, AdamW) after a warm-up.

    Memory is all that the step holds: weights, moments, gradients and activations, on CUDA by the allocator.
    """
    row: Row = {"model": recipe.label, "batch_size": recipe.budget.batch_size, "seq_len": recipe.data.seq_len}
    torch.manual_seed(recipe.seed)
    loader = RandomTokens(recipe.model.vocab_size, recipe.budget.batch_size, recipe.data.seq_len)
    nowhere = Path(tempfile.gettempdir())  # Neither the run nor its checkpoints are begun, so nothing is written.
    trainer = Trainer(recipe, Feed(loader, {}), options, RunDir(nowhere, recipe.experiment, recipe.id), world, nowhere)
    stepper, number, loss = trainer.stepper, 0, torch.tensor(0.0)

    def step() -> None:
        nonlocal number, loss
        number += 1
        loss, _ = stepper.step(number, *next(loader))

    times = seconds_of(step, world.device, steps, warmup=WARMUP)
    if stepper.sentinel.first_bad_step() is not None:
        return row | {"note": "the loss or a gradient is not finite, so it gets no time"}
    trainer.optimizer.zero_grad(set_to_none=True)
    held = sum(x.numel() * x.element_size() for x in (trainer.model.state_dict() | trainer.moments).values())
    if world.device.type == "cuda":
        held = torch.cuda.memory_allocated(world.device)
    tokens = recipe.budget.batch_size * recipe.data.seq_len
    rate = median([tokens / seconds for seconds in times])
    return row | {
        "params": trainer.params,
        "micro_batch_size": stepper.rows,
        "compiled": trainer.compiled,
        "tokens_per_second": rate,
        "seconds_per_step": median(times),
        "mfu": utilization(trainer.flops_per_token, rate, trainer.peak),
        "mfu_6n": utilization(6 * trainer.params, rate, trainer.peak),
        "peak_flops": trainer.peak,
        "peak_bytes": held + peak_bytes(step, world.device),
        "loss": loss.item(),
    }


def compare(recipes: Sequence[Recipe], world: World, options: TrainOptions, steps: int) -> list[Row]:
    """A row a recipe; nothing of one model is left in memory when the next begins."""
    rows: list[Row] = []
    for recipe in recipes:
        try:
            row = measure_steps(recipe, world, options, steps)
        except torch.OutOfMemoryError:
            row = {"model": recipe.label, "note": "out of memory"}
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        first = (rows or [row])[0].get("tokens_per_second")
        if first and "tokens_per_second" in row:
            row["over_first"] = row["tokens_per_second"] / first
        rows.append(row)
    return rows


@app.command()
def train(
    model: Annotated[list[str] | None, typer.Option(help=f"May be repeated. Default: {', '.join(MODELS)}.")] = None,
    size: Annotated[str | None, typer.Option(help="Default: wikitext103 on CUDA, smoke on a CPU.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 256 on CUDA, 8 on a CPU.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Default: the size's own.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="Default: as many as suit the device.")] = None,
    compile: Annotated[bool | None, typer.Option(help="Compile the blocks. Default: on CUDA only.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Timed steps. Default: 20 on CUDA, 3 on a CPU.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time whole training steps of several models in one process: tokens/s, MFU, peak memory, ratio to the first."""
    with session(device) as world:
        if world.size > 1:
            raise UserError("bench train measures one process; start it without torchrun")
        cuda = world.device.type == "cuda"
        size = size or ("wikitext103" if cuda else "smoke")
        precision = "bf16" if cuda else "fp32"
        batch_size = batch_size or (256 if cuda else 8)
        steps = steps or (20 if cuda else 3)
        if size not in SIZES:
            raise UserError(f"there is no size named {size!r}{did_you_mean(size, SIZES)}")
        length = seq_len or SIZES[size].context
        recipes = [recipe_of(name, size, batch_size, length, precision) for name in model or MODELS]
        options = TrainOptions(device=device, micro_batch_size=micro_batch_size, compile=compile, progress=False)
        facts = surroundings(world)
        rows = compare(recipes, world, options, steps)
    settings = {"size": size, "batch": f"{batch_size} x {length}", "precision": precision, "steps": steps}
    show(Result("train", settings, rows, facts), COLUMNS, as_json)
