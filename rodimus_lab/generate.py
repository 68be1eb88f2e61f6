"""Generation: one prefill of the prompts, then a token at a time as `Decoder` draws them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rodimus_lab.data import Tokenizer
from rodimus_lab.decoder import Decoder, check_prompts
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.sampling import Sampling, sample

__all__ = ["Sampling", "sample", "stream", "stream_text"]

REPLACEMENT = "\ufffd"


def stream(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[int] = (),
) -> Iterator[list[int]]:
    """The next token of every prompt, `max_new_tokens` times; prompts may differ in length.

    A row that has drawn one of the tokens `stop` goes on repeating it, and the stream ends once every row does. The
    memory is the state's, constant for recurrent models however long the text. Raises `UserError` at once for no prompt
    or an empty one, a token outside the vocabulary or less than no new token.
    """
    if max_new_tokens < 0:
        raise UserError(f"there cannot be {max_new_tokens} new tokens; give max_new_tokens of 0 or more")
    check_prompts(prompts, model.config.vocab_size)
    return _stream(model, prompts, max_new_tokens, sampling, stop)


def _stream(
    model: LanguageModel, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling | None, stop: Sequence[int]
) -> Iterator[list[int]]:
    context = max(len(prompt) for prompt in prompts) + max_new_tokens
    decoder = Decoder(model, len(prompts), context, sampling, stop=stop)
    decoder.prefill(prompts)
    yield from decoder.tokens(max_new_tokens)


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
