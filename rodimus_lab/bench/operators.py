"""`bench ops`: the operators' backends, forward and forward + backward, beside the memory floor.

The shapes on CUDA are those of the 1.3B configuration and of WikiText-103; on a CPU they are small.

Shapes: B batch, T time, H query heads, G key heads, J value heads, K key width, V value width, D channels, W taps,
R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple, get_args

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from rodimus_lab.bench.measure import copy_rate
from rodimus_lab.bench.mixers import COLUMNS as MIXER_COLUMNS
from rodimus_lab.bench.mixers import FIRST, MixerSetting, measure_mixers
from rodimus_lab.bench.operator_peers import measure_peers
from rodimus_lab.bench.race import Problem, Tensors, race
from rodimus_lab.bench.result import (
    AsJson,
    Column,
    Device,
    Repeats,
    Result,
    Row,
    app,
    show,
    surroundings,
    until_interrupted,
)
from rodimus_lab.config import did_you_mean
from rodimus_lab.errors import UserError
from rodimus_lab.nn.heads import HeadKind, HeadSharing
from rodimus_lab.nn.zoo import MODELS, SIZES
from rodimus_lab.ops import (
    attention,
    conv_gate,
    gated_linear,
    gated_norm,
    selective_scan,
    short_conv,
    tempered_selection,
)
from rodimus_lab.ops.conv_gate import LowRankGate
from rodimus_lab.registry import Registry
from rodimus_lab.train.distributed import session

LAST = slice(-1, None)
SAMPLED_COLUMNS = slice(-64, None)
MIXERS = "mixers"


class Scene(NamedTuple):
    """Where an operator is measured. `batch` and `length` replace those of every shape."""

    device: torch.device
    dtype: torch.dtype
    batch: int | None = None
    length: int | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, batch: int, length: int) -> tuple[int, int]:
        return self.batch or batch, self.length or length

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)


Cases = Callable[[Scene], Iterator[Problem]]
CASES: Registry[Cases] = Registry("operator benchmark")
COLUMNS = (
    Column("operator", "operator"),
    Column("case", "case"),
    Column("backend", "backend"),
    Column("forward_seconds", "forward ms", 1e3, 3),
    Column("forward_over_floor", "x floor", 1, 1),
    Column("both_seconds", "fwd+bwd ms", 1e3, 3),
    Column("both_over_floor", "x floor", 1, 1),
    Column("peak_bytes", "peak MB", 1e-6, 1),
    Column("relative_error", "error 1e-6", 1e6, 1),
)


@CASES.register("gated_linear")
def gated_linear_cases(scene: Scene) -> Iterator[Problem]:
    """The 1.3B configuration and WikiText-103's, with few long and with many short sequences."""
    wide, narrow = (64, 4096), (32, 1024)
    shapes = [(1, 512, *narrow)]
    if scene.cuda:
        shapes = [(8, 4096, *wide), (4, 2048, *wide), (1, 32768, *wide), (32, 512, *narrow), (128, 512, *narrow)]
    for batch, length, key_width, value_width in shapes:
        yield _gated_linear(scene, *scene.size(batch, length), key_width, value_width)


def _gated_linear(scene: Scene, B: int, T: int, K: int, V: int) -> Problem:
    """One head, as Rodimus has it: keys of unit length, log-gates around -0.03."""
    inputs = {
        "q": scene.draw(B, T, 1, K),
        "k": F.normalize(scene.draw(B, T, 1, K, dtype=torch.float32), dim=-1).to(scene.dtype),
        "v": scene.draw(B, T, 1, V),
        "log_alpha": -F.softplus(scene.draw(B, T, 1, K, dtype=torch.float32) - 3.5),
    }

    def run(x: Tensors, backend: str) -> Tensor:
        return gated_linear(x["q"], x["k"], x["v"], x["log_alpha"], scale=K**-0.5, backend=backend)[0]

    columns = (LAST, slice(None), slice(None), SAMPLED_COLUMNS)
    return Problem(
        operator="gated_linear",
        case=f"B{B} T{T} n{K} m{V}",
        shape={"batch": B, "length": T, "heads": 1, "key_width": K, "value_width": V},
        inputs=inputs,
        run=run,
        definition=lambda x: run(x, "naive"),
        output=torch.empty_like(inputs["v"], device="meta"),
        sample={"q": (LAST,), "k": (LAST,), "log_alpha": (LAST,), "v": columns},
        sample_output=columns,
        unmeasured={"naive": "the definition, a step at a time: too much memory at this size"} if scene.cuda else {},
        compilable=frozenset({"chunked"}),
    )


