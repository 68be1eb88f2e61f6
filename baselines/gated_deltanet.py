"""Gated DeltaNet: the delta rule with a decay (Yang, Kautz & Hatamizadeh, 2025).

    q, k, v = split(SiLU(ShortConv(x W_qkv))),  q and k normalised to unit length
    beta    = sigmoid(x W_beta)                            one number a head
    alpha   = exp(-exp(A_log) softplus(x W_alpha + b))     one number a head
    S_t     = (I - beta_t k_t^T k_t) alpha_t S_{t-1} + beta_t k_t^T v_t
    o_t     = q_t S_t / sqrt(K)
    y       = (SiLU(x W_g) * Norm(o)) W_out                each head normalised by itself

So a token does not only add to the memory: of what the memory holds for its key it takes the share beta away first.
`DeltaMixer` here is what mixers with such a memory have in common.

Shapes: B batch, T time, D model width, H heads, K key width, V value width, W convolution width, M = 2HK + HV.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from baselines.linear_attention import HeadShape, Positive, with_feed_forward
from baselines.mamba import Step, init_steps
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import Norm, at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.delta_rule import delta_rule
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.short_conv import short_conv

Factor = Annotated[float, Field(gt=0)]
KEY_EPS = 1e-6  # Of the squared length of q and k.
DELTA_FLOPS = 6  # An entry of the memory: what it holds for the key, what is written, what is read.


class DeltaConfig(TokenMixerConfig):
    """`beta_max=2` lets a token turn over what the memory holds for its key: the transition's eigenvalue along the key
    then lies between -1 and 1. The decay's step starts log-uniform between `dt_min` and `dt_max`."""

    conv_width: Annotated[int, Field(ge=2)] = 4
    beta_max: Literal[1, 2] = 1
    dt_min: Step = 0.001
    dt_max: Step = 0.1
    dt_floor: Step = 1e-4
    norm_eps: Factor = 1e-5

    @abstractmethod
    def shape(self, d_model: int) -> HeadShape:
        """H, K and V."""

    @abstractmethod
    def _gate_matrices(self, d_model: int) -> int:
        """Entries of the matrices that make beta, the decay and the output gate."""

    @abstractmethod
    def _gate_vectors(self, d_model: int) -> int:
        """Entries of what else those have."""

    def conv_channels(self, d_model: int) -> int:
        heads, key_width, value_width = self.shape(d_model)
        return heads * (2 * key_width + value_width)

    def _matrices(self, d_model: int) -> int:
        heads, _, value_width = self.shape(d_model)
        return d_model * (self.conv_channels(d_model) + heads * value_width) + self._gate_matrices(d_model)

    def num_params(self, d_model: int) -> int:
        conv = self.conv_width * self.conv_channels(d_model)
        return self._matrices(d_model) + conv + self._gate_vectors(d_model) + self.shape(d_model).value_width

    def flops_per_token(self, d_model: int, context: int) -> int:
        conv = 2 * self.conv_width * self.conv_channels(d_model)
        return 2 * self._matrices(d_model) + conv + DELTA_FLOPS * self.shape(d_model).numel

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        conv = (self.conv_width - 1) * self.conv_channels(d_model)
        return batch * (conv + self.shape(d_model).numel) * dtype.itemsize


class DeltaState(NamedTuple):
    """`conv_BWM`: the last conv_width - 1 inputs of the short convolution; `memory_BHKV`: S."""

    conv_BWM: Tensor
    memory_BHKV: Tensor


