"""`bench decode`: the time of a decoding step, greedy, beside the time that reading the weights once takes.

The step is `Decoder`'s, on CUDA one graph from the token to the next. Before it is timed, its logits are compared over
a few tokens with the model's general path on a copy of the same state.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from torch import Tensor
from torch.utils._pytree import tree_map

from rodimus_lab.bench.measure import copy_rate, median_seconds
from rodimus_lab.bench.peers import DECODE_PEERS, OUT_OF_MEMORY
from rodimus_lab.bench.result import AsJson, Column, Device, Result, Row, app, show, surroundings, until_interrupted
from rodimus_lab.bench.training import parse_backends
from rodimus_lab.config import did_you_mean
from rodimus_lab.decoder import Decoder
from rodimus_lab.errors import UserError
from rodimus_lab.nn.mixer import State, state_nbytes
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.nn.zoo import SIZES, build_model, model_config
from rodimus_lab.ops.attention import KVCache
from rodimus_lab.ops.backend import use_backend
from rodimus_lab.sampling import Sampling
from rodimus_lab.train.distributed import session

DEFAULT_MODELS = ("rodimus", "rodimus+", "transformer++")
CHECKED, WARMUP, TIMED = 4, 8, 256
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
STATE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
READ_AT_MOST = {"cuda": 1 << 17, "cpu": 1 << 9}
COLUMNS = (
    Column("model", "model"),
    Column("batch_size", "batch"),
    Column("context", "context"),
    Column("seconds_per_token", "ms/token", 1e3, 3),
    Column("tokens_per_second", "tokens/s"),
    Column("floor_seconds", "floor ms", 1e3, 3),
    Column("of_floor", "% of floor", 100, 1),
    Column("of_floor_with_state", "with state %", 100, 1),
    Column("state_bytes", "state MB", 1e-6, 2),
    Column("generated", "generated"),
    Column("growth_bytes", "growth B"),
    Column("late_seconds_per_token", "then ms/token", 1e3, 3),
)


def weights_read(model: LanguageModel) -> int:
    """Bytes of the parameters that every step reads whole: all but the tables that single rows are looked up in."""
    tables = [model.positions] + [model.embedding] * (model.head is not None)
    looked_up = {id(table.weight) for table in tables if table is not None}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in looked_up)


def state_traffic(state: State) -> int:
    """Bytes of a state that a step reads and writes: filled slots of a cache once, everything else twice."""
    if isinstance(state, KVCache):
        slots = state.k_BSGK.shape[1]
        filled = int(state.length_B.clamp(max=slots).sum()) / max(1, slots * len(state.length_B))
        return int(filled * (state_nbytes(state.k_BSGK) + state_nbytes(state.v_BSJV)))
    return 2 * state_nbytes(state) if isinstance(state, Tensor) else sum(map(state_traffic, state))


def pretend(decoder: Decoder, context: int) -> str:
    """Bring the decoder to where it stands after `context` random tokens, and say how.

    They are truly read where the state does not grow with them and they are not too many; else caches are filled with
    noise, up to that length.
    """
    config, batch = decoder.model.config, len(decoder.token_B)
    constant = len({config.state_bytes(1, tokens, torch.float32) for tokens in (context, 2 * context)}) == 1
    read = context if constant and batch * context <= READ_AT_MOST[decoder.token_B.device.type] else min(64, context)
    decoder.prefill(torch.randint(config.vocab_size, (batch, read)).tolist())
    if read == context:
        return f"{context} tokens read"
    _fill(decoder.state, context)
    decoder.room = decoder.context - context
    return f"{read} tokens read, caches filled with noise up to {context}"


def _fill(state: State, length: int) -> None:
    if isinstance(state, KVCache):
        state.k_BSGK.normal_()
        state.v_BSJV.normal_()
        state.length_B.fill_(length)
    elif not isinstance(state, Tensor):
        for part in state:
            _fill(part, length)


@torch.no_grad()
def deviation(decoder: Decoder) -> float:
    """||logits of the decoder's steps - the general path's|| / ||the general path's||, the worst of a few tokens."""
    state: Any = tree_map(torch.clone, decoder.state)
    worst = 0.0
    for _ in range(CHECKED):
        expected_BTV, state = decoder.model(decoder.token_B.unsqueeze(1), state)
        decoder.step()
        assert decoder.logits_BV is not None
        error = (decoder.logits_BV - expected_BTV[:, -1]).norm() / expected_BTV.norm()
        worst = max(worst, error.nan_to_num(torch.inf).item())
    return worst


class Entrant(NamedTuple):
    """A model or peer at one shape. `state_dtype` and `backends` are for our models; None is a state's own dtype."""

    name: str
    size: str
    batch: int
    context: int
    state_dtype: torch.dtype | None = None
    backends: tuple[tuple[str, str], ...] = ()

    def row(self, dtype: torch.dtype) -> Row:
        row: Row = {"model": self.name, "size": self.size, "batch_size": self.batch, "context": self.context}
        row["dtype"] = str(dtype).removeprefix("torch.")
        if self.state_dtype is not None:
            row["state_dtype"] = str(self.state_dtype).removeprefix("torch.")
        return row | ({"backends": dict(self.backends)} if self.backends else {})


