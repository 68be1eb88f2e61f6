"""`bench train`: whole training steps of several models, one after another in one process, by the trainer's own step.

A peer (`bench/peers.py`) is trained by the same step: the same batch, loss, clipping, AdamW and precision.

Shapes: B batch, T time.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer

from rodimus_lab.bench.measure import peak_bytes, seconds_of
from rodimus_lab.bench.peers import OUT_OF_MEMORY, PEERS, build, failure, parameters, wrong_loss
from rodimus_lab.bench.result import AsJson, Column, Device, Result, Row, app, show, surroundings, until_interrupted
from rodimus_lab.config import did_you_mean
from rodimus_lab.device import device_name
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.nn.zoo import SIZES, Size, model_config, slug
from rodimus_lab.ops.backend import use_backend
from rodimus_lab.recipe import BudgetConfig, DataConfig, Recipe, ScheduleConfig
from rodimus_lab.records import RunDir
from rodimus_lab.scoring import set_matmul_precision
from rodimus_lab.train import Trainer, TrainOptions
from rodimus_lab.train.distributed import World, session
from rodimus_lab.train.feed import Batch, Feed
from rodimus_lab.train.optimizer import build_optimizer, decay_groups
from rodimus_lab.train.step import Stepper, default_rows, fit_rows
from rodimus_lab.train.throughput import median, peak_flops, utilization

Precision = Literal["fp32", "tf32", "bf16", "bf16-params"]
MODELS = ("transformer++", "rodimus", "rodimus+")
WARMUP = 3
COLUMNS = (
    Column("model", "model"),
    Column("precision", "precision"),
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
        self._batch: Batch = tuple(torch.randint(vocab_size, (batch_size, seq_len)) for _ in range(2))

    def __next__(self) -> Batch:
        return self._batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def recipe_of(label: str, model: str, size: Size, batch_size: int, precision: Precision) -> Recipe:
    """The recipe of a model at the training length `size.context`, which is what its window and positions follow."""
    return Recipe(
        experiment="bench",
        label=label,
        model=model_config(model, size=size),
        data=DataConfig(corpus="random", tokenizer="none", seq_len=size.context),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        budget=BudgetConfig(name="smoke", steps=1_000_000, batch_size=batch_size),
        precision="bf16" if precision == "bf16-params" else precision,
    )


@dataclass(frozen=True)
class Entrant:
    """One row to be: `name` is a model of the zoo or, with `peer`, one of `PEERS`. `size.context` is the training
    length, `backends` the operators' backends that are not left to themselves."""

    name: str
    size: Size
    batch_size: int
    precision: Precision
    peer: bool = False
    backends: tuple[tuple[str, str], ...] = ()

    @property
    def recipe(self) -> Recipe:
        """A peer's is that of the model it is measured against, under its own name."""
        label, model = (self.name, PEERS[self.name].like) if self.peer else (slug(self.name), self.name)
        return recipe_of(label, model, self.size, self.batch_size, self.precision)

    def facts(self) -> Row:
        row: Row = {
            "model": self.recipe.label,
            "peer": self.peer,
            "size": self.size.name,
            "batch_size": self.batch_size,
            "seq_len": self.size.context,
            "precision": self.precision,
        }
        if self.size.d_model != SIZES[self.size.name].d_model:
            row["width"] = self.size.d_model
        return row | ({"backends": dict(self.backends)} if self.backends else {})

    def training_flops_per_token(self) -> float:
        length = self.size.context
        if self.peer:
            return PEERS[self.name].training_flops_per_token(self.size, length)
        return self.recipe.model.training_flops_per_token(length)


def our_stepper(entrant: Entrant, loader: RandomTokens, world: World, options: TrainOptions) -> tuple[Stepper, bool]:
    """The trainer's own step, and whether the model is compiled. With precision bf16-params the weights and AdamW's
    moments are bfloat16 too."""
    recipe = entrant.recipe
    nowhere = Path(tempfile.gettempdir())  # Neither the run nor its checkpoints are begun, so nothing is written.
    trainer = Trainer(recipe, Feed(loader, {}), options, RunDir(nowhere, recipe.experiment, recipe.id), world, nowhere)
    stepper = trainer.stepper
    if entrant.precision == "bf16-params":
        model = trainer.model.to(torch.bfloat16)
        optimizer = build_optimizer(model, trainer.groups, recipe.optimizer)
        stepper = Stepper(model, optimizer, recipe, world, stepper.rows, capture=stepper.capture)
    return stepper, trainer.compiled


