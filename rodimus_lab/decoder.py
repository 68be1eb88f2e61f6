"""Decoding in place: a batch's state in buffers that stay where they are, its step captured once in a CUDA graph.

Shapes: B batch, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.nn.mixer import clear, overwrite, state_nbytes
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.ops.segments import Segments
from rodimus_lab.sampling import Sampling, sample
from rodimus_lab.scoring import scoring

PREFILL_CHUNK = 2048
WARMUP = 2


class Decoder:
    """Prefills a batch of prompts, then draws a token a row and a step.

    `context` is the most tokens a row will have, prompt and new ones together; the memory is the state's for that many
    from the start, and no step takes more. A row that has drawn one of the tokens `stop` goes on repeating it.
    `capture` makes the step, from the embedding to the drawn token, one CUDA graph; by default where there is CUDA.
    `state_dtype` is for `LanguageModel.init_state`. Raises `UserError` where there is no room for a row or a token.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        context: int,
        sampling: Sampling | None = None,
        *,
        stop: Sequence[int] = (),
        capture: bool | None = None,
        state_dtype: torch.dtype | None = None,
    ):
        if batch_size < 1 or context < 1:
            raise UserError(f"a decoder of {batch_size} rows and {context} tokens has no room; give it one of each")
        self.model, self.context, self.sampling = model, context, sampling or Sampling()
        device = model.embedding.weight.device
        with torch.inference_mode(False):  # Tensors made in that mode cannot be changed outside of it.
            self.state = model.init_state(batch_size, context=context, dtype=state_dtype)
            self.token_B = torch.zeros(batch_size, dtype=torch.long, device=device)
            self.finished_B = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.logits_BV: Tensor | None = None  # of the last step
        self.room = context
        self._stop = torch.tensor(sorted(set(stop)), dtype=torch.long, device=device)
        self._generator = None if self.sampling.seed is None else torch.Generator(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if capture if capture is not None else device.type == "cuda":
            self._graph = self._captured()

    @property
    def captured(self) -> bool:
        return self._graph is not None

    @property
    def state_bytes(self) -> int:
        return state_nbytes(self.state)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts, which may differ in length, and draw the first token of each row into `token_B`; without
        dropout, in training mode too.

        Whatever was read before is forgotten, and the seed starts anew. Raises `UserError` for an empty prompt, a
        token outside the vocabulary, a wrong number of prompts, or one that the context has no room for.
        """
        with scoring(self.model):
            self._prefill(prompts)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        check_prompts(prompts, self.model.config.vocab_size)
        length = max(len(prompt) for prompt in prompts)
        if len(prompts) != len(self.token_B):
            raise UserError(f"{len(prompts)} prompts do not fit a decoder of {len(self.token_B)} rows")
        if length > self.context:
            raise UserError(f"a prompt of {length} tokens is longer than the decoder's context of {self.context}")
        device = self.token_B.device
        ids_BT = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        present_BT = torch.arange(length, device=device) >= length - lengths_B1
        ragged = any(len(prompt) < length for prompt in prompts)
        self.reset()
        state: Any = self.state
        x_BTD = None
        for start in range(0, length, PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            segments = Segments.from_mask(present_BT[:, part]) if ragged else None
            x_BTD, state = self.model.hidden(ids_BT[:, part], state, segments)
        assert x_BTD is not None
        overwrite(self.state, state)
        self.room = self.context - length
        self._draw(self.model.logits(x_BTD[:, -1]))

    @torch.no_grad()
    def reset(self) -> None:
        """Back to before the first token."""
        clear(self.state)
        self.finished_B.zero_()
        self.room = self.context
        if self._generator is not None:
            self._generator.manual_seed(self.sampling.seed)  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self) -> None:
        """Read `token_B` and draw the next one into it, without waiting for the device.

        Raises `UserError` where the context is used up.
        """
        if self.room < 1:
            raise UserError(f"the decoder's context of {self.context} tokens is used up; give it a longer one")
        self.room -= 1
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def tokens(self, count: int) -> Iterator[list[int]]:
        """What is in `token_B`, then what the next steps draw: `count` in all, or until every row has stopped.

        On a GPU each step is started before the token of the one before it is handed on, so that it never waits for
        the caller. Raises `UserError` at once where the context has no room for them.
        """
        if count - 1 > self.room:
            raise UserError(f"{count} more tokens do not fit the decoder's context of {self.context}")
        return self._tokens(count)

    def _tokens(self, count: int) -> Iterator[list[int]]:
        stop = set(self._stop.tolist())
        ahead = 1 if self.token_B.is_cuda else 0
        copies = cycle([_HostCopy(self.token_B) for _ in range(1 + ahead)])
        pending = deque([next(copies).start()])
        for left in range(count, 0, -1):
            while len(pending) < min(1 + ahead, left):
                self.step()
                pending.append(next(copies).start())
            tokens = pending.popleft().wait()
            yield tokens
            if stop.issuperset(tokens):
                return

    def _step(self) -> None:
        self.logits_BV = self.model.step(self.token_B, self.state)
        self._draw(self.logits_BV)

    def _draw(self, logits_BV: Tensor) -> None:
        drawn_B = sample(logits_BV, self.sampling, self._generator)
        if len(self._stop):
            drawn_B = torch.where(self.finished_B, self.token_B, drawn_B)
            self.finished_B.copy_((drawn_B.unsqueeze(1) == self._stop).any(1))
        self.token_B.copy_(drawn_B)

    @torch.no_grad()
    def _captured(self) -> torch.cuda.CUDAGraph:
        device = self.token_B.device
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARMUP):
                self._step()
        torch.cuda.current_stream(device).wait_stream(aside)
        with torch.cuda.graph(graph):
            self._step()
        self.reset()
        return graph


class _HostCopy:
    """A tensor's values on their way to the host, which is kept waiting only by `wait`."""

    def __init__(self, source: Tensor):
        self.source = source
        self.host = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        self.arrived = torch.cuda.Event() if source.is_cuda else None

    def start(self) -> _HostCopy:
        self.host.copy_(self.source, non_blocking=True)
        if self.arrived is not None:
            self.arrived.record()
        return self

    def wait(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises `UserError` for no prompt, an empty one or a token outside the vocabulary."""
    if not len(prompts):
        raise UserError("there is no prompt; give at least one")
    for prompt in prompts:
        if not prompt:
            raise UserError("a prompt is empty; give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(f"a prompt holds a token outside the model's vocabulary of {vocab_size}; use its tokenizer")
