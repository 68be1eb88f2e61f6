"""One optimizer step: micro-batches, clipping, the update that a value that is not finite cannot spoil.

Shapes: B batch (this rank's rows of the global batch), T time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import IGNORE, LanguageModel
from rodimus_lab.recipe import Recipe
from rodimus_lab.scoring import autocast
from rodimus_lab.train.capture import CapturedMicroBatch
from rodimus_lab.train.distributed import World, whole
from rodimus_lab.train.optimizer import set_learning_rate
from rodimus_lab.train.schedule import learning_rate
from rodimus_lab.train.sentinel import Sentinel

MICRO_BATCH_TOKENS = {"cuda": 1 << 16, "cpu": 1 << 14}


# Steps before a capture: kernels are compiled and libraries set up by then.
EAGER_STEPS = 2


class Stepper:
    """Does the steps of a recipe on a model. Nothing in it waits for the device.

    With `capture`, for one process with CUDA and batches that are all of one size, micro-batches become CUDA graphs
    after a few steps.
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
    ):
        self.model, self.optimizer, self.recipe, self.world = model, optimizer, recipe, world
        self.rows, self.capture = rows, capture
        self._steps = 0
        self._captured: CapturedMicroBatch | None = None
        self.sentinel = Sentinel(world.device)
        self._parameters = list(model.parameters())

    def rate(self, step: int) -> float:
        return learning_rate(self.recipe.schedule, self.recipe.optimizer.lr, step, self.recipe.budget.steps)

    def step(self, step: int, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights. Returns the loss of the global batch before the update and its gradient's norm before
        clipping, on the device. Once either is not finite, no step updates anything any more."""
        loss = self.backward(inputs_BT, targets_BT, capture=self.capture and self._steps >= EAGER_STEPS)
        self._steps += 1
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if self.recipe.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.recipe.optimizer.clip_norm, norm)
        self.optimizer.found_inf = self.sentinel.watch(step, loss, norm)  # type: ignore[attr-defined]
        set_learning_rate(self.optimizer, self.rate(step))
        self.optimizer.step()
        return loss, norm

    def backward(self, inputs_BT: Tensor, targets_BT: Tensor, *, capture: bool = False) -> Tensor:
        """Leave in the parameters the gradient of the mean loss over the counted tokens of the global batch, and return
        that loss (nats). The micro-batches, `rows` rows each, do not show in the result."""
        inputs_BT, targets_BT = self._to_device(inputs_BT), self._to_device(targets_BT)
        counted = self.world.sum((targets_BT != IGNORE).sum()).clamp(min=1)
        scale = self.world.size / counted  # FSDP averages the ranks' gradients.
        total = torch.zeros((), device=self.world.device)
        micro_batches = list(zip(inputs_BT.split(self.rows), targets_BT.split(self.rows), strict=True))
        if not capture:
            self._captured = None
            self.optimizer.zero_grad(set_to_none=True)
        elif self._captured is None:
            several = len(micro_batches) > 1
            self._captured = CapturedMicroBatch(
                self._accumulate, self._parameters, *micro_batches[0], scale, several=several
            )
        for index, (inputs, targets) in enumerate(micro_batches):
            if self._captured is None:
                total += self._accumulate(inputs, targets, scale)
            else:
                total += self._captured(index, inputs, targets, scale)
        return self.world.sum(total) / counted

    def _accumulate(self, inputs_BT: Tensor, targets_BT: Tensor, scale: Tensor) -> Tensor:
        """Add the gradient of scale * the summed loss of a micro-batch, and return that loss."""
        with autocast(self.world.device, self.recipe.precision):
            loss = self.model.loss(inputs_BT, targets_BT, reduction="sum")
        (loss * scale).backward()
        return loss.detach()

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.world.device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self.world.device, non_blocking=True)


def default_rows(rows: int, seq_len: int, device: torch.device) -> int:
    """Rows of a micro-batch: the largest divisor of `rows` that is one row or a good load for the device."""
    limit = MICRO_BATCH_TOKENS[device.type]
    return max(d for d in range(1, rows + 1) if rows % d == 0 and (d == 1 or d * seq_len <= limit))


def fit_rows(stepper: Stepper) -> None:
    """Shrink `stepper.rows`, divisor by divisor, until one micro-batch of random tokens fits into the GPU's memory.

    The random state is left as it was. Raises `UserError` where a single row does not fit.
    """
    seq_len, vocab, device = stepper.recipe.data.seq_len, stepper.recipe.model.vocab_size, stepper.world.device
    with torch.random.fork_rng(devices=[device]):
        while True:
            ids_BT = torch.randint(vocab, (stepper.rows, seq_len), device=device)
            try:
                stepper.backward(ids_BT, ids_BT)
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
