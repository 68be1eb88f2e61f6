"""The commands that take a model as it lies on disk: a run of this project, or a checkpoint directory of any layout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from rodimus_lab.convert import Chat, ChatTokenizer, Layout, open_checkpoint, write_native, write_official
from rodimus_lab.data import Tokenizer
from rodimus_lab.device import device_type
from rodimus_lab.errors import UserError
from rodimus_lab.generate import Sampling, stream, stream_text
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.nn.zoo import with_official_cache

DeviceName = Literal["cpu", "cuda"]
MaxNewTokens = Annotated[int, typer.Option(help="Stop after so many tokens.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)]
TopK = Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens.", min=1)]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest that reach this probability.")]
Seed = Annotated[int | None, typer.Option(help="Draw the same text every time.", min=0, max=2**63 - 1)]
DeviceOption = Annotated[DeviceName | None, typer.Option(help="Default: cuda where there is one.")]
OfficialCache = Annotated[
    bool, typer.Option("--official-cache-compat", help="Decode with the defects of the authors' published cache.")
]


def generate(
    run: Annotated[str, typer.Argument(help="A run id, or a checkpoint directory, the authors' or fla's too.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text, which is one token; may be repeated.")
    ] = None,
    seed: Seed = None,
    device: DeviceOption = None,
    official_cache_compat: OfficialCache = False,
) -> None:
    """Continue a prompt with a trained run or a checkpoint."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    model, tokenizer = _load(run, device, official_cache_compat)
    ids = tokenizer.encode(_valid(prompt))
    stop_ids = [_stop_token(tokenizer, text) for text in stop or ()]
    drawn = (next_B[0] for next_B in stream(model, [ids], max_new_tokens, sampling, stop=[tokenizer.eos_id, *stop_ids]))
    tokens = takewhile(lambda token: token not in stop_ids, drawn)
    print(prompt, end="", flush=True)
    _print_all(stream_text(tokenizer, ids, tokens))


def chat(
    run: Annotated[str, typer.Argument(help="A run id, or a checkpoint directory, the authors' or fla's too.")],
    message: Annotated[
        list[str] | None, typer.Option(help="Say this and end; may be repeated. Default: each line of the input.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told of itself first.")] = None,
    max_new_tokens: MaxNewTokens = 2048,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    seed: Seed = None,
    device: DeviceOption = None,
    official_cache_compat: OfficialCache = False,
) -> None:
    """Talk to a chat model in the authors' format, the whole conversation in its prompt."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    model, tokenizer = _load(run, device, official_cache_compat)
    encoder, conversation = ChatTokenizer(tokenizer), Chat(system=None if system is None else _valid(system))
    for line in message if message is not None else _lines():
        conversation.add("HUMAN", _valid(line))
        ids = encoder.encode(conversation.prompt)
        drawn = (next_B[0] for next_B in stream(model, [ids], max_new_tokens, sampling, stop=[tokenizer.eos_id]))
        conversation.add("ASSISTANT", _print_all(stream_text(tokenizer, ids, drawn)))


def convert(
    source: Annotated[str, typer.Argument(help="A run id, or a checkpoint directory.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    from_: Annotated[
        Layout | None, typer.Option("--from", help="The source's layout. Default: as it is found.")
    ] = None,
    to: Annotated[Literal["native", "official"], typer.Option(help="The target's layout.")] = "native",
) -> None:
    """Convert a run, or a checkpoint of the authors or of flash-linear-attention, to what rodimus_lab.hf reads, or to
    the authors' layout."""
    checkpoint = open_checkpoint(source, from_)
    (write_official if to == "official" else write_native)(checkpoint, target)
    print(f"{target}: {checkpoint.config.num_params():,} parameters, from the layout {checkpoint.layout}")


def _load(name: str | Path, device: DeviceName | None, official_cache_compat: bool) -> tuple[LanguageModel, Tokenizer]:
    """The model of a run or a checkpoint directory, in float32 on a CPU and else as stored; and its tokenizer."""
    where = device_type(device)
    checkpoint = open_checkpoint(name)
    if official_cache_compat:
        checkpoint = checkpoint._replace(config=with_official_cache(checkpoint.config))
    tokenizer = checkpoint.tokenizer()
    return checkpoint.build(device=where, dtype=torch.float32 if where == "cpu" else None), tokenizer


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8; give it in that encoding") from None
    return text


def _lines() -> Iterator[str]:
    """What is typed, line by line, without the empty ones; a prompt before each where somebody types."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _print_all(pieces: Iterable[str]) -> str:
    """Print text as it comes, and give all of it."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def _stop_token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise UserError(f"{text!r} is {len(ids)} tokens of {tokenizer.name}, not one; give a stop of one token")
    return ids[0]
