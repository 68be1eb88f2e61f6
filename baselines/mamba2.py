"""Mamba2: a state space with one decay a head, as structured state-space duality (SSD) has it (Dao & Gu, 2024).

With u the normed input,

    z, x, B, C, dt  = split(u W_in),  x, B, C = SiLU(ShortConv(x, B, C))
    Delta           = softplus(dt + b_dt)                  one number a head
    S_t             = exp(Delta_t A) S_{t-1} + B_t^T (Delta_t x_t),   A = -exp(A_log)
    o_t             = C_t S_t + D x_t
    y               = RMSNorm(o * SiLU(z)) W_out           over all heads together

which is Table 4's exp(-a g_t) and zeta(g_t) with g_t = Delta_t: the gated linear recurrence with q = C and k = B, which
all heads share, and one gate a head and token. Weights start as in the authors' code, or as in
flash-linear-attention's, which draws the way in and the convolution from N(0, std^2).

Shapes: B batch, T time, D model width, H heads, N state expansion, P head width, M inner width (H x P), X channels of
the convolution (M + 2N), W its width.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from baselines.linear_attention import HeadShape, Positive
from baselines.mamba import Step, init_steps
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.model import InitConfig, LanguageModelConfig
from rodimus_lab.nn.norm import Norm, at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.gated_norm import gated_norm
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.short_conv import short_conv
from rodimus_lab.ops.ssd import ssd


class Mamba2Config(TokenMixerConfig):
    """N is `state`, M `expand` * d_model in heads of width `head_width`, or one head where M is narrower. Delta starts
    log-uniform between `dt_min` and `dt_max`, -A uniform between `a_min` and `a_max`."""

    kind: ClassVar[str] = "mamba2"

    state: Positive = 128
    expand: Positive = 2
    head_width: Positive = 64
    conv_width: Annotated[int, Field(ge=2)] = 4
    dt_min: Step = 0.001
    dt_max: Step = 0.1
    dt_floor: Step = 1e-4
    a_min: Step = 1.0
    a_max: Step = 16.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    init: Literal["official", "fla"] = "official"

    def shape(self, d_model: int) -> HeadShape:
        heads = max(1, self.expand * d_model // self.head_width)
        return HeadShape.of(heads, heads * self.state, self.expand * d_model)

    def conv_channels(self, d_model: int) -> int:
        return self.expand * d_model + 2 * self.state

    def _matrices(self, d_model: int) -> int:
        m = self.expand * d_model
        return d_model * (m + self.conv_channels(d_model) + self.shape(d_model).heads) + m * d_model

    def build(self, d_model: int) -> Mamba2:
        return Mamba2(self, d_model)

    def num_params(self, d_model: int) -> int:
        # Beside the matrices: the convolution and its bias; Delta's bias, A and D; the norm.
        conv = self.conv_channels(d_model) * (self.conv_width + 1)
        return self._matrices(d_model) + conv + 3 * self.shape(d_model).heads + self.expand * d_model

    def flops_per_token(self, d_model: int, context: int) -> int:
        conv = 2 * self.conv_width * self.conv_channels(d_model)
        return 2 * self._matrices(d_model) + conv + 4 * self.shape(d_model).numel

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        conv = (self.conv_width - 1) * self.conv_channels(d_model)
        return batch * (conv + self.shape(d_model).numel) * dtype.itemsize


class Mamba2State(NamedTuple):
    """`conv_BWX`: the last conv_width - 1 inputs of the short convolution; `memory_BHNP`: S."""

    conv_BWX: Tensor
    memory_BHNP: Tensor


class Mamba2(TokenMixer):
    """See the module's docstring and `Mamba2Config`."""

    NO_DECAY = frozenset({"A_log", "D"})

    SPLITS_SEQUENCE = True

    def __init__(self, config: Mamba2Config, d_model: int):
        super().__init__()
        self.config, self.shape = config, config.shape(d_model)
        m, channels, heads = config.expand * d_model, config.conv_channels(d_model), self.shape.heads
        self.splits = [m, channels, heads]
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = Norm(m, eps=config.norm_eps)
        self.out_proj = nn.Linear(m, d_model, bias=False)

    def init_weights(self, init: Initializer) -> None:
        config = self.config
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))  # torch's default
        if config.init == "fla":
            init.linear(self.in_proj)
            nn.init.normal_(self.conv_weight, std=init.std)
            nn.init.zeros_(self.conv_bias)
        else:
            nn.init.kaiming_uniform_(self.in_proj.weight, a=math.sqrt(5))
            bound = config.conv_width**-0.5
            nn.init.uniform_(self.conv_weight, -bound, bound)
            nn.init.uniform_(self.conv_bias, -bound, bound)
        nn.init.ones_(self.D)
        self.norm.reset_parameters()
        with torch.no_grad():
            self.out_proj.weight.mul_(init.out_scale)
            init_steps(self.dt_bias, config.dt_min, config.dt_max, config.dt_floor)
            self.A_log.uniform_(config.a_min, config.a_max).log_()

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.out_proj.weight
        shape = (batch, self.config.conv_width - 1, self.conv_bias.numel())
        return Mamba2State(
            torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype),
            self.shape.zeros(batch, weight, device, dtype),
        )

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        heads, n, _ = self.shape
        z_BTM, conv_BTX, dt_BTH = self.in_proj(x_BTD).split(self.splits, dim=-1)
        conv_BTX, conv_state = short_conv(
            conv_BTX,
            self.conv_weight,
            self.conv_bias,
            silu=True,
            state_BWD=None if state is None else state.conv_BWX,
            segments=segments,
        )
        x_BTM, B_BTN, C_BTN = conv_BTX.split([self.splits[0], n, n], dim=-1)
        # Delta's bias is added in float32: it makes steps as small as 0.001.
        o_BTHP, memory_BHNP = ssd(
            x_BTM.unflatten(-1, (heads, -1)),
            F.softplus(at_least_fp32(dt_BTH) + self.dt_bias),
            -at_least_fp32(self.A_log).exp(),
            B_BTN,
            C_BTN,
            state_BHNP=None if state is None else state.memory_BHNP,
            segments=segments,
        )
        feedthrough_M = self.D.repeat_interleave(self.shape.value_width)
        y_BTM = gated_norm(o_BTHP.flatten(-2), x_BTM, z_BTM, feedthrough_M, self.norm.weight, eps=self.config.norm_eps)
        y_BTD = self.out_proj(y_BTM)
        if state is None:
            return y_BTD, None
        return y_BTD, Mamba2State(conv_state.to(state.conv_BWX.dtype), memory_BHNP.to(state.memory_BHNP.dtype))


@MODELS.register("mamba2")
def mamba2(size: Size) -> LanguageModelConfig:
    """Twice as many blocks as a Transformer has layers, each its own channel mixer. A state of 128 x 2d."""
    return LanguageModelConfig(
        vocab_size=size.vocab_size,
        d_model=size.d_model,
        pattern=(BlockConfig(hops=((Mamba2Config(),),)),),
        repeats=2 * size.num_layers,
        init=InitConfig(rescale_residual=True),
    )
