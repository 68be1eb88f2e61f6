"""`bench loss`: memory and time of the loss, beside the (tokens x vocabulary) matrix that it avoids.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rodimus_lab.bench.measure import copy_rate
from rodimus_lab.bench.race import Problem, Tensors, race
from rodimus_lab.bench.result import AsJson, Column, Device, Repeats, Result, Row, app, show, surroundings
from rodimus_lab.errors import UserError
from rodimus_lab.ops import cross_entropy
from rodimus_lab.train.distributed import session

REFERENCE_TOKENS = 1024
SHAPES = {"cpu": ("1024x256x8192", "2048x128x50265"), "cuda": ("8192x512x50265", "65536x512x50265", "16384x2048x50277")}
COLUMNS = (
    Column("case", "tokens x width x vocabulary"),
    Column("backend", "backend"),
    Column("matrix_bytes", "matrix MB", 1e-6, 1),
    Column("peak_bytes", "peak MB", 1e-6, 1),
    Column("peak_over_matrix", "x matrix", 1, 2),
    Column("peak_over_naive", "x naive", 1, 2),
    Column("both_seconds", "fwd+bwd ms", 1e3, 2),
    Column("time_over_naive", "x naive", 1, 2),
    Column("forward_peak_bytes", "forward peak MB", 1e-6, 1),
    Column("forward_seconds", "forward ms", 1e3, 2),
)


class Shape(NamedTuple):
    tokens: int
    width: int
    vocab: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From `tokens x width x vocabulary`, such as 1024x256x8192."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise UserError(f"{text!r} is not a shape; give tokens x width x vocabulary, such as 1024x256x8192")
        return cls(*(int(part) for part in match.groups()))


def loss_problem(shape: Shape, device: torch.device) -> Problem:
    """The summed loss of random activations; on CUDA bfloat16 activations over float32 weights, as in training."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = {
        "x": torch.randn(shape.tokens, shape.width, device=device).to(dtype),
        "weight": 0.02 * torch.randn(shape.vocab, shape.width, device=device),
    }
    targets_N = torch.randint(shape.vocab, (shape.tokens,), device=device)

    def run(x: Tensors, backend: str) -> Tensor:
        return cross_entropy(x["x"], x["weight"], targets_N, reduction="sum", backend=backend)

    def definition(x: Tensors) -> Tensor:
        """Some tokens at a time, for in float64 the whole matrix would take more memory than what is measured."""

        def part(x_ND: Tensor, weight_VD: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(x_ND, weight_VD, targets, reduction="sum", backend="naive")

        pieces = zip(x["x"].split(REFERENCE_TOKENS), targets_N.split(REFERENCE_TOKENS), strict=True)
        losses = [checkpoint(part, x_ND, x["weight"], targets, use_reentrant=False) for x_ND, targets in pieces]
        return torch.stack(losses).sum()

    return Problem(
        operator="cross_entropy",
        case="x".join(map(str, shape)),
        shape=shape._asdict(),
        inputs=inputs,
        run=run,
        definition=definition,
        output=torch.empty((), device="meta"),
    )


def compare(shape: Shape, device: torch.device, repeats: int, bytes_per_second: float) -> list[Row]:
    """The rows of `race`, with the logits' bytes in the dtype of the product and the ratios to the naive backend."""
    problem = loss_problem(shape, device)
    rows = race(problem, repeats, bytes_per_second)
    matrix = shape.tokens * shape.vocab * problem.inputs["x"].element_size()
    naive = next(row for row in rows if row["backend"] == "naive")
    for row in rows:
        row["matrix_bytes"] = matrix
        if "peak_bytes" in row:
            row["peak_over_matrix"] = row["peak_bytes"] / matrix
        if "peak_bytes" in row and "peak_bytes" in naive:
            row["peak_over_naive"] = row["peak_bytes"] / naive["peak_bytes"]
            row["time_over_naive"] = row["both_seconds"] / naive["both_seconds"]
    return rows


@app.command()
def loss(
    shape: Annotated[
        list[str] | None, typer.Option(help="Tokens x width x vocabulary, such as 1024x256x8192; may be repeated.")
    ] = None,
    repeats: Repeats = 5,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Memory and time of the chunked loss against the one with all logits in memory, forward and backward."""
    with session(device) as world:
        shapes = [Shape.parse(text) for text in shape or SHAPES[world.device.type]]
        torch.manual_seed(0)
        facts, rate = surroundings(world), copy_rate(world.device)
        rows = [row for each in shapes for row in compare(each, world.device, repeats, rate)]
    settings = {"repeats": repeats, "copy_bytes_per_second": round(rate)}
    show(Result("loss", settings, rows, facts), COLUMNS, as_json)
