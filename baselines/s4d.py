"""S4D-Real: a diagonal state space that does not look at its input (Gu et al., 2022).

With u the normed input and each of the D channels a system of its own,

    h_t = exp(Delta A) * h_{t-1} + (exp(Delta A) - 1) / A * u_t        A = -exp(A_log), Delta = exp(dt_log)
    y   = GLU(GELU(h_t C + D * u_t) W_out + b)

which is Table 4's exp(-A * 1^T g) with a constant g = Delta: the zero-order hold of h' = A h + u, with B in C.
A is real and starts at -1 .. -N, the variant that Mamba builds on; the complex S4D-Lin and S4D-Inv are not here. Such
layers alternate with feed-forwards, as in S4's language model.

Shapes: B batch, T time, D model width, N state expansion.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from baselines.linear_attention import with_feed_forward
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.diagonal_scan import selective_scan
from rodimus_lab.ops.segments import Segments

Step = Annotated[float, Field(gt=0)]


class S4DConfig(TokenMixerConfig):
    """`state` is N. Delta starts log-uniform between `dt_min` and `dt_max`."""

    kind: ClassVar[str] = "s4d"

    state: Annotated[int, Field(ge=1)] = 16
    dt_min: Step = 0.001
    dt_max: Step = 0.1

    def build(self, d_model: int) -> S4D:
        return S4D(self, d_model)

    def num_params(self, d_model: int) -> int:
        # A and C, Delta and D, the way out and its bias.
        return d_model * (2 * self.state + 2) + 2 * d_model * (d_model + 1)

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 4 * d_model * (d_model + self.state)

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * d_model * self.state * dtype.itemsize


class S4DState(NamedTuple):
    """`memory_BDN`: h."""

    memory_BDN: Tensor


class S4D(TokenMixer):
    """See the module's docstring and `S4DConfig`."""

    NO_DECAY = frozenset({"A_log", "C"})

    def __init__(self, config: S4DConfig, d_model: int):
        super().__init__()
        self.config = config
        self.A_log = nn.Parameter(torch.empty(d_model, config.state))
        self.C = nn.Parameter(torch.empty(d_model, config.state))
        self.dt_log = nn.Parameter(torch.empty(d_model))
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model, bias=True)

    def init_weights(self, init: Initializer) -> None:
        init.linear(self.out_proj, writes_residual=True)
        nn.init.normal_(self.C)
        nn.init.normal_(self.D)
        nn.init.uniform_(self.dt_log, math.log(self.config.dt_min), math.log(self.config.dt_max))
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.config.state + 1).log().expand_as(self.A_log))

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.A_log
        device, wide = device or weight.device, torch.promote_types(weight.dtype, torch.float32)
        return S4DState(torch.zeros(batch, *weight.shape, device=device, dtype=dtype or wide))

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        dt_D, A_DN = at_least_fp32(self.dt_log).exp(), -at_least_fp32(self.A_log).exp()
        step_DN = dt_D.unsqueeze(-1) * A_DN
        y_BTD, memory = selective_scan(
            x_BTD,
            dt_D,
            A_DN,
            _mean_exp(step_DN),
            self.C,
            self.D,
            state_BMN=None if state is None else state.memory_BDN,
            segments=segments,
        )
        y_BTD = F.glu(self.out_proj(F.gelu(y_BTD)), dim=-1)
        return y_BTD, None if state is None else S4DState(memory.to(state.memory_BDN.dtype))


def _mean_exp(x: Tensor) -> Tensor:
    """(e^x - 1) / x, by its series near 0, where the quotient has no derivative to speak of, and at 0 none."""
    near = x.abs() < 1e-2
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    far = x.masked_fill(near, 1.0)
    return torch.where(near, series, torch.expm1(far) / far)


@MODELS.register("s4d")
def s4d(size: Size) -> LanguageModelConfig:
    """As many layers as a Transformer; what they save on attention is spent on the feed-forward."""
    return with_feed_forward(size, S4DConfig())
