"""RWKV-7: a generalised delta rule with a decay and a learning rate for every channel (Peng et al., 2025).

Time mixing, with u the normed input, u' the one before it (0 at the start) and [c] = mu_c u + (1 - mu_c) u':

    r, k, v = [r] W_r, [k] W_k, [v] W_v
    alpha   = exp(-exp(-1/2) sigmoid(w_0 + tanh([w] W_1) W_2))
    a       = sigmoid(a_0 + [a] A_1 A_2)                   the learning rate
    kappa   = k * k_k,  normalised to unit length in each head
    k       = k * (1 + (a - 1) * k_a)
    S_t     = (Diag(alpha_t) - (a_t * kappa_t)^T kappa_t) S_{t-1} + k_t^T v_t
    o_t     = LayerNorm(r_t S_t) + (r_t * r_k * k_t summed) v_t      each head by itself
    y       = (o * sigmoid([g] G_1) G_2) W_out

Channel mixing: y = ReLU([k] W_k)^2 W_v.

The authors' code also mixes into the values of every layer those of the first one. A mixer here sees nothing but its
own input, so that is left out.

Shapes: B batch, T time, D model width, H heads, K key width = value width, F hidden width.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from baselines.linear_attention import HeadShape
from baselines.rwkv4 import SHIFT_FLOPS, Layered, layered, mixed, shifted
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.delta_rule import delta_rule
from rodimus_lab.ops.segments import Segments

DELTA_FLOPS = 8  # An entry of the memory: what it holds for kappa, where that goes, what is written, what is read.
# How fast mu falls from the last channel to the first, for r, w, k, v, a and g.
MIX_POWERS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
RANKS = {"w": 2.5, "a": 2.5, "g": 5.0}  # Times the root of the width, to a multiple of 32.


class _Fading(Layered):
    @property
    def fading(self) -> float:
        """From 1 at the first layer to nearly 0 at the last."""
        return 1 - self.layer / self.layers


class RWKV7Config(_Fading):
    """Time mixing, in heads of width `head_width` or one as wide as the model where that is narrower."""

    kind: ClassVar[str] = "rwkv7"

    head_width: Annotated[int, Field(ge=1)] = 64

    def shape(self, d_model: int) -> HeadShape:
        return HeadShape.of(max(1, d_model // self.head_width), d_model, d_model)

    def rank(self, name: str, d_model: int) -> int:
        """Of the decay "w", the learning rate "a" and the output gate "g"."""
        return max(32, round(RANKS[name] * math.sqrt(d_model) / 32) * 32)

    def _matrices(self, d_model: int) -> int:
        return 4 * d_model**2 + 2 * d_model * sum(self.rank(name, d_model) for name in RANKS)

    def build(self, d_model: int) -> RWKV7:
        return RWKV7(self, d_model)

    def num_params(self, d_model: int) -> int:
        # Beside the matrices: mu, w_0, a_0, k_k, k_a, r_k and the norm's weight and bias.
        return self._matrices(d_model) + (len(MIX_POWERS) + 7) * d_model

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 2 * self._matrices(d_model) + SHIFT_FLOPS * d_model + DELTA_FLOPS * self.shape(d_model).numel

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * (d_model + self.shape(d_model).numel) * dtype.itemsize


class RWKV7ChannelConfig(_Fading):
    """Channel mixing; F is `expand` * d_model."""

    kind: ClassVar[str] = "rwkv7_channel"

    expand: Annotated[int, Field(ge=1)] = 4

    def build(self, d_model: int) -> RWKV7Channel:
        return RWKV7Channel(self, d_model)

    def num_params(self, d_model: int) -> int:
        return 2 * self.expand * d_model**2 + d_model

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 4 * self.expand * d_model**2 + SHIFT_FLOPS * d_model

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * d_model * dtype.itemsize


class RWKV7State(NamedTuple):
    """`shift_B1D`: the last input; `memory_BHKV`: S."""

    shift_B1D: Tensor
    memory_BHKV: Tensor


class RWKV7ChannelState(NamedTuple):
    """`shift_B1D`: the last input."""

    shift_B1D: Tensor


class RWKV7(TokenMixer):
    """See the module's docstring and `RWKV7Config`."""

    NO_DECAY = frozenset({"mix", "r_k", "w_1", "w_2", "a_1", "a_2", "g_1", "g_2"})

    def __init__(self, config: RWKV7Config, d_model: int):
        super().__init__()
        self.config, self.shape = config, config.shape(d_model)
        ranks = {name: config.rank(name, d_model) for name in RANKS}
        self.mix = nn.Parameter(torch.empty(len(MIX_POWERS), d_model))
        self.receptance, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.w_1, self.a_1, self.g_1 = (nn.Parameter(torch.empty(d_model, rank)) for rank in ranks.values())
        self.w_2, self.a_2, self.g_2 = (nn.Parameter(torch.empty(rank, d_model)) for rank in ranks.values())
        self.w_0, self.a_0, self.k_k, self.k_a = (nn.Parameter(torch.empty(d_model)) for _ in range(4))
        self.r_k = nn.Parameter(torch.empty(*self.shape[:2]))
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(d_model)) for _ in range(2))

    def init_weights(self, init: Initializer) -> None:
        config, (heads, width, _) = self.config, self.shape
        d_model = heads * width
        channel = torch.arange(d_model)
        share = channel / max(1, d_model - 1)
        # In each head from -1 to 1, flat in the middle.
        zigzag = 2 * (channel % width) / max(1, width - 1) - 1
        zigzag = zigzag * zigzag.abs()
        with torch.no_grad():
            for row, power in zip(self.mix, MIX_POWERS, strict=True):
                row.copy_((channel / d_model) ** (power * config.fading))
            self.w_0.copy_(-5.5 + 6 * share ** (1 + config.depth**0.3) + 2.5 * zigzag)
            self.a_0.copy_(-0.19 + 0.3 * zigzag + 0.4 * (share - 0.5))
            self.k_k.copy_(0.71 - 0.1 * (share - 0.5))
            self.k_a.fill_(1.02)
            self.r_k.fill_(-0.04)
            self.norm_weight.fill_(((config.layer + 1) / config.layers) ** 0.7)
            self.norm_bias.zero_()
        for down in (self.w_1, self.a_1, self.g_1):
            nn.init.zeros_(down)
        for up in (self.w_2, self.a_2, self.g_2):
            nn.init.orthogonal_(up, gain=0.1 * max(1.0, math.sqrt(up.shape[0] / up.shape[1])))
        for linear, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5), (self.output, 0.0)):
            nn.init.uniform_(linear.weight, -bound / math.sqrt(d_model), bound / math.sqrt(d_model))

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.key.weight
        shift = torch.zeros(batch, 1, weight.shape[0], device=device or weight.device, dtype=dtype or weight.dtype)
        return RWKV7State(shift, self.shape.zeros(batch, weight, device, dtype))

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        past_BTD, shift = shifted(x_BTD, None if state is None else state.shift_B1D, segments)
        for_r, for_w, for_k, for_v, for_a, for_g = (mixed(past_BTD, x_BTD, mu) for mu in self.mix)
        log_alpha_BTD = -math.exp(-0.5) * self._low_rank(for_w, self.w_1, self.w_2, self.w_0, torch.tanh).sigmoid()
        rate_BTD = self._low_rank(for_a, self.a_1, self.a_2, self.a_0).sigmoid()
        gate_BTD = (for_g @ self.g_1).sigmoid() @ self.g_2
        k_BTD = at_least_fp32(self.key(for_k))
        kappa_BTHK = F.normalize(self._heads(k_BTD * self.k_k), dim=-1, eps=1e-12)
        v_BTHV = self._heads(self.value(for_v))
        r_BTHK = self._heads(self.receptance(for_r))
        k_BTHK = self._heads(k_BTD * (1 + (rate_BTD - 1) * self.k_a)).to(v_BTHV.dtype)
        o_BTHV, memory_BHKV = delta_rule(
            r_BTHK,
            k_BTHK,
            v_BTHV,
            self._heads(log_alpha_BTD),
            a_BTHK=self._heads(rate_BTD) * kappa_BTHK,
            b_BTHK=-kappa_BTHK,
            state_BHKV=None if state is None else state.memory_BHKV,
            segments=segments,
        )
        own_BTH1 = (r_BTHK * k_BTHK * self.r_k.to(k_BTHK.dtype)).sum(-1, keepdim=True)
        o_BTD = self._norm(o_BTHV) + (own_BTH1 * v_BTHV).flatten(-2)
        y_BTD = self.output(o_BTD * gate_BTD)
        if state is None:
            return y_BTD, None
        return y_BTD, RWKV7State(shift.to(state.shift_B1D.dtype), memory_BHKV.to(state.memory_BHKV.dtype))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.shape.heads, -1))

    def _norm(self, o_BTHV: Tensor) -> Tensor:
        """LayerNorm of each head by itself, with an eps that grows with its width, as o does."""
        wide = at_least_fp32(o_BTHV)
        normed_BTD = F.layer_norm(wide, wide.shape[-1:], eps=1e-5 * self.shape.value_width).flatten(-2)
        return (normed_BTD * self.norm_weight + self.norm_bias).to(o_BTHV.dtype)

    @staticmethod
    def _low_rank(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, inner: Any = None) -> Tensor:
        """bias + inner(x down) up in at least float32."""
        low = x @ down
        return bias + at_least_fp32((low if inner is None else inner(low)) @ up)


