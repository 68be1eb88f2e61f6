"""The token mixers of the zoo at one size: time a token, by the backends that each chooses and by its peers' kernels.

A mixer is a sublayer that runs one of `SEQUENCE`, the operators along time; its projections, gates and norms count.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rodimus_lab.bench.measure import median_seconds
from rodimus_lab.bench.peers import failure
from rodimus_lab.bench.result import Column, Row
from rodimus_lab.errors import UserError
from rodimus_lab.nn.mixer import TokenMixerConfig
from rodimus_lab.nn.zoo import MODELS, Size, model_config
from rodimus_lab.ops.backend import OPERATORS, use_backend, watch_backends
from rodimus_lab.registry import load_plugins

SEQUENCE = frozenset({"attention", "delta_rule", "diagonal_scan", "gated_linear", "selective_scan", "ssd", "wkv"})
PEERS = frozenset({"fla", "flash_attn", "flex", "mamba_ssm"})
FIRST = "transformer++"
CHECKED_LENGTH = 128
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
COLUMNS = (
    Column("mixer", "mixer"),
    Column("model", "first model that has it"),
    Column("backends", "backends"),
    Column("forward_seconds_per_token", "forward ns/token", 1e9, 1),
    Column("both_seconds_per_token", "fwd+bwd ns/token", 1e9, 1),
    Column("over_first", "x first", 1, 2),
    Column("output_error", "error", 1, 4),
)


class MixerSetting(NamedTuple):
    """Where mixers are measured, on random activations of batch x length tokens, and of which models: default all."""

    size: Size
    device: torch.device
    batch: int
    length: int
    repeats: int
    compile: bool
    models: Sequence[str] = ()


class Entrant(NamedTuple):
    """A mixer, and the backends that its operators along the sequence take."""

    model: str
    kind: str
    mixer: nn.Module
    forced: dict[str, str]

    @property
    def facts(self) -> Row:
        backends = ", ".join(f"{operator}: {name}" for operator, name in sorted(self.forced.items()))
        return {"mixer": self.kind, "model": self.model, "backends": backends}


def entrants(setting: MixerSetting, peers: bool) -> Iterator[Entrant]:
    """Each different mixer once, with freshly drawn weights; with `peers` on CUDA also by each peer's kernel."""
    load_plugins()
    size, device = setting.size, setting.device
    seen: set[tuple[Any, ...]] = set()
    for name in dict.fromkeys([FIRST, *(setting.models or MODELS)]):
        config = model_config(name, size=size, vocab_size=64, repeats=1)
        sublayers = [sublayer for block in config.blocks for sublayer in block.sublayers]
        if all(_identity(sublayer, size) in seen for sublayer in sublayers):
            continue
        torch.manual_seed(0)
        blocks = config.build().to(device).blocks
        mixers: list[Any] = [mixer for block in blocks for mixer in block.mixers]  # type: ignore[union-attr]
        for sublayer, mixer in zip(sublayers, mixers, strict=True):
            if _identity(sublayer, size) in seen:
                continue
            seen.add(_identity(sublayer, size))
            _awaken(mixer)
            chosen = _chosen(mixer, setting)
            if not chosen:
                continue
            entrant = Entrant(name, sublayer.kind, mixer, chosen)
            yield entrant
            for operator in sorted(chosen) if peers and device.type == "cuda" else ():
                for backend in OPERATORS[operator]:
                    if backend.name in PEERS and backend.name != chosen[operator]:
                        yield entrant._replace(forced=chosen | {operator: backend.name})


def _identity(sublayer: TokenMixerConfig, size: Size) -> tuple[Any, ...]:
    """What it is and costs: the same for layers that differ in their first weights only."""
    costs = sublayer.num_params(size.d_model), sublayer.flops_per_token(size.d_model, size.context)
    return sublayer.kind, *costs, sublayer.state_bytes(size.d_model, 1, size.context, torch.float32)


