"""One optimizer step: micro-batches, clipping, the update that a value that is not finite cannot spoil.

Shapes: B batch (this rank's rows of the global batch), T time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import IGNORE, LanguageModel
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sequence import sharded_sequence
from rodimus_lab.recipe import Recipe
from rodimus_lab.scoring import autocast
from rodimus_lab.train.capture import CapturedMicroBatch, CapturedStep
from rodimus_lab.train.distributed import World, whole
from rodimus_lab.train.optimizer import make_capturable, set_learning_rate
from rodimus_lab.train.schedule import learning_rate
from rodimus_lab.train.sentinel import Sentinel

MICRO_BATCH_TOKENS = {"cuda": 1 << 16, "cpu": 1 << 14}
# Share of a GPU's memory for what the ranks gather of one another's shards.
SPARE = 0.05
# Steps before a capture: kernels are compiled and libraries set up by then.
EAGER_STEPS = 2


class Stepper:
    """Does the steps of a recipe on a model. Nothing in it waits for the device.

    With `capture`, for one process with CUDA and batches that are all of one size, micro-batches become CUDA graphs
    after a few steps; where a step has only one of them, the whole step does, the update included. With `end_token`
    documents are packed and end there.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.AdamW,
        recipe: Recipe,
        world: World,
        rows: int,
        *,
        capture: bool = False,
        end_token: int | None = None,
    ):
        self.end_token = end_token
        self.model, self.optimizer, self.recipe, self.world = model, optimizer, recipe, world
        self.rows, self.capture = rows, capture
        self._steps = 0
        self._captured: CapturedMicroBatch | None = None
        self._whole: CapturedStep | None = None
        self._number = torch.zeros((), dtype=torch.int64, device=world.device)
        self.sentinel = Sentinel(world.device)
        self._parameters = list(model.parameters())

    def rate(self, step: int) -> float:
        budget = self.recipe.budget
        return learning_rate(
            self.recipe.schedule, self.recipe.optimizer.lr, step, budget.steps, eval_every=budget.eval_every
        )

    def step(self, step: int, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights. Returns the loss of the global batch before the update and its gradient's norm before
        clipping, on the device. Once either is not finite, no step updates anything any more."""
        batch = self._to_device(batch)
        capture = self.capture and self._steps >= EAGER_STEPS
        self._steps += 1
        if capture and batch[0].shape[0] <= self.rows:
            if self._whole is None:
                self.optimizer.zero_grad(set_to_none=True)
                self._captured = None
                make_capturable(self.optimizer, self.world.device)
                self._whole = CapturedStep(self._eagerly, self._number, *batch)
            set_learning_rate(self.optimizer, self.rate(step))
            loss, norm = self._whole(self._number.fill_(step), *batch)
            return loss, norm
        set_learning_rate(self.optimizer, self.rate(step))
        return self._update(step, self.backward(*batch, capture=capture))

    def _eagerly(self, number: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(number, self.backward(*batch))

    def _update(self, step: int | Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if self.recipe.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.recipe.optimizer.clip_norm, norm)
        self.optimizer.found_inf = self.sentinel.watch(step, loss, norm)  # type: ignore[attr-defined]
        self.optimizer.step()
        return loss, norm

    def backward(self, *batch: Tensor, capture: bool = False) -> Tensor:
        """Leave in the parameters the gradient of the mean loss over the counted tokens of the global batch, and return
        that loss (nats). The micro-batches, `rows` rows each, do not show in the result."""
        batch = self._to_device(batch)
        counted = self.world.sum((batch[1] != IGNORE).sum()).clamp(min=1)
        scale = self.world.size / counted  # FSDP averages the ranks' gradients.
        total = torch.zeros((), device=self.world.device)
        micro_batches = list(zip(*(tensor.split(self.rows) for tensor in batch), strict=True))
        if not capture:
            self._captured = None
            self.optimizer.zero_grad(set_to_none=True)
        elif self._captured is None:
            several = len(micro_batches) > 1
            self._captured = CapturedMicroBatch(
                self._accumulate, self._parameters, scale, *micro_batches[0], several=several
            )
        for index, micro_batch in enumerate(micro_batches):
            self.world.share_gradients(self.model, index == len(micro_batches) - 1)
            if self._captured is None:
                total += self._accumulate(scale, *micro_batch)
            else:
                total += self._captured(index, scale, *micro_batch)
        return self.world.sum(total) / counted

    def _accumulate(
        self, scale: Tensor, inputs_BT: Tensor, targets: Tensor, positions_BP: Tensor | None = None
    ) -> Tensor:
        """Add the gradient of scale * the summed loss of a micro-batch, and return that loss."""
        with autocast(self.world.device, self.recipe.precision):
            if positions_BP is None:
                packed: dict[str, Any] = {}
                if self.end_token is not None:
                    packed["segments"] = Segments.after_ends(inputs_BT, self.end_token)
                loss = self.model.loss(inputs_BT, targets, reduction="sum", **packed)
            else:
                loss = self.model.loss(inputs_BT, targets, positions_BP=positions_BP, reduction="sum")
        (loss * scale).backward()
        return loss.detach()

    def _to_device(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        device = self.world.device
        if device.type == "cuda":
            batch = tuple(tensor if tensor.is_cuda else tensor.pin_memory() for tensor in batch)
        return tuple(tensor.to(device, non_blocking=True) for tensor in batch)


def default_rows(rows: int, seq_len: int, device: torch.device) -> int:
    """Rows of a micro-batch: the largest divisor of `rows` that is one row or a good load for the device."""
    limit = MICRO_BATCH_TOKENS[device.type]
    return max(d for d in range(1, rows + 1) if rows % d == 0 and (d == 1 or d * seq_len <= limit))


def fit_rows(stepper: Stepper, batch: tuple[Tensor, ...] | None = None) -> None:
    """Shrink `stepper.rows`, divisor by divisor, until a micro-batch, of `batch` or else of random tokens, fits into
    the GPU's memory: where a step has several, one beside the gradients that another left.

    The random state is left as it was. Raises `UserError` where a single row does not fit.
    """
    seq_len, vocab, device = stepper.recipe.data.seq_len, stepper.recipe.model.vocab_size, stepper.world.device
    share = stepper.recipe.budget.batch_size // stepper.world.data_size
    with torch.random.fork_rng(devices=[device]):
        while True:
            rows = max(stepper.rows, min(2 * stepper.rows, share))
            if batch is None:
                trial: tuple[Tensor, ...] = (torch.randint(vocab, (rows, seq_len), device=device),) * 2
            else:
                trial = tuple(tensor[:rows] for tensor in batch)
            try:
                stepper.backward(*trial)
                break
            except torch.OutOfMemoryError:
                if stepper.rows == 1:
                    raise UserError(
                        f"one sequence of {seq_len} tokens does not fit into the GPU's memory; train on several GPUs"
                    ) from None
            stepper.rows = max(d for d in range(1, stepper.rows) if stepper.rows % d == 0)
            stepper.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    stepper.optimizer.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats(device)


def fit_rows_alone(
    model: LanguageModel,
    recipe: Recipe,
    world: World,
    rows: int,
    *,
    end_token: int | None = None,
    batch: tuple[Tensor, ...] | None = None,
) -> int:
    """`fit_rows` for a rank of several, before the model is sharded: each tries by itself, for one that ran out of
    memory inside a collective would leave the others waiting. One row is the least; it may fit once all is sharded.

    What this rank's shards and its own whole gradients will take beyond the whole weights of the trial is held
    meanwhile.
    """
    device, shards, fitting = world.device, world.size // world.replicas, 1
    alone = recipe.replace(budget=recipe.budget.replace(batch_size=recipe.budget.batch_size // world.data_size))
    if world.parts > 1:
        alone = alone.replace(data=recipe.data.replace(seq_len=recipe.data.seq_len // world.parts))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    beyond = 4 * size // shards + SPARE * torch.cuda.get_device_properties(device).total_memory
    try:
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters())  # Without moments, as it makes no step.
        stepper = Stepper(model, optimizer, alone, World(0, 1, device), rows, end_token=end_token)
        held = torch.empty(int(beyond), dtype=torch.uint8, device=device)
        with sharded_sequence(None):
            fit_rows(stepper, batch)
        fitting = stepper.rows
        del held
    except (UserError, torch.OutOfMemoryError):
        model.to("cpu")  # Sharding takes it from there, piece by piece.
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return fitting