@CASES.register("attention")
def attention_cases(scene: Scene) -> Iterator[Problem]:
    """Transformer++'s heads of 64 with every sharing, full; then Rodimus+'s heads of 128, windowed."""
    B, T = scene.size(*((8, 4096) if scene.cuda else (1, 512)))
    H, K = (32, 64) if scene.cuda else (4, 64)
    for kind in get_args(HeadKind):
        yield _attention(scene, B, T, kind, HeadSharing.of(kind, H, groups=H // 4), K, None)
    yield _attention(scene, B, T, "ska", HeadSharing.of("ska", H * K // 128), 128, max(1, T // 2))


def _attention(scene: Scene, B: int, T: int, kind: str, heads: HeadSharing, K: int, window: int | None) -> Problem:
    inputs = {
        "q": scene.draw(B, T, heads.num_heads, K),
        "k": scene.draw(B, T, heads.num_key_heads, K),
        "v": scene.draw(B, T, heads.num_value_heads, K),
    }

    def run(x: Tensors, backend: str) -> Tensor:
        return attention(x["q"], x["k"], x["v"], window=window, backend=backend)[0]

    return Problem(
        operator="attention",
        case=f"{kind} B{B} T{T} H{heads.num_heads}x{K}" + ("" if window is None else f" window {window}"),
        shape={"batch": B, "length": T, "head_width": K, "window": window or T} | heads.to_dict(),
        inputs=inputs,
        run=run,
        definition=lambda x: run(x, "naive"),
        output=torch.empty_like(inputs["q"], device="meta"),
        sample=dict.fromkeys(inputs, (LAST,)),
        sample_output=(LAST,),
    )


@CASES.register("short_conv")
def short_conv_cases(scene: Scene) -> Iterator[Problem]:
    """With SiLU after it. Parameters in float32, as under autocast; so in the next ones."""
    D, W = (4096 if scene.cuda else 1024), 4
    for batch, length in ((4, 4096), (512, 128)) if scene.cuda else ((1, 512),):
        B, T = scene.size(batch, length)
        inputs = {"x": scene.draw(B, T, D)}
        inputs |= {"weight": scene.draw(D, W, dtype=torch.float32), "bias": scene.draw(D, dtype=torch.float32)}

        def run(x: Tensors, backend: str) -> Tensor:
            return short_conv(x["x"], x["weight"], x["bias"], silu=True, backend=backend)[0]

        yield Problem(
            operator="short_conv",
            case=f"B{B} T{T} D{D} W{W}",
            shape={"batch": B, "length": T, "channels": D, "taps": W},
            inputs=inputs,
            run=run,
            definition=lambda x: run(x, "taps"),
            output=torch.empty_like(inputs["x"], device="meta"),
            compilable=frozenset({"taps"}),
        )


@CASES.register("selective_scan")
def selective_scan_cases(scene: Scene) -> Iterator[Problem]:
    """Mamba's at the 1.3B size and at WikiText-103's."""
    N, sizes = 16, ((4, 2048, 4096), (128, 512, 1024)) if scene.cuda else ((1, 512, 256),)
    for batch, length, D in sizes:
        B, T = scene.size(batch, length)
        inputs = {
            "u": scene.draw(B, T, D),
            "dt": F.softplus(scene.draw(B, T, D, dtype=torch.float32) - 4),
            "A": -torch.arange(1.0, N + 1, device=scene.device).expand(D, N).contiguous(),
            "B": scene.draw(B, T, N),
            "C": scene.draw(B, T, N),
        }

        def run(x: Tensors, backend: str) -> Tensor:
            return selective_scan(x["u"], x["dt"], x["A"], x["B"], x["C"], backend=backend)[0]

        columns = (LAST, slice(None), SAMPLED_COLUMNS)
        yield Problem(
            operator="selective_scan",
            case=f"B{B} T{T} D{D} N{N}",
            shape={"batch": B, "length": T, "channels": D, "state": N},
            inputs=inputs,
            run=run,
            definition=lambda x: run(x, "naive"),
            output=torch.empty_like(inputs["u"], device="meta"),
            sample={"u": columns, "dt": columns, "A": (SAMPLED_COLUMNS,), "B": (LAST,), "C": (LAST,)},
            sample_output=columns,
            unmeasured={"naive": "the definition, a step at a time"} if scene.cuda else {},
        )


@CASES.register("conv_gate")
def conv_gate_cases(scene: Scene) -> Iterator[Problem]:
    B, T = scene.size(*((4, 4096) if scene.cuda else (1, 512)))
    D, W, R = (4096 if scene.cuda else 1024), 4, 16
    parameters = {"weight": (D, W), "bias": (D,), "down": (R, D), "up": (D, R), "gate_bias": (D,)}
    inputs = {"x": scene.draw(B, T, D)}
    inputs |= {name: scene.draw(*shape, dtype=torch.float32) for name, shape in parameters.items()}
    inputs["down"] /= D**0.5

    def run(x: Tensors, backend: str) -> tuple[Tensor, ...]:
        gate = LowRankGate(x["down"], x["up"], x["gate_bias"])
        return conv_gate(x["x"], x["weight"], x["bias"], gate, backend=backend)[:2]

    yield Problem(
        operator="conv_gate",
        case=f"B{B} T{T} D{D} W{W} rank {R}",
        shape={"batch": B, "length": T, "channels": D, "taps": W, "rank": R},
        inputs=inputs,
        run=run,
        definition=lambda x: run(x, "naive"),
        output=(torch.empty_like(inputs["x"], device="meta"),) * 2,
        compilable=frozenset({"naive"}),
    )


@CASES.register("tempered_selection")
def tempered_selection_cases(scene: Scene) -> Iterator[Problem]:
    N = 64

    def run(x: Tensors, backend: str) -> tuple[Tensor, ...]:
        _, k, logits = x["rows"].split([N, N, 2 * N], dim=-1)
        return tempered_selection(k, logits, x["bias"], backend=backend)

    for shape in ((4, 4096), (512, 128)) if scene.cuda else ((1, 512),):
        B, T = scene.size(*shape)
        inputs = {"rows": scene.draw(B, T, 4 * N), "bias": scene.draw(2 * N, dtype=torch.float32)}
        k = inputs["rows"][..., :N]
        yield Problem(
            operator="tempered_selection",
            case=f"B{B} T{T} n{N}",
            shape={"batch": B, "length": T, "keys": N},
            inputs=inputs,
            run=run,
            definition=lambda x: run(x, "naive"),
            output=(torch.empty_like(k, dtype=torch.float32, device="meta"), torch.empty_like(k, device="meta")),
            compilable=frozenset({"naive"}),
        )


@CASES.register("gated_norm")
def gated_norm_cases(scene: Scene) -> Iterator[Problem]:
    B, T = scene.size(*((4, 4096) if scene.cuda else (1, 512)))
    D = 4096 if scene.cuda else 1024
    inputs = {name: scene.draw(B, T, D) for name in ("o", "x", "z")}
    inputs |= {name: scene.draw(D, dtype=torch.float32) for name in ("feedthrough", "weight")}

    def run(x: Tensors, backend: str) -> Tensor:
        return gated_norm(x["o"], x["x"], x["z"], x["feedthrough"], x["weight"], eps=1e-5, backend=backend)

    yield Problem(
        operator="gated_norm",
        case=f"B{B} T{T} D{D}",
        shape={"batch": B, "length": T, "channels": D},
        inputs=inputs,
        run=run,
        definition=lambda x: run(x, "naive"),
        output=torch.empty_like(inputs["o"], device="meta"),
        compilable=frozenset({"naive"}),
    )


def measure(
    scene: Scene, operators: list[str], repeats: int, compile: bool, peers: bool = True, models: Sequence[str] = ()
) -> tuple[list[Row], float]:
    """The rows of `race` for every case of the operators, each followed by its peers', and the copy rate of the floors
    in bytes a second. `models`: those whose mixers are measured, default all."""
    rate = copy_rate(scene.device)
    rows: list[Row] = []
    with until_interrupted():
        for operator in operators:
            if operator == MIXERS:
                measure_mixers(rows, _mixers(scene, repeats, compile, models), peers)
                continue
            for problem in CASES[operator](scene):
                rows += race(problem, repeats, rate, compile=compile)
                rows += measure_peers(problem, repeats, rate) if peers else []
    return rows, rate


def _mixers(scene: Scene, repeats: int, compile: bool, models: Sequence[str]) -> MixerSetting:
    size = SIZES["350m"] if scene.cuda else SIZES["smoke"]._replace(d_model=256, num_heads=4, context=512)
    return MixerSetting(size, scene.device, *scene.size(8 if scene.cuda else 1, size.context), repeats, compile, models)


@app.command()
def ops(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join([*CASES, MIXERS])}. Default: all.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help=f"Whose {MIXERS}, beside {FIRST}'s. May be repeated. Default: all.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Instead of each shape's own.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Instead of each shape's own.")] = None,
    compile: Annotated[bool | None, typer.Option(help="Also under torch.compile. Default: on CUDA only.")] = None,
    peers: Annotated[bool, typer.Option(help="Also the operators of others that do the same work in a model.")] = True,
    repeats: Repeats = 10,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time the operators' backends and their peers, each checked against its definition first; and each model's token
    mixer, at the 350M configuration on CUDA and at width 256 and 512 tokens elsewhere."""
    known = [*CASES, MIXERS]
    operators = only or known
    for name in operators:
        if name not in known:
            raise UserError(f"there is no operator benchmark named {name!r}{did_you_mean(name, known)}")
    models = [MODELS.canonical(name) for name in model or []]
    if models and MIXERS not in operators:
        raise UserError(f"--model chooses among the {MIXERS}; add --only {MIXERS}")
    with session(device) as world:
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        scene = Scene(world.device, dtype, batch, length)
        torch.manual_seed(0)
        facts = surroundings(world)
        rows, rate = measure(scene, operators, repeats, scene.cuda if compile is None else compile, peers, models)
    settings = {"dtype": str(dtype).removeprefix("torch."), "repeats": repeats, "copy_bytes_per_second": round(rate)}
    show(Result("ops", settings, rows, facts), COLUMNS, as_json, MIXER_COLUMNS)