@torch.no_grad()
def _awaken(mixer: nn.Module) -> None:
    """Weights that start at 0, as RWKV's do, would hide every error."""
    for weight in mixer.parameters():
        if not weight.any():
            weight.normal_(std=0.02)


def _chosen(mixer: nn.Module, setting: MixerSetting) -> dict[str, str]:
    """Operator along the sequence -> backend that `auto` takes, from a training pass of one row."""
    with watch_backends() as seen, _precision(setting.device):
        mixer(torch.randn(1, setting.length, setting.size.d_model, device=setting.device, requires_grad=True))
    return {operator: name for operator, name in seen.items() if operator in SEQUENCE}


def _precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def measure_mixer(entrant: Entrant, setting: MixerSetting) -> Row:
    """Seconds a token, in bfloat16 autocast over float32 weights on CUDA and in float32 elsewhere, launches hidden."""
    device, tokens = setting.device, setting.batch * setting.length
    error = _error(entrant, setting.size.d_model, device)
    tolerance = TOLERANCE[torch.bfloat16 if device.type == "cuda" else torch.float32]
    facts = entrant.facts | {"batch_size": setting.batch, "length": setting.length, "output_error": error}
    if not error <= tolerance:
        return facts | {"note": f"its output or gradient is off by {error:.1e}, so it gets no time"}
    x_BTD = torch.randn(setting.batch, setting.length, setting.size.d_model, device=device, requires_grad=True)
    run = torch.compile(entrant.mixer, dynamic=False) if setting.compile else entrant.mixer
    leaves = [x_BTD, *entrant.mixer.parameters()]

    def forward() -> None:
        with torch.no_grad(), _precision(device):
            run(x_BTD)

    def both() -> None:
        with _precision(device):
            y_BTD, _ = run(x_BTD)
        torch.autograd.grad(y_BTD, leaves, torch.ones_like(y_BTD), allow_unused=True)

    with use_backend(**entrant.forced):
        times = [median_seconds(call, device, setting.repeats, head_start=True) for call in (forward, both)]
    return facts | {
        "compiled": setting.compile,
        "forward_seconds_per_token": times[0] / tokens,
        "both_seconds_per_token": times[1] / tokens,
    }


def _error(entrant: Entrant, d_model: int, device: torch.device) -> float:
    """The relative error of the output and of the input's gradient, against the definitions in float64."""
    x = torch.randn(1, CHECKED_LENGTH, d_model, device=device)
    dy = torch.randn_like(x)

    def values(mixer: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y, _ = mixer(x)
        return [y, *torch.autograd.grad(y, x, dy.to(y.dtype))]

    with use_backend(**entrant.forced), _precision(device):
        got = values(entrant.mixer, x)
    definitions = {operator: backends[-1].name for operator, backends in OPERATORS.items()}
    with use_backend(**definitions):
        want = values(copy.deepcopy(entrant.mixer).double(), x.double())
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    return max(errors)


def measure_mixers(rows: list[Row], setting: MixerSetting, peers: bool = True) -> None:
    """Append a row an entrant to `rows`, told on stderr as it comes; `over_first` is the time beside the first row's,
    forward and backward."""
    first = None
    for entrant in entrants(setting, peers):
        try:
            row = measure_mixer(entrant, setting)
        except UserError as error:
            row = entrant.facts | {"note": f"cannot run: {error}"}
        except Exception as error:
            row = entrant.facts | {"note": failure(error)}
        if setting.compile:
            torch.compiler.reset()
        seconds = row.get("both_seconds_per_token")
        first = first or seconds
        if first and seconds:
            row["over_first"] = seconds / first
        rows.append(row | {"size": setting.size.name, "width": setting.size.d_model})
        told = (
            row.get("note") or f"{1e9 * row['both_seconds_per_token']:,.1f} ns/token, {row['over_first']:.2f} x first"
        )
        print(f"{row['mixer']} of {row['model']} ({row['backends']}): {told}", file=sys.stderr)
