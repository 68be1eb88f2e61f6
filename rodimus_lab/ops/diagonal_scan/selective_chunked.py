"""The selective scan in plain torch, a few tokens' states at a time; the backward pass works them out again.

With dh the gradient of a state and w_t = dh_t B_t, what `selective_scan` computes has the gradients

    dh_t = dy_t^T C_t + exp(dt_{t+1} A) * dh_{t+1}          e_t = dh_t * exp(dt_t A) * h_{t-1}
    ddt_t = sum_N(e_t * A) + w_t * u_t     du_t = w_t * dt_t     dA = sum_t dt_t * e_t
    dB_t = (dt_t * u_t) dh_t               dC_t = dy_t h_t

Shapes: B batch, T time (of one chunk inside the loops), M channels, N state expansion. B and C are (B, T, N) or (M, N).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rodimus_lab.ops.derivative import once_differentiable

# Numbers in the states of one chunk: few enough for a cache, enough to hide the cost of a call.
STATES_AT_ONCE = 2**19


def selective_chunked(
    u_BTM: Tensor, dt_BTM: Tensor, A_MN: Tensor, B: Tensor, C: Tensor, state_BMN: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In the state's dtype; see `selective_scan` for the arguments."""
    wide = state_BMN.dtype
    starts_BT11 = None if starts_BT is None else starts_BT[:, :, None, None]
    return _SelectiveScan.apply(u_BTM.to(wide), dt_BTM, A_MN, B.to(wide), C.to(wide), state_BMN, starts_BT11)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, entering = torch.empty_like(u), []
        for piece in _pieces(u, state):
            entering.append(state)
            h, _ = _states(u[:, piece], dt[:, piece], A, _of(B, piece), state, _of(starts, piece))
            y[:, piece] = _contract(h, _of(C, piece))
            state = h[:, -1].clone()
        ctx.save_for_backward(u, dt, A, B, C, starts, *entering)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, starts, *entering = ctx.saved_tensors
        du, ddt, dA, dB, dC = (torch.zeros_like(z) for z in (u, dt, A, B, C))
        for piece, state in reversed(list(zip(_pieces(u, entering[0]), entering, strict=True))):
            u_, dt_, dy_, B_, C_ = u[:, piece], dt[:, piece], dy[:, piece], _of(B, piece), _of(C, piece)
            h, a = _states(u_, dt_, A, B_, state, _of(starts, piece))
            _add_outer(_of(dC, piece), dy_, h)
            dh = dy_.unsqueeze(-1) * _wide(C_)
            dh[:, -1] += dstate
            for t in range(dh.shape[1] - 1, 0, -1):
                dh[:, t - 1].addcmul_(a[:, t], dh[:, t])
            dstate = a[:, 0] * dh[:, 0]
            _add_outer(_of(dB, piece), dt_ * u_, dh)
            w = _contract(dh, B_)
            e = a.mul_(dh)
            e[:, 0] *= state
            e[:, 1:] *= h[:, :-1]
            dA += (e * dt_.unsqueeze(-1)).sum((0, 1))
            torch.addcmul(_contract(e, A), w, u_, out=ddt[:, piece])
            torch.mul(w, dt_, out=du[:, piece])
        return du, ddt, dA, dB, dC, dstate, None


def _pieces(u: Tensor, state: Tensor) -> list[slice]:
    """Time in chunks."""
    step = max(1, STATES_AT_ONCE // max(1, state.numel()))
    return [slice(start, start + step) for start in range(0, u.shape[1], step)]


def _of(z: Tensor | None, piece: slice) -> Any:
    """The part of z in a chunk, where z has time."""
    return z if z is None or z.ndim == 2 else z[:, piece]


def _states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_BTMN and exp(dt A)_BTMN."""
    a = (dt.unsqueeze(-1) * A).exp_()
    if starts is not None:
        a.masked_fill_(starts, 0.0)
    h = (dt * u).unsqueeze(-1) * _wide(B)
    for h_t, a_t in zip(h.unbind(1), a.unbind(1), strict=True):
        state = h_t.addcmul_(a_t, state)
    return h, a


def _wide(z: Tensor) -> Tensor:
    """(B, T, N) -> (B, T, 1, N); (M, N) broadcasts as it is."""
    return z if z.ndim == 2 else z.unsqueeze(2)


def _contract(h_BTMN: Tensor, z: Tensor) -> Tensor:
    """sum_N h z"""
    return (h_BTMN * z).sum(-1) if z.ndim == 2 else (h_BTMN @ z.unsqueeze(-1)).squeeze(-1)


def _add_outer(total: Tensor, x_BTM: Tensor, h_BTMN: Tensor) -> None:
    """Add to `total`, (B, T, N) or (M, N), the sum of x h over the other dimensions."""
    if total.ndim == 2:
        total += (x_BTM.unsqueeze(-1) * h_BTMN).sum((0, 1))
    else:
        total += (x_BTM.unsqueeze(-2) @ h_BTMN).squeeze(-2)