class RWKV7Channel(TokenMixer):
    """See the module's docstring and `RWKV7ChannelConfig`."""

    def __init__(self, config: RWKV7ChannelConfig, d_model: int):
        super().__init__()
        self.config = config
        self.mix_k = nn.Parameter(torch.empty(d_model))
        self.key = nn.Linear(d_model, config.expand * d_model, bias=False)
        self.value = nn.Linear(config.expand * d_model, d_model, bias=False)

    def init_weights(self, init: Initializer) -> None:
        d_model = self.mix_k.numel()
        with torch.no_grad():
            self.mix_k.copy_((torch.arange(d_model) / d_model) ** self.config.fading**4)
        nn.init.uniform_(self.key.weight, -0.5 / math.sqrt(d_model), 0.5 / math.sqrt(d_model))
        nn.init.zeros_(self.value.weight)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.value.weight
        shape = (batch, 1, weight.shape[0])
        return RWKV7ChannelState(torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype))

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        past_BTD, shift = shifted(x_BTD, None if state is None else state.shift_B1D, segments)
        y_BTD = self.value(self.key(mixed(past_BTD, x_BTD, self.mix_k)).relu().square())
        return y_BTD, None if state is None else RWKV7ChannelState(shift.to(state.shift_B1D.dtype))


@MODELS.register("rwkv7")
def rwkv7(size: Size) -> LanguageModelConfig:
    """Every layer is a block of its own, since their first weights differ. Norms are LayerNorms."""
    return layered(size, RWKV7Config, RWKV7ChannelConfig)