def measure(entrant: Entrant, tokens: int, device: torch.device, dtype: torch.dtype) -> Row:
    """The row of one of our models with random weights: the median of up to 256 steps, and memory over `tokens`.

    Growth is the allocator's on CUDA, the state's on a CPU.
    """
    row, batch, context = entrant.row(dtype), entrant.batch, entrant.context
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(entrant.name, size=entrant.size).to(dtype).eval()
    timed = min(tokens, TIMED)
    room = context + 1 + CHECKED + 2 * (WARMUP + timed) + tokens
    decoder = Decoder(model, batch, room, Sampling(temperature=0), state_dtype=entrant.state_dtype)
    row |= {"backend": "CUDA graph" if decoder.captured else "eager", "state": pretend(decoder, context)}
    row |= {"params": sum(p.numel() for p in model.parameters()), "relative_error": deviation(decoder)}
    if not row["relative_error"] <= TOLERANCE[dtype]:
        error = row.pop("relative_error")
        return row | {"note": f"its step is off by {error:.1e} from the general path; it gets no time"}
    traffic = state_traffic(decoder.state)
    before = _held(decoder)
    seconds = median_seconds(decoder.step, device, timed, warmup=WARMUP)
    row |= {"seconds_per_token": seconds, "tokens_per_second": batch / seconds, "weight_bytes": weights_read(model)}
    if tokens > timed:
        for _ in range(tokens - timed):
            decoder.step()
        row["late_seconds_per_token"] = median_seconds(decoder.step, device, timed, warmup=WARMUP)
    row |= {"generated": tokens, "growth_bytes": _held(decoder) - before}
    return row | {"state_bytes": decoder.state_bytes, "state_traffic_bytes": traffic}


def _held(decoder: Decoder) -> int:
    device = decoder.token_B.device
    if device.type != "cuda":
        return decoder.state_bytes
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def beside_floor(row: Row, bytes_per_second: float) -> Row:
    """The row with what reading the weights (and moving the state) takes at the rate of a copy, and its shares."""
    if "seconds_per_token" in row and "weight_bytes" in row:
        row["floor_seconds"] = row["weight_bytes"] / bytes_per_second
        row["of_floor"] = row["floor_seconds"] / row["seconds_per_token"]
        if "state_traffic_bytes" in row:
            moved = row["weight_bytes"] + row["state_traffic_bytes"]
            row["of_floor_with_state"] = moved / bytes_per_second / row["seconds_per_token"]
    return row


def compare(entrants: Sequence[Entrant], tokens: int, device: torch.device) -> tuple[list[Row], float]:
    """A row for each, peers by their own stopwatch; then the copy rate in bytes a second."""
    rate = copy_rate(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[Row] = []
    with until_interrupted():
        for entrant in entrants:
            try:
                if entrant.name in DECODE_PEERS:
                    row = DECODE_PEERS[entrant.name](entrant.size, entrant.batch, entrant.context, device, dtype)
                else:
                    with use_backend(**dict(entrant.backends)):
                        row = measure(entrant, tokens, device, dtype)
            except torch.OutOfMemoryError:
                row = entrant.row(dtype) | OUT_OF_MEMORY
            rows.append(beside_floor(row, rate))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows, rate


@app.command()
def decode(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"A model or peer; may be repeated. Default: {', '.join(DEFAULT_MODELS)}."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Default: 1.3b on CUDA, smoke on a CPU.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows; may be repeated. Default: 1.")] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens seen before; may be repeated. Default: 4096 and 65536, on a CPU 64 and 256."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to generate. Default: 256 on CUDA, 16 on a CPU.")
    ] = None,
    state_dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Of all of our models' state. Default: memories fp32.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="An operator's backend in our models, such as attention_step=naive.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help=f"Also {', '.join(DECODE_PEERS)}.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time a decoding step with random weights: ms a token, share of the weights' bandwidth floor, memory growth."""
    with session(device) as world:
        if world.size > 1:
            raise UserError("bench decode measures one process; start it without torchrun")
        cuda = world.device.type == "cuda"
        size = size or ("1.3b" if cuda else "smoke")
        if size not in SIZES:
            raise UserError(f"there is no size named {size!r}{did_you_mean(size, SIZES)}")
        names = list(dict.fromkeys([*(model or DEFAULT_MODELS), *(DECODE_PEERS if peers else ())]))
        for name in names:
            if name not in DECODE_PEERS:
                model_config(name, size=size)  # An unknown name is refused before anything is measured.
        tokens = tokens or (256 if cuda else 16)
        contexts = context or ([4096, 65536] if cuda else [64, 256])
        state = None if state_dtype is None else STATE_DTYPES[state_dtype]
        backends = parse_backends(backend or [])
        entrants = [
            Entrant(name, size, rows, seen, state, backends)
            for name, rows, seen in product(names, batch or [1], contexts)
        ]
        facts = surroundings(world)
        rows, rate = compare(entrants, tokens, world.device)
    settings = {"size": size, "tokens": tokens, "copy_bytes_per_second": round(rate)}
    show(Result("decode", settings, rows, facts), COLUMNS, as_json)
