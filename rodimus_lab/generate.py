"""Generation: one prefill of the prompt, then a token at a time from the model's own state.

Shapes: B batch, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rodimus_lab.config import Config
from rodimus_lab.data import Tokenizer
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.ops.segments import Segments

PREFILL_CHUNK = 2048
REPLACEMENT = "\ufffd"


class Sampling(Config):
    """`temperature` 0 takes the likeliest token; `top_k` and `top_p` cut the tail first."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None


def stream(
    model: LanguageModel, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling | None = None
) -> Iterator[list[int]]:
    """The next token of every prompt, `max_new_tokens` times; prompts may differ in length.

    The memory is the prompt's state, constant for recurrent models however long the text. Raises `UserError` at once
    for an empty prompt or a token outside the vocabulary.
    """
    vocab_size = model.config.vocab_size
    for prompt in prompts:
        if not prompt:
            raise UserError("a prompt is empty; give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(f"a prompt holds a token outside the model's vocabulary of {vocab_size}; use its tokenizer")
    return _stream(model, prompts, max_new_tokens, sampling or Sampling())


@torch.inference_mode()  # As a decorator it does not reach into the caller between two tokens.
def _stream(
    model: LanguageModel, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int]]:
    device = model.embedding.weight.device
    generator = None if sampling.seed is None else torch.Generator(device).manual_seed(sampling.seed)
    length = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    present_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    ragged = any(len(prompt) < length for prompt in prompts)
    state = model.init_state(len(prompts), context=length + max_new_tokens)
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
    # The largest is 0 and the rest are doubles, so that no temperature, however low, divides to a NaN.
    logits_BV = logits_BV.double()
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        kept = logits_BV.topk(sampling.top_k)
        logits_BV = torch.full_like(logits_BV, float("-inf")).scatter(-1, kept.indices, kept.values)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = logits_BV.sort(descending=True)
        probabilities = ranked.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits_BV = logits_BV.masked_fill(dropped, float("-inf"))
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(-1)


def stream_text(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens` as they come, which go on from `prompt`, up to an end-of-document token.

    A character that takes several tokens is given once it is whole; one that the end cuts off is left out.
    """
    # Decoding begins one piece of text back, as some tokenizers spell the start of a text in another way.
    ids, start, given = list(prompt), 0, len(prompt)
    text = ""
    for token in tokens:
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        text = tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:given])) :]
        if text and not text.endswith(REPLACEMENT):
            yield text
            text, start, given = "", given, len(ids)
    if text := text.rstrip(REPLACEMENT):
        yield text
