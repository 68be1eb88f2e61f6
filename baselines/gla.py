"""Gated linear attention (Yang et al., 2024): a decay of low rank for every row of the memory.

    q, k    = x W_q, x W_k                                 K: half the values' width
    v, g    = x W_v, x W_g
    alpha   = sigmoid(x W_1 W_2 + b)^(1/16)                rank 16
    S_t     = alpha_t^T * S_{t-1} + k_t^T v_t
    o_t     = q_t S_t / sqrt(K)
    y       = (SiLU(g) * Norm(o)) W_out                    each head normalised by itself

Shapes: B batch, T time, D model width, H heads, K key width, V value width, R rank.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from baselines.linear_attention import HeadShape, LinearMixer, Positive, Recurrence, with_feed_forward
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.mixer import Initializer, TokenMixerConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import Norm, at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size

Factor = Annotated[float, Field(gt=0)]


class GLAConfig(TokenMixerConfig):
    """flash-linear-attention's defaults. `gate_bias` is the output gate's, `norm_weight` the head norm's weight."""

    kind: ClassVar[str] = "gla"

    num_heads: Positive = 4
    expand_k: Factor = 0.5
    expand_v: Factor = 1.0
    rank: Positive = 16
    temperature: Factor = 16.0
    gate_bias: bool = False
    norm_weight: bool = True
    norm_eps: Factor = 1e-5

    def shape(self, d_model: int) -> HeadShape:
        return HeadShape.of(self.num_heads, int(self.expand_k * d_model), int(self.expand_v * d_model))

    def _matrices(self, d_model: int) -> int:
        heads, key_width, value_width = self.shape(d_model)
        keys, values = heads * key_width, heads * value_width
        return d_model * (2 * keys + 3 * values + self.rank) + self.rank * keys

    def build(self, d_model: int) -> GLA:
        return GLA(self, d_model)

    def num_params(self, d_model: int) -> int:
        heads, key_width, value_width = self.shape(d_model)
        biases = heads * key_width + heads * value_width * self.gate_bias
        return self._matrices(d_model) + biases + value_width * self.norm_weight

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 2 * self._matrices(d_model) + 4 * self.shape(d_model).numel

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * self.shape(d_model).numel * dtype.itemsize


class GLA(LinearMixer):
    """See the module's docstring and `GLAConfig`."""

    def __init__(self, config: GLAConfig, d_model: int):
        super().__init__()
        self.config, self.shape = config, config.shape(d_model)
        keys, values = (self.shape.heads * width for width in self.shape[1:])
        self.widths = (keys, keys, values, config.rank)
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.decay_proj = nn.Linear(config.rank, keys)
        self.gate_proj = nn.Linear(d_model, values, bias=config.gate_bias)
        self.norm = Norm(self.shape.value_width, eps=config.norm_eps) if config.norm_weight else None
        self.out_proj = nn.Linear(values, d_model, bias=False)

    def init_weights(self, init: Initializer) -> None:
        for layer in (self.in_proj, self.decay_proj, self.gate_proj):
            init.linear(layer)
        init.linear(self.out_proj, writes_residual=True)
        if self.norm is not None:
            self.norm.reset_parameters()

    def read(self, x_BTD: Tensor) -> Recurrence:
        *qkv, low_BTR = self.in_proj(x_BTD).split(self.widths, dim=-1)
        log_alpha = F.logsigmoid(at_least_fp32(self.decay_proj(low_BTR))) / self.config.temperature
        return Recurrence(*(x.unflatten(-1, (self.shape.heads, -1)) for x in (*qkv, log_alpha)))

    def write(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        if self.norm is not None:
            normed_BTHV = self.norm(o_BTHV)
        else:
            wide = at_least_fp32(o_BTHV)
            normed_BTHV = F.rms_norm(wide, wide.shape[-1:], eps=self.config.norm_eps).to(o_BTHV.dtype)
        return self.out_proj(F.silu(self.gate_proj(x_BTD)) * normed_BTHV.flatten(-2))


@MODELS.register("gla")
def gla(size: Size) -> LanguageModelConfig:
    """flash-linear-attention's default. A state of 128 x d in each of 4 heads at d = 1024, 256 x d at 2048."""
    return with_feed_forward(size, GLAConfig())


@MODELS.register("gla-table1")
def gla_table1(size: Size) -> LanguageModelConfig:
    """One of many mixtures whose count is Table 1's 44.71 M: biases on gates and feed-forward, no weight in the head
    norm and a feed-forward of 8d/3, not rounded up."""
    mixer = GLAConfig(gate_bias=True, norm_weight=False)
    return with_feed_forward(size, mixer, FeedForwardConfig(width=8 * size.d_model // 3, bias=True))