def their_stepper(entrant: Entrant, world: World, options: TrainOptions) -> tuple[Stepper, bool]:
    """The same step around a peer, which with `options.capture` has to bear being captured."""
    recipe, device = entrant.recipe, world.device
    set_matmul_precision(device, recipe.precision)
    peer = build(entrant.name, entrant.size, device).train()
    if entrant.precision == "bf16-params":
        peer = peer.to(torch.bfloat16)
    compiled = peer.compilable and (device.type == "cuda" if options.compile is None else options.compile)
    if compiled:
        peer.compile_loss()
    model = cast(LanguageModel, peer)  # As far as the step is concerned: parameters, a head and a loss.
    optimizer = build_optimizer(model, decay_groups(model), recipe.optimizer)
    rows = options.micro_batch_size or default_rows(entrant.batch_size, entrant.size.context, device)
    capture = device.type == "cuda" and options.capture is not False
    stepper = Stepper(model, optimizer, recipe, world, min(rows, entrant.batch_size), capture=capture)
    if device.type == "cuda" and options.micro_batch_size is None:
        fit_rows(stepper)
    return stepper, compiled


def measure_steps(entrant: Entrant, world: World, options: TrainOptions, steps: int) -> Row:
    """Median tokens a second and peak memory of `steps` steps (loss, backward, clipping, AdamW) after a warm-up.

    Memory is all that the step holds: weights, moments, gradients and activations, on CUDA by the allocator.
    """
    torch.manual_seed(0)
    vocab_size = entrant.size.vocab_size
    loader = RandomTokens(vocab_size, entrant.batch_size, entrant.size.context)
    if entrant.peer:
        if reason := PEERS[entrant.name].missing(world.device):
            return entrant.facts() | {"note": f"cannot run: {reason}"}
        stepper, compiled = their_stepper(entrant, world, options)
    else:
        stepper, compiled = our_stepper(entrant, loader, world, options)
    losses: list[torch.Tensor] = []
    on_cuda = world.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(world.device)

    def step() -> None:
        losses.append(stepper.step(len(losses) + 1, *next(loader))[0])

    times = seconds_of(step, world.device, steps, warmup=WARMUP)
    if stepper.sentinel.first_bad_step() is not None:
        return entrant.facts() | {"note": "the loss or a gradient is not finite, so it gets no time"}
    if wrong := wrong_loss(losses[0].item(), vocab_size):
        return entrant.facts() | {"note": wrong}
    last = losses[-1].item()
    if on_cuda:
        most = torch.cuda.max_memory_allocated(world.device)  # The warm-up's too: a captured step allocates nothing.
    else:
        stepper.optimizer.zero_grad(set_to_none=True)
        moments = [x for state in stepper.optimizer.state.values() for x in (state["exp_avg"], state["exp_avg_sq"])]
        held = sum(x.numel() * x.element_size() for x in (*stepper.model.parameters(), *moments))
        most = held + peak_bytes(step, world.device)
    tokens = entrant.batch_size * entrant.size.context
    params, rate = parameters(stepper.model), median([tokens / seconds for seconds in times])
    peak = peak_flops(device_name(world.device), entrant.recipe.precision)
    return entrant.facts() | {
        "params": params,
        "micro_batch_size": stepper.rows,
        "compiled": compiled,
        "tokens_per_second": rate,
        "seconds_per_step": median(times),
        "mfu": utilization(entrant.training_flops_per_token(), rate, peak),
        "mfu_6n": utilization(6 * params, rate, peak),
        "peak_flops": peak,
        "captured": stepper.capture,
        "recompute": options.recompute and not entrant.peer,
        "peak_bytes": most,
        "first_loss": losses[0].item(),
        "loss": last,
    }


def compare(entrants: Sequence[Entrant], world: World, options: TrainOptions, steps: int) -> list[Row]:
    """A row an entrant, told on stderr as it comes; nothing of one model is left in memory when the next begins, and
    one that breaks costs the others nothing. A peer that breaks when captured is measured again as it is."""
    rows: list[Row] = []
    with until_interrupted():
        for entrant in entrants:
            row = _attempt(entrant, world, options, steps)
            first = (rows or [row])[0].get("tokens_per_second")
            if first and "tokens_per_second" in row:
                row["over_first"] = row["tokens_per_second"] / first
            rows.append(row)
            print(f"{row['model']}: {row.get('note') or _in_short(row)}", file=sys.stderr)
    return rows


