"""Kimi Delta Attention, of Kimi Linear: Gated DeltaNet with a decay for every row of the memory (Kimi Team, 2025).

    q, k, v = split(SiLU(ShortConv(x W_qkv))),  q and k normalised to unit length
    beta    = sigmoid(x W_beta)                            one number a head
    alpha   = exp(-exp(A_log) softplus(x W_1 W_2 + b))     of rank V; A_log: one number a head
    S_t     = (I - beta_t k_t^T k_t) (alpha_t^T * S_{t-1}) + beta_t k_t^T v_t
    o_t     = q_t S_t / sqrt(K)
    y       = (sigmoid(x W_3 W_4 + c) * Norm(o)) W_out     of rank V; each head normalised by itself

Kimi Linear alternates three such layers with one of attention and has experts for feed-forwards; `kda` here is the
recurrence alone, with the feed-forwards that all models here have.

Shapes: B batch, T time, D model width, H heads, K key width, V value width, R rank.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.gated_deltanet import DeltaConfig, DeltaMixer
from baselines.linear_attention import HeadShape, Positive, with_feed_forward
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size


class KDAConfig(DeltaConfig):
    """Heads of width `head_width`, or one as wide as the model where that is narrower."""

    kind: ClassVar[str] = "kda"

    head_width: Positive = 128

    def shape(self, d_model: int) -> HeadShape:
        return HeadShape.of(max(1, d_model // self.head_width), d_model, d_model)

    def _gate_matrices(self, d_model: int) -> int:
        heads, _, rank = self.shape(d_model)
        return d_model * (heads + 4 * rank)

    def _gate_vectors(self, d_model: int) -> int:
        return self.shape(d_model).heads + 2 * d_model

    def build(self, d_model: int) -> KDA:
        return KDA(self, d_model)


class KDA(DeltaMixer):
    """See the module's docstring and `KDAConfig`."""

    def __init__(self, config: KDAConfig, d_model: int):
        super().__init__(config, d_model)
        heads, _, rank = self.shape
        self.decay_down, self.decay_up = (nn.Linear(*ends, bias=False) for ends in ((d_model, rank), (rank, d_model)))
        self.gate_down, self.gate_up = nn.Linear(d_model, rank, bias=False), nn.Linear(rank, d_model)
        self.beta_proj = nn.Linear(d_model, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(d_model))

    def init_weights(self, init: Initializer) -> None:
        super().init_weights(init)
        for layer in (self.decay_down, self.decay_up, self.gate_down, self.gate_up, self.beta_proj):
            init.linear(layer)
        self.init_decay(self.A_log, self.dt_bias, 1.0)

    def gates(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        dt_BTD = at_least_fp32(self.decay_up(self.decay_down(x_BTD))) + self.dt_bias
        dt_BTHK = F.softplus(dt_BTD).unflatten(-1, (self.shape.heads, -1))
        return -at_least_fp32(self.A_log).exp().unsqueeze(-1) * dt_BTHK, at_least_fp32(self.beta_proj(x_BTD))

    def output_gate(self, x_BTD: Tensor) -> Tensor:
        return self.gate_up(self.gate_down(x_BTD)).sigmoid()


@MODELS.register("kda")
def kda(size: Size) -> LanguageModelConfig:
    """A state of 128 x d; what the mixer has over attention is saved on the feed-forward."""
    return with_feed_forward(size, KDAConfig(), exact=True)
