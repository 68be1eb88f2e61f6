"""The peers of an operator: what other models put in its place, at the same batch, length and model width.

They are other operators, so each is held to its own definition, and their rows stand beside ours, not against them.

Shapes: B batch, T time, H heads, P head width, N state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.bench.peers import MambaSsm, import_mamba_ssm
from rodimus_lab.bench.race import Problem, Tensors, run_alone
from rodimus_lab.bench.result import Row

LAST = slice(-1, None)
WHOLE = slice(None)
SAMPLED_QUERIES = slice(-1024, None)
HEAD_WIDTH, STATE, CHUNK, DEFINITION_CHUNK = 64, 128, 256, 64


class OperatorPeer(NamedTuple):
    """`missing(device)` says why it cannot run, or None; `problem` takes our problem and gives the peer's."""

    name: str
    missing: Callable[[torch.device], str | None]
    problem: Callable[[Problem], Problem]


def measure_peers(problem: Problem, repeats: int, bytes_per_second: float) -> list[Row]:
    """A row for each peer of the problem's operator. One that is not installed is named as such."""
    rows = []
    for peer in OPERATOR_PEERS.get(problem.operator, ()):
        row: Row = {"operator": problem.operator, "case": problem.case, "shape": dict(problem.shape)}
        if reason := peer.missing(problem.device):
            row |= {"backend": peer.name, "note": f"cannot run: {reason}"}
        else:
            row = run_alone(peer.problem(problem), peer.name, repeats, bytes_per_second)
        rows.append(row | {"peer": True})
    return rows


def _sizes(ours: Problem) -> tuple[int, int, int]:
    """B, T and the model width: Rodimus's values are twice as wide as the model."""
    batch, length = int(ours.shape["batch"]), int(ours.shape["length"])
    return batch, length, int(ours.shape["value_width"]) // 2


def ssd(ours: Problem) -> Problem:
    """Mamba2's state-space duality by mamba-ssm's Triton kernels: an inner width of twice the model's in heads of 64, a
    state of 128 and a scalar gate a head; B and C are shared by the heads. Definition: Listing 1 of its paper, as
    mamba-ssm has it, on one head of one sequence. The step sizes are given, not learned."""
    B, T, d_model = _sizes(ours)
    H = 2 * d_model // HEAD_WIDTH
    like = next(iter(ours.inputs.values()))
    dt_BTH = F.softplus(torch.randn(B, T, H, device=like.device) - 4)
    A_H = -torch.rand(H, device=like.device).exp()
    inputs = {
        "x": torch.randn(B, T, H, HEAD_WIDTH, device=like.device).to(like.dtype),
        "B": torch.randn(B, T, 1, STATE, device=like.device).to(like.dtype),
        "C": torch.randn(B, T, 1, STATE, device=like.device).to(like.dtype),
    }

    def run(x: Tensors, backend: str) -> Tensor:
        import_mamba_ssm()
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        return mamba_chunk_scan_combined(x["x"], dt_BTH, A_H, x["B"], x["C"], chunk_size=CHUNK)

    def definition(x: Tensors) -> Tensor:
        import_mamba_ssm()
        from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete

        dt_1T1, A_1 = dt_BTH[-1:, :, -1:].double(), A_H[-1:].double()
        padding = -T % DEFINITION_CHUNK
        gate_1T1 = F.pad(A_1 * dt_1T1, (0, 0, 0, padding))
        values = (F.pad(each, (0, 0, 0, 0, 0, padding)) for each in (x["x"] * dt_1T1.unsqueeze(-1), x["B"], x["C"]))
        X, B, C = values
        return ssd_minimal_discrete(X, gate_1T1, B, C, DEFINITION_CHUNK)[0][:, :T]

    return Problem(
        operator=ours.operator,
        case=f"B{B} T{T} {H} heads of {HEAD_WIDTH}, state {STATE}",
        shape={"batch": B, "length": T, "heads": H, "head_width": HEAD_WIDTH, "state": STATE},
        inputs=inputs,
        run=run,
        definition=definition,
        output=torch.empty_like(inputs["x"], device="meta"),
        sample={"x": (LAST, WHOLE, LAST), "B": (LAST,), "C": (LAST,)},
        sample_output=(LAST, WHOLE, LAST),
    )


def causal_attention(ours: Problem) -> Problem:
    """torch's SDPA, causal, which on CUDA takes the flash path: heads of 64 over the model's width. Definition: softmax
    attention with all scores in memory, on the last 1,024 queries of one head of one sequence."""
    B, T, d_model = _sizes(ours)
    H = max(1, d_model // HEAD_WIDTH)
    like = next(iter(ours.inputs.values()))
    inputs = {name: torch.randn(B, T, H, HEAD_WIDTH, device=like.device).to(like.dtype) for name in "qkv"}

    def run(x: Tensors, backend: str) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def definition(x: Tensors) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        queries = q.shape[2]
        seen = torch.ones(queries, T, dtype=torch.bool, device=q.device).tril(T - queries)
        scores = (q @ k.mT * HEAD_WIDTH**-0.5).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return Problem(
        operator=ours.operator,
        case=f"B{B} T{T} {H} heads of {HEAD_WIDTH}",
        shape={"batch": B, "length": T, "heads": H, "head_width": HEAD_WIDTH},
        inputs=inputs,
        run=run,
        definition=definition,
        output=torch.empty_like(inputs["q"], device="meta"),
        sample={"q": (LAST, SAMPLED_QUERIES, LAST), "k": (LAST, WHOLE, LAST), "v": (LAST, WHOLE, LAST)},
        sample_output=(LAST, SAMPLED_QUERIES, LAST),
    )


# fla's chunk_gla computes our own operator and is one of its backends.
OPERATOR_PEERS: dict[str, tuple[OperatorPeer, ...]] = {
    "gated_linear": (
        OperatorPeer("mamba-ssm SSD", MambaSsm.missing, ssd),
        OperatorPeer("SDPA causal", lambda device: None, causal_attention),
    )
}