def _attempt(entrant: Entrant, world: World, options: TrainOptions, steps: int) -> Row:
    again = False
    try:
        with use_backend(**dict(entrant.backends)):
            row = measure_steps(entrant, world, options, steps)
    except UserError as error:
        row = entrant.facts() | {"note": f"cannot run: {error}"}
        if isinstance(error.__context__, torch.OutOfMemoryError):
            row |= OUT_OF_MEMORY
    except torch.OutOfMemoryError:
        row = entrant.facts() | OUT_OF_MEMORY
    except Exception as error:
        row = entrant.facts() | {"note": failure(error)}
        again = entrant.peer and world.device.type == "cuda" and options.capture is not False
    if row.get("compiled"):
        torch.compiler.reset()
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return _attempt(entrant, world, replace(options, capture=False), steps) if again else row


def _in_short(row: Row) -> str:
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    return f"{row['tokens_per_second']:,.0f} tokens/s{mfu}, peak {row['peak_bytes'] / 1e9:.1f} GB"


def _resized(size: Size, width: int | None, length: int | None) -> Size:
    """Raises `UserError` for a width that is not so many heads of the size's own."""
    head_width, width = size.d_model // size.num_heads, width or size.d_model
    if width % head_width:
        raise UserError(f"--width {width} is not a multiple of {head_width}, the width of a head of size {size.name!r}")
    return size._replace(d_model=width, num_heads=width // head_width, context=length or size.context)


def parse_backends(choices: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """From `operator=backend` texts. Raises `UserError` for what is no such pair or names what is not there."""
    pairs = [choice.partition("=") for choice in choices]
    for choice, (operator, sign, _) in zip(choices, pairs, strict=True):
        if not operator or not sign:
            raise UserError(f"--backend: {choice!r} is no operator=backend pair; give one such as attention=naive")
    backends = tuple((operator, name) for operator, _, name in pairs)
    with use_backend(**dict(backends)):
        return backends


@app.command()
def train(
    model: Annotated[list[str] | None, typer.Option(help=f"May be repeated. Default: {', '.join(MODELS)}.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"Also one of {', '.join(PEERS)}. May be repeated.")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Also all of these peers.")] = False,
    size: Annotated[str | None, typer.Option(help="Default: wikitext103 on CUDA, smoke on a CPU.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 256 on CUDA, 8 on a CPU.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Training length, which windows follow. Default: the size's own.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=64, help="Of the models, with heads as wide as before. Default: the size's own.")
    ] = None,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="Default: as many as suit the device.")] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="bf16: autocast over float32 weights, as rodimus-lab trains; bf16-params: weights and moments too; "
            "tf32: products of float32 on tensor cores. "
            "Default: bf16 on CUDA, fp32 on a CPU."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="An operator's backend in our models, such as attention=naive.")
    ] = None,
    compile: Annotated[bool | None, typer.Option(help="Compile what can be. Default: on CUDA only.")] = None,
    recompute: Annotated[bool, typer.Option(help="Keep less of our models for the backward pass.")] = False,
    capture: Annotated[
        bool, typer.Option(help="Micro-batches as CUDA graphs, on CUDA; of peers where they can be.")
    ] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Timed steps. Default: 20 on CUDA, 3 on a CPU.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time whole training steps of our models and of others' in one process: tokens/s, MFU, peak memory, ratio to the
    first."""
    with session(device) as world:
        if world.size > 1:
            raise UserError("bench train measures one process; start it without torchrun")
        cuda = world.device.type == "cuda"
        size = size or ("wikitext103" if cuda else "smoke")
        precision = precision or ("bf16" if cuda else "fp32")
        batch_size = batch_size or (256 if cuda else 8)
        steps = steps or (20 if cuda else 3)
        if size not in SIZES:
            raise UserError(f"there is no size named {size!r}{did_you_mean(size, SIZES)}")
        scale = _resized(SIZES[size], width, seq_len)
        backends = parse_backends(backend or [])
        asked = list(PEERS) if peers else [PEERS.canonical(name) for name in peer or []]
        entrants = [Entrant(name, scale, batch_size, precision, backends=backends) for name in model or MODELS]
        entrants += [Entrant(name, scale, batch_size, precision, peer=True) for name in asked]
        for entrant in entrants:
            _ = entrant.recipe  # A model that is not there is named before anything is timed.
        options = TrainOptions(
            device=device,
            micro_batch_size=micro_batch_size,
            compile=compile,
            capture=capture,
            recompute=recompute,
            progress=False,
        )
        facts = surroundings(world)
        rows = compare(entrants, world, options, steps)
    settings = {
        "size": size,
        "width": scale.d_model,
        "batch": f"{batch_size} x {scale.context}",
        "precision": precision,
        "steps": steps,
    }
    show(Result("train", settings, rows, facts), COLUMNS, as_json)
