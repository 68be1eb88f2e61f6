"""Mamba: a selective state space (S6) beside a gate (Gu & Dao, 2023).

With u the normed input,

    x, z      = split(u W_in)
    x'        = SiLU(ShortConv(x))
    dt, B, C  = split(x' W_x),  Delta = softplus(dt W_dt + b_dt)
    h_t       = exp(Delta_t A) * h_{t-1} + (Delta_t * x'_t)^T B_t,   A = -exp(A_log)
    y         = ((h_t C_t + D * x'_t) * SiLU(z)) W_out

which is Table 4's exp(-A * 1^T g_t) and zeta(g_t) with g_t = Delta_t. Weights start as in the authors' code, or as in
flash-linear-attention's, which draws every linear weight from N(0, std^2).

Shapes: B batch, T time, D model width, M inner width, N state expansion, R rank of Delta, W convolution width.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.model import InitConfig, LanguageModelConfig
from rodimus_lab.nn.norm import at_least_fp32, is_plain
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.diagonal_scan import selective_scan
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.short_conv import short_conv

Positive = Annotated[int, Field(ge=1)]
Step = Annotated[float, Field(gt=0)]


class MambaConfig(TokenMixerConfig):
    """`dt_rank="auto"` is d_model / 16, rounded up. Delta starts log-uniform between `dt_min` and `dt_max`."""

    kind: ClassVar[str] = "mamba"

    state: Positive = 16
    expand: Positive = 2
    conv_width: Annotated[int, Field(ge=2)] = 4
    dt_rank: Positive | Literal["auto"] = "auto"
    dt_min: Step = 0.001
    dt_max: Step = 0.1
    dt_floor: Step = 1e-4
    init: Literal["official", "fla"] = "official"

    def rank(self, d_model: int) -> int:
        return math.ceil(d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    def _matrices(self, d_model: int) -> int:
        m, rank = self.expand * d_model, self.rank(d_model)
        return 3 * d_model * m + m * (rank + 2 * self.state) + rank * m

    def build(self, d_model: int) -> Mamba:
        return Mamba(self, d_model)

    def num_params(self, d_model: int) -> int:
        # Beside the matrices: the convolution and its bias, Delta's bias, A and D.
        return self._matrices(d_model) + self.expand * d_model * (self.conv_width + 1 + 1 + self.state + 1)

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 2 * self._matrices(d_model) + self.expand * d_model * (2 * self.conv_width + 4 * self.state)

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * self.expand * d_model * (self.conv_width - 1 + self.state) * dtype.itemsize


class MambaState(NamedTuple):
    """`conv_BWM`: the last conv_width - 1 inputs of the short convolution; `memory_BMN`: h."""

    conv_BWM: Tensor
    memory_BMN: Tensor


class Mamba(TokenMixer):
    """See the module's docstring and `MambaConfig`."""

    NO_DECAY = frozenset({"A_log", "D"})

    def __init__(self, config: MambaConfig, d_model: int):
        super().__init__()
        self.config = config
        m, rank = config.expand * d_model, config.rank(d_model)
        self.splits = [rank, config.state, config.state]
        self.in_proj = nn.Linear(d_model, 2 * m, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(m, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(m))
        self.x_proj = nn.Linear(m, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(rank, m, bias=True)
        self.A_log = nn.Parameter(torch.empty(m, config.state))
        self.D = nn.Parameter(torch.empty(m))
        self.out_proj = nn.Linear(m, d_model, bias=False)

    def init_weights(self, init: Initializer) -> None:
        config = self.config
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            if config.init == "fla":
                init.linear(linear, writes_residual=linear is self.out_proj)
            else:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))  # torch's default
        bound = config.conv_width**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        bound = self.splits[0] ** -0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        nn.init.ones_(self.D)
        with torch.no_grad():
            if config.init == "official":
                self.out_proj.weight.mul_(init.out_scale)
            init_steps(self.dt_proj.bias, config.dt_min, config.dt_max, config.dt_floor)
            self.A_log.copy_(torch.arange(1, config.state + 1).log().expand_as(self.A_log))

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight, config = self.out_proj.weight, self.config
        m, device, wide = weight.shape[1], device or weight.device, torch.promote_types(weight.dtype, torch.float32)
        return MambaState(
            torch.zeros(batch, config.conv_width - 1, m, device=device, dtype=dtype or weight.dtype),
            torch.zeros(batch, m, config.state, device=device, dtype=dtype or wide),
        )

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        x_BTM, z_BTM = self.in_proj(x_BTD).chunk(2, dim=-1)
        conv_BTM, conv_state = short_conv(
            x_BTM,
            self.conv_weight,
            self.conv_bias,
            silu=True,
            state_BWD=None if state is None else state.conv_BWM,
            segments=segments,
        )
        dt_BTR, B_BTN, C_BTN = self.x_proj(conv_BTM).split(self.splits, dim=-1)
        # Delta's bias is added in float32: it makes steps as small as 0.001.
        dt_BTM = (
            at_least_fp32(F.linear(dt_BTR, self.dt_proj.weight)) + self.dt_proj.bias
            if is_plain(self.dt_proj)
            else at_least_fp32(self.dt_proj(dt_BTR))
        )
        y_BTM, memory = selective_scan(
            conv_BTM,
            F.softplus(dt_BTM),
            -at_least_fp32(self.A_log).exp(),
            B_BTN,
            C_BTN,
            self.D,
            state_BMN=None if state is None else state.memory_BMN,
            segments=segments,
        )
        y_BTD = self.out_proj(y_BTM * F.silu(z_BTM))
        if state is None:
            return y_BTD, None
        return y_BTD, MambaState(conv_state.to(state.conv_BWM.dtype), memory.to(state.memory_BMN.dtype))


def init_steps(bias: Tensor, least: float, most: float, floor: float = 0.0) -> None:
    """Draw `bias` so that softplus(bias) is log-uniform between `least` and `most`, and no less than `floor`."""
    span = math.log(most) - math.log(least)
    steps = torch.exp(torch.rand_like(bias) * span + math.log(least)).clamp(min=floor)
    bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus


@MODELS.register("mamba")
def mamba(size: Size) -> LanguageModelConfig:
    """Twice as many blocks as a Transformer has layers, each its own channel mixer."""
    return LanguageModelConfig(
        vocab_size=size.vocab_size,
        d_model=size.d_model,
        pattern=(BlockConfig(hops=((MambaConfig(),),)),),
        repeats=2 * size.num_layers,
        init=InitConfig(rescale_residual=True),
    )
