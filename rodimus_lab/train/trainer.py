"""The training loop, the same for every recipe.

Shapes: B batch, T time.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rodimus_lab.device import device_name
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import RECORD, RunDir, environment, runs_root
from rodimus_lab.scoring import set_matmul_precision
from rodimus_lab.train.checkpoint import CheckpointStore, hold
from rodimus_lab.train.distributed import World, session, whole
from rodimus_lab.train.evaluation import evaluate, note_evaluation
from rodimus_lab.train.feed import Batch, Feed, OpenFeed, open_feed
from rodimus_lab.train.journal import TIMING, Board, Timing, device_facts, device_label, rounded
from rodimus_lab.train.optimizer import build_optimizer, decay_groups, moments, set_updates, without_block_numbers
from rodimus_lab.train.progress import Progress
from rodimus_lab.train.sentinel import NonFiniteError, find_non_finite
from rodimus_lab.train.signals import Interrupted, StopSignal
from rodimus_lab.train.step import Stepper, default_rows, fit_rows, fit_rows_alone
from rodimus_lab.train.throughput import Stopwatch, median, peak_flops, utilization
from rodimus_lab.weights import FINAL, checkpoints_root, save_model

LOGGED_LINES = 500
BEST = "best"


@dataclass(frozen=True)
class TrainOptions:
    """What does not change a run's outcome.

    `device`: cpu or cuda, by default cuda where there is one. `micro_batch_size`: rows at a time on a rank, by default
    as many as suit the device. `compile`: by default on CUDA only, and not where sequences are split. `capture`:
    micro-batches as CUDA graphs, by default for one process with CUDA. `recompute` saves memory for some time
    (`nn/recompute.py`); where dropout is drawn again for it, nothing is captured. `checkpoint_every` steps, the newest
    `keep_last` are kept; with `async_save` training goes on while they are written. With several ranks, `replicas`
    groups of them each hold the whole model, and each `sequence_parallel` of them share their sequences.
    `stop_at_step` and `max_seconds` end a session early, with a checkpoint. `resume=False` starts an unfinished run
    afresh.
    """

    device: str | None = None
    micro_batch_size: int | None = None
    compile: bool | None = None
    capture: bool | None = None
    recompute: bool = False
    checkpoint_every: int = 1000
    keep_last: int = 2
    async_save: bool = False
    replicas: int = 1
    sequence_parallel: int = 1
    runs_root: Path | None = None
    checkpoints_root: Path | None = None
    progress: bool = True
    tensorboard: bool = False
    stop_at_step: int | None = None
    max_seconds: float | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        for name in (
            "micro_batch_size",
            "checkpoint_every",
            "keep_last",
            "stop_at_step",
            "replicas",
            "sequence_parallel",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.max_seconds is not None and not self.max_seconds >= 0:
            raise UserError(f"max_seconds is {self.max_seconds:g}; it must not be negative")


@dataclass
class TrainState:
    """Where a run is, beside its weights. `window` sums the loss and the gradient norm since the last logged step."""

    step: int = 0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0])
    metrics: dict[str, float] = field(default_factory=dict)
    stale_evaluations: int = 0
    metrics_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None


def train(recipe: Recipe, options: TrainOptions | None = None, *, open_feed: OpenFeed = open_feed) -> dict[str, Any]:
    """Train a recipe to its end and return its record; a finished one is returned as it is, a broken one resumed.

    Raises `Interrupted` where the session ended before the run, `NonFiniteError` where a loss or gradient was not
    finite, and `UserError` for what stands in the way.
    """
    options = options or TrainOptions()
    groups = {"replicas": options.replicas, "parts": options.sequence_parallel}
    with session(options.device, **groups) as world, ExitStack() as stack:
        run = RunDir(options.runs_root or runs_root(), recipe.experiment, recipe.id)
        folder = (options.checkpoints_root or checkpoints_root()) / recipe.experiment / recipe.id
        if world.from_main(run.finished):
            if world.main:
                Progress(recipe.id, 0, enabled=False).say(f"{recipe.id} is finished; its record is {run.path / RECORD}")
            return run.read_record()
        if world.main:
            stack.enter_context(hold(folder))
        if world.from_main(run.finished):  # By another process, between the first look and the hold.
            return run.read_record()
        if world.main and not options.resume:
            for old in (*folder.glob("step-*"), folder / BEST):
                shutil.rmtree(old, ignore_errors=True)
            (folder / TIMING).unlink(missing_ok=True)
        gc.collect()  # Sharded models refer to themselves; an earlier one's memory is this run's.
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            return Trainer(recipe, open_feed(recipe, world), options, run, world, folder).fit()
        except torch.OutOfMemoryError:
            raise UserError(f"{recipe.id} does not fit into the GPU's memory; choose a smaller micro-batch") from None


class Trainer:
    """One session of one run. `run` is where its records go, `folder` where its checkpoints go."""

    def __init__(self, recipe: Recipe, feed: Feed, options: TrainOptions, run: RunDir, world: World, folder: Path):
        self.recipe, self.feed, self.options = recipe, feed, options
        self.run, self.world, self.folder = run, world, folder
        batch, seq_len, device = recipe.budget.batch_size, recipe.data.seq_len, world.device
        if batch % world.data_size:
            raise UserError(f"a batch of {batch} sequences does not divide over {world.data_size} ranks; start fewer")
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)  # What an earlier run of this process took is not this one's.
        set_matmul_precision(device, recipe.precision)
        torch.manual_seed(recipe.seed)
        self.model = recipe.model.build()
        self.groups = decay_groups(self.model)
        if world.parts > 1:
            self._check_parts()
        self.params = sum(p.numel() for p in self.model.parameters())
        for block in self.model.blocks:
            block.recompute = options.recompute  # type: ignore[assignment]
        self.compiled = on_cuda and world.parts == 1 if options.compile is None else options.compile
        if self.compiled:
            compile_blocks(self.model)
        share = batch // world.data_size
        rows = min(options.micro_batch_size or default_rows(share, seq_len // world.parts, device), share)
        fitting = on_cuda and options.micro_batch_size is None
        if fitting and world.size > 1:
            tried = self._first_batch() if feed.questions else None
            alone = fit_rows_alone(self.model, recipe, world, rows, end_token=feed.end_token, batch=tried)
            rows = min(world.gather(alone))
        world.place(self.model)
        torch.manual_seed(recipe.seed + world.rank)  # Dropout differs from rank to rank.
        self.model.train()
        self.optimizer = build_optimizer(self.model, self.groups, recipe.optimizer)
        self.moments = moments(self.model, self.optimizer)
        self.state = TrainState()
        self.window = torch.zeros(2, dtype=torch.float64, device=device)
        redrawn = options.recompute and recipe.model.dropout > 0  # See `nn/recompute.py`.
        capture = on_cuda and world.size == 1 and options.capture is not False and not redrawn
        self.stepper = Stepper(
            self.model,
            self.optimizer,
            recipe,
            world,
            rows,
            capture=capture,
            end_token=feed.end_token,
        )
        if fitting and world.size == 1:
            fit_rows(self.stepper, self._first_batch() if feed.questions else None)
        self.store = CheckpointStore(folder, world, keep_last=options.keep_last)
        self.timing = Timing(folder)
        self.watch = Stopwatch(world.wait)
        self.progress = Progress(recipe.id, recipe.budget.steps, enabled=options.progress and world.main)
        self.tokens_per_step = batch * seq_len
        self.log_every = math.ceil(recipe.budget.steps / LOGGED_LINES)
        self.flops_per_token = recipe.model.training_flops_per_token(seq_len)
        peak = peak_flops(device_name(device), recipe.precision)
        # Of questions, the head sees so few tokens that FLOPs a token would mislead.
        self.peak = None if peak is None or feed.questions else peak * world.size

    def _check_parts(self) -> None:
        parts, seq_len = self.world.parts, self.recipe.data.seq_len
        if seq_len % parts:
            raise UserError(f"sequences of {seq_len} tokens do not divide over {parts} ranks; choose a divisor")
        if self.feed.questions or self.feed.answers:
            raise UserError("questions and answers are not split over ranks; leave out sequence_parallel")
        if self.feed.end_token is not None:
            raise UserError("packed documents are not split over ranks; leave out sequence_parallel or packed")
        self.model.check_splits_sequence()

    @property
    def done(self) -> bool:
        budget = self.recipe.budget
        stopped_early = budget.patience is not None and self.state.stale_evaluations >= budget.patience
        enough = any(self.state.metrics.get(name, -math.inf) > value for name, value in self.feed.enough.items())
        return self.state.step >= budget.steps or stopped_early or enough

    def fit(self) -> dict[str, Any]:
        """Train from the last checkpoint to the end of the budget, and return the record."""
        self._start()
        with StopSignal() as signals, self.progress:
            while not self.done:
                self._step()
                self._after_step()
                self._maybe_stop(signals)
        self.board.close()
        return self._finish()

    def _start(self) -> None:
        self._began = time.monotonic()
        facts = dict(self.feed.facts)
        saved = self.store.restore(self._tensors(), self.progress.say if self.world.main else lambda _: None)
        if saved is not None:
            if saved["data"] != facts:
                raise UserError(
                    f"the data of {self.recipe.id} is not what its checkpoint was trained on; restore the data"
                )
            self.feed.train.load_state_dict(saved["loader"])
            self.state = TrainState(**saved["state"])
            self.window.copy_(torch.tensor(self.state.window, dtype=torch.float64))
            set_updates(self.optimizer, self.state.step)
        self._anchor = (self.state.step, self.feed.train.state_dict())
        self.seconds_before = self.state.seconds
        if self.world.main:
            self.run.create(self.recipe.to_dict())
            self.run.truncate_metrics(self.state.metrics_bytes)
            self.env = (
                environment()
                | device_facts(self.world)
                | {
                    "data": facts,
                    "micro_batch_size": self.stepper.rows,
                    "compile": self.compiled,
                    "recompute": self.options.recompute,
                    "no_weight_decay": without_block_numbers(self.groups.no_decay),
                }
            )
            self.run.write_env(self.env)
        self.board = Board(
            self.folder / "tensorboard" if self.options.tensorboard and self.world.main else None, self.state.step
        )
        self._say(
            f"{self.recipe.id}: {self.params:,} parameters ({len(self.groups.decay)} tensors with weight decay "
            f"{self.recipe.optimizer.weight_decay}, {len(self.groups.no_decay)} without), {self.stepper.rows} x "
            f"{self.recipe.data.seq_len} tokens a micro-batch on {device_label(self.world)}"
            + (f", resumed at step {self.state.step:,}" if self.state.step else "")
        )

    def _step(self) -> None:
        batch = next(self.feed.train)
        self.state.step += 1
        loss, norm = self.stepper.step(self.state.step, *self.world.part_of(batch))
        self.window += torch.stack([loss, norm])

    def _first_batch(self) -> Batch:
        """The next batch, which stays the next."""
        place = self.feed.train.state_dict()
        batch = next(self.feed.train)
        self.feed.train.load_state_dict(place)
        return batch

    def _after_step(self) -> None:
        step, budget = self.state.step, self.recipe.budget
        last = step == budget.steps
        log, test = last or step % self.log_every == 0, last or step % budget.eval_every == 0
        save = step % self.options.checkpoint_every == 0 and not last
        if log or test or save:
            self._check()
        if log:
            self._log()
            self.store.settle()
        if test:
            self._evaluate()
        if save:
            self._save()
        self.progress.advance(step)

    def _check(self) -> None:
        """Raise `NonFiniteError` where a value was not finite since the last check, naming the step and the place."""
        bad = self.stepper.sentinel.first_bad_step()
        if bad is None:
            self._anchor = (self.state.step, self.feed.train.state_dict())
            return
        step, loader_state = self._anchor
        self.feed.train.load_state_dict(loader_state)
        for _ in range(step, bad):
            batch = next(self.feed.train)
        name = find_non_finite(self.model, lambda: self.stepper.backward(*self.world.part_of(batch)))
        name = next(filter(None, self.world.gather(name)), "the loss or the gradient norm (not so when run again)")
        saved = self.store.steps()
        kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "no checkpoint was written yet"
        raise NonFiniteError(
            f"{self.recipe.id}: at step {bad} {name} is not finite; {kept}; lower the learning rate or mend the model"
        )

    def _log(self) -> None:
        step, steps = self.state.step, self.recipe.budget.steps
        count = (step - 1) % self.log_every + 1
        loss, norm = (value / count for value in self.window.tolist())
        self.window.zero_()
        line = {"step": step, "tokens": step * self.tokens_per_step}
        self._write(line | {"loss": loss, "lr": self.stepper.rate(step), "grad_norm": norm})
        self.state.metrics["train_loss"] = loss
        rate = self.watch.lap(line["tokens"])
        if self.world.main and rate is not None:
            self.timing.append(step, rate)
        left = None if rate is None else (steps - step) * self.tokens_per_step / rate
        self.progress.report(loss, rate, utilization(self.flops_per_token, rate, self.peak), left)

    def _evaluate(self) -> None:
        with self.watch.paused():
            new = evaluate(self.model, self.feed, self.world, self.stepper.rows, self.recipe.precision)
            for name, value in new.items():
                if not math.isfinite(value):
                    raise NonFiniteError(f"{self.recipe.id}: {name} is not finite at step {self.state.step}")
            step = self.state.step
            self._write({"step": step, "tokens": step * self.tokens_per_step} | new)
            self._say(f"step {step:,}  " + "  ".join(f"{name} {value:.4g}" for name, value in new.items()))
            self.state.metrics, better = note_evaluation(self.state.metrics, new)
            self.state.stale_evaluations = 0 if better else self.state.stale_evaluations + 1
            if better:
                self._export(BEST)

    def _save(self) -> None:
        with self.watch.paused():
            state, memory = self.state, self._peak_memory()
            state.window = self.window.tolist()
            state.metrics_bytes = self.run.metrics_size() if self.world.main else 0
            state.seconds, state.peak_memory_bytes = self._seconds(), memory
            values = {"state": asdict(state), "loader": self.feed.train.state_dict(), "data": dict(self.feed.facts)}
            self.store.save(state.step, self._tensors(), values, in_background=self.options.async_save)

    def _maybe_stop(self, signals: StopSignal) -> None:
        options, step = self.options, self.state.step
        late = options.max_seconds is not None and time.monotonic() - self._began >= options.max_seconds
        asked = options.stop_at_step is not None and step >= options.stop_at_step
        if self.done or not self.world.any(signals.received is not None or late or asked):
            return
        self._check()
        self._save()
        self.store.finish()
        numbers = [number for number in self.world.gather(signals.received) if number is not None]
        cause = f"by {numbers[0].name}" if numbers else "as asked"
        raise Interrupted(
            f"{self.recipe.id} was stopped {cause} after step {step} of {self.recipe.budget.steps}; its checkpoint is "
            f"written, and the same command goes on from there",
            128 + numbers[0] if numbers else 0,
        )

    def _finish(self) -> dict[str, Any]:
        self.store.finish()
        self._export(FINAL)
        memory = self._peak_memory()
        record: dict[str, Any] = {}
        if self.world.main:
            rate, state = median(self.timing.rates()), self.state
            metrics = dict.fromkeys(
                ("test_ppl", "valid_ppl", "best_test_ppl", "best_valid_ppl", "test_word_ppl", "valid_word_ppl")
            ) | rounded(state.metrics)
            metrics |= {
                "params": self.params,
                "tokens_per_second": rate,
                "mfu": utilization(self.flops_per_token, rate, self.peak),
                "mfu_6n": utilization(6 * self.params, rate, self.peak),
                "peak_memory_bytes": memory,
                "steps": state.step,
                "tokens": state.step * self.tokens_per_step,
                "seconds": round(self._seconds(), 3),
            }
            self.run.finish(
                {
                    "label": self.recipe.label,
                    "corpus": self.recipe.data.corpus,
                    "tokenizer": self.recipe.data.tokenizer,
                    "budget": self.recipe.budget.to_dict(),
                    "device": device_label(self.world),
                    "commit": self.env["commit"],
                    "metrics": metrics,
                }
                | ({} if (departure := self.recipe.departure) is None else {"departure": departure})
            )
            record = self.run.read_record()
        return self.world.from_main(record)

    def _export(self, name: str) -> None:
        """Whole weights, for generation and evaluation. Every rank takes part, the main one writes."""
        weights = {key: whole(tensor).cpu() for key, tensor in self.model.state_dict().items()}
        if self.world.main:
            save_model(self.folder / name, weights, self.recipe)

    def _write(self, values: dict[str, Any]) -> None:
        if self.world.main:
            self.run.append_metrics(rounded(values))
            self.board.add(values)

    def _say(self, text: str) -> None:
        if self.world.main and self.options.progress:
            self.progress.say(text)

    def _tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict() | self.moments

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self._began

    def _peak_memory(self) -> int | None:
        """Most bytes that tensors took on a GPU so far, over ranks and sessions; None on a CPU."""
        if self.world.device.type != "cuda":
            return None
        now = max(self.world.gather(torch.cuda.max_memory_allocated(self.world.device)))
        return max(now, self.state.peak_memory_bytes or 0)


def compile_blocks(model: LanguageModel) -> None:
    """Compile each block by itself, in place: blocks that are alike share one graph, and names stay as they are. So is
    the embedding, as torch's own kernel is slow at narrow rows."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024
    model.embedding.compile(dynamic=False)
    for block in model.blocks:
        block.compile(dynamic=False)