class DeltaMixer(TokenMixer):
    """q, k and v through a short convolution, the delta rule, and a norm for each head before the way out."""

    def __init__(self, config: DeltaConfig, d_model: int):
        super().__init__()
        self.config, self.shape = config, config.shape(d_model)
        heads, key_width, value_width = self.shape
        self.widths = (heads * key_width, heads * key_width, heads * value_width)
        self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.widths), config.conv_width))
        self.norm = Norm(value_width, eps=config.norm_eps)
        self.out_proj = nn.Linear(heads * value_width, d_model, bias=False)

    @abstractmethod
    def gates(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """log_alpha_BTHK, of last dimension K or 1, and the logits of beta_BTH; both in at least float32."""

    @abstractmethod
    def output_gate(self, x_BTD: Tensor) -> Tensor:
        """What the norm's output, all heads side by side, is multiplied by."""

    def init_weights(self, init: Initializer) -> None:
        init.linear(self.qkv_proj)
        init.linear(self.out_proj, writes_residual=True)
        nn.init.normal_(self.conv_weight, std=init.std)
        self.norm.reset_parameters()

    def init_decay(self, A_log_H: Tensor, dt_bias: Tensor, least: float) -> None:
        """exp(A_log) uniform between `least` and 16, and the bias of a step; see `DeltaConfig`."""
        config = self.config
        with torch.no_grad():
            A_log_H.copy_(torch.empty_like(A_log_H).uniform_(least, 16.0).clamp(min=1e-4).log())
            init_steps(dt_bias, config.dt_min, config.dt_max, config.dt_floor)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.out_proj.weight
        conv = (batch, self.config.conv_width - 1, sum(self.widths))
        return DeltaState(
            torch.zeros(conv, device=device or weight.device, dtype=dtype or weight.dtype),
            self.shape.zeros(batch, weight, device, dtype),
        )

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        conv_BTM, conv_state = short_conv(
            self.qkv_proj(x_BTD),
            self.conv_weight,
            silu=True,
            state_BWD=None if state is None else state.conv_BWM,
            segments=segments,
        )
        q_BTHK, k_BTHK, v_BTHV = (x.unflatten(-1, (self.shape.heads, -1)) for x in conv_BTM.split(self.widths, dim=-1))
        log_alpha_BTHK, beta_BTH = self.gates(x_BTD)
        o_BTHV, memory_BHKV = delta_rule(
            unit_length(q_BTHK),
            unit_length(k_BTHK),
            v_BTHV,
            log_alpha_BTHK,
            self.config.beta_max * beta_BTH.sigmoid(),
            scale=self.shape.key_width**-0.5,
            state_BHKV=None if state is None else state.memory_BHKV,
            segments=segments,
        )
        y_BTD = self.out_proj(self.output_gate(x_BTD) * self.norm(o_BTHV).flatten(-2))
        if state is None:
            return y_BTD, None
        return y_BTD, DeltaState(conv_state.to(state.conv_BWM.dtype), memory_BHKV.to(state.memory_BHKV.dtype))


def unit_length(x: Tensor) -> Tensor:
    """`x` over its length along the last dimension, worked out in float32."""
    wide = at_least_fp32(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + KEY_EPS)).to(x.dtype)


class GatedDeltaNetConfig(DeltaConfig):
    """Keys of `expand_k` and values of `expand_v` times the model's width in `num_heads` heads: 6d^2 with the gate."""

    kind: ClassVar[str] = "gated_deltanet"

    num_heads: Positive = 6
    expand_k: Factor = 0.75
    expand_v: Factor = 1.5

    def shape(self, d_model: int) -> HeadShape:
        return HeadShape.of(self.num_heads, int(self.expand_k * d_model), int(self.expand_v * d_model))

    def _gate_matrices(self, d_model: int) -> int:
        return d_model * (2 * self.num_heads + self.num_heads * self.shape(d_model).value_width)

    def _gate_vectors(self, d_model: int) -> int:
        return 2 * self.num_heads

    def build(self, d_model: int) -> GatedDeltaNet:
        return GatedDeltaNet(self, d_model)


class GatedDeltaNet(DeltaMixer):
    """See the module's docstring and `GatedDeltaNetConfig`."""

    def __init__(self, config: GatedDeltaNetConfig, d_model: int):
        super().__init__(config, d_model)
        self.step_proj = nn.Linear(d_model, 2 * config.num_heads, bias=False)  # Rows: the decay's, then beta's.
        self.gate_proj = nn.Linear(d_model, self.widths[-1], bias=False)
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))

    def init_weights(self, init: Initializer) -> None:
        super().init_weights(init)
        init.linear(self.step_proj)
        init.linear(self.gate_proj)
        self.init_decay(self.A_log, self.dt_bias, 0.0)

    def gates(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        dt_BTH, beta_BTH = at_least_fp32(self.step_proj(x_BTD)).chunk(2, dim=-1)
        log_alpha_BTH = -at_least_fp32(self.A_log).exp() * F.softplus(dt_BTH + self.dt_bias)
        return log_alpha_BTH.unsqueeze(-1), beta_BTH

    def output_gate(self, x_BTD: Tensor) -> Tensor:
        return F.silu(self.gate_proj(x_BTD))


@MODELS.register("gated_deltanet")
def gated_deltanet(size: Size) -> LanguageModelConfig:
    """6 heads of d/8 x d/4, 256 x 512 at d = 2048, and what the mixer has over attention saved on the feed-forward."""
    return with_feed_forward(size, GatedDeltaNetConfig(), exact=True)
