"""Generation: one prefill of the prompt, then a token at a time from the model's own state.

Shapes: B batch, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rodimus_lab.config import Config
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.ops.segments import Segments

PREFILL_CHUNK = 2048


class Sampling(Config):
    """`temperature` 0 takes the likeliest token; `top_k` and `top_p` cut the tail first."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None


def stream(
    model: LanguageModel, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling | None = None
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, `max_new_tokens` times; prompts may differ in length.

    The memory is the prompt's state, constant for recurrent models however long the text. Raises `UserError` for an
    empty prompt or a token outside the vocabulary.
    """
    sampling = sampling or Sampling()
    vocab_size = model.config.vocab_size
    for prompt in prompts:
        if not prompt:
            raise UserError("a prompt is empty; give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(f"a prompt holds a token outside the model's vocabulary of {vocab_size}; use its tokenizer")
    device = model.embedding.weight.device
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(device).manual_seed(sampling.seed)
    length = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    present_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    ragged = any(len(prompt) < length for prompt in prompts)
    state = model.init_state(len(prompts), context=length + max_new_tokens)
    with torch.inference_mode():
        x_BTD = None
        for start in range(0, length, PREFILL_CHUNK):
            rows = slice(start, start + PREFILL_CHUNK)
            segments = Segments.from_mask(present_BT[:, rows]) if ragged else None
            x_BTD, new_state = model.hidden(ids_BT[:, rows], state, segments)
            assert new_state is not None
            state = new_state
        for step in range(max_new_tokens):
            assert x_BTD is not None
            next_B = sample(model.logits(x_BTD[:, -1]), sampling, generator)
            yield next_B.tolist()
            if step + 1 < max_new_tokens:
                x_BTD, new_state = model.hidden(next_B.unsqueeze(1), state)
                assert new_state is not None
                state = new_state


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """token_B drawn from softmax(logits / temperature), cut to the `top_k` likeliest, then to the smallest set whose
    probability reaches `top_p`."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = logits_BV.sort(descending=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits_BV = logits_BV.masked_fill(dropped, float("-inf"))
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(-1)
