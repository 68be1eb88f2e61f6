"""RWKV-6, "Finch": a matrix memory whose decay and token shift depend on the data (Peng et al., 2024).

Time mixing, with x the normed input, x' the one before it (0 at the start) and delta = x' - x:

    low          = tanh((x + mu_x * delta) W_1)            in five parts of rank 32
    x_j          = x + (mu_j + low_j W_2j) * delta         for j = w, k, v, r, g
    r, k, v, g   = x_r W_r, x_k W_k, x_v W_v, SiLU(x_g W_g)
    alpha        = exp(-exp(x_decay)),  x_decay = decay + tanh(x_w W_3) W_4
    o_t          = r_t (S_{t-1} + (bonus * k_t)^T v_t)
    S_t          = alpha_t^T * S_{t-1} + k_t^T v_t
    y            = (Norm(o) * g) W_out                     LayerNorm of each head by itself

Channel mixing is RWKV-4's, narrower: y = sigmoid(r) * (ReLU(k)^2 W_v), F = 3.5 D.

The current token is read with the bonus and before it decays the memory. The gated linear recurrence reads after it has
decayed and written, so here it is told of each token one token late: what it then reads at t is S_{t-1}, exactly and
whatever the decay, and the current token's own term is added.

Shapes: B batch, T time, D model width, H heads, K key width, V value width (= K), R rank, J the five mixed inputs.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from baselines.linear_attention import HeadShape, Positive
from baselines.rwkv4 import SHIFT_FLOPS, ChannelMixing, ChannelMixingConfig, Layered, layered, shifted
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.gated_linear import gated_linear
from rodimus_lab.ops.segments import Segments

MIXED = "wkvrg"


class RWKV6Config(Layered):
    """Time mixing in heads of width `head_width`, or one as wide as the model where that is narrower. `mix_rank` and
    `decay_rank` are those of W_1 and W_3. `init="fla"` draws weights as flash-linear-attention does."""

    kind: ClassVar[str] = "rwkv6"

    head_width: Positive = 64
    mix_rank: Positive = 32
    decay_rank: Positive = 64
    norm_eps: Annotated[float, Field(gt=0)] = 64e-5
    init: Literal["official", "fla"] = "official"

    def shape(self, d_model: int) -> HeadShape:
        return HeadShape.of(max(1, d_model // self.head_width), d_model, d_model)

    def _matrices(self, d_model: int) -> int:
        return 5 * d_model**2 + 2 * d_model * (len(MIXED) * self.mix_rank + self.decay_rank)

    def build(self, d_model: int) -> RWKV6:
        return RWKV6(self, d_model)

    def num_params(self, d_model: int) -> int:
        # Beside the matrices: mu_x and mu, decay and bonus, the norm's weight and bias.
        return self._matrices(d_model) + (1 + len(MIXED) + 2 + 2) * d_model

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 2 * self._matrices(d_model) + SHIFT_FLOPS * d_model + 4 * self.shape(d_model).numel

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * (d_model + self.shape(d_model).numel) * dtype.itemsize


class RWKV6ChannelConfig(ChannelMixingConfig):
    """Channel mixing; F is `hidden`, or 3.5 * d_model down to a multiple of 32. `init` is as in `RWKV6Config`."""

    kind: ClassVar[str] = "rwkv6_channel"

    hidden: Positive | None = None
    init: Literal["official", "fla"] = "official"

    def width(self, d_model: int) -> int:
        return self.hidden or max(1, 7 * d_model // 64) * 32

    def build(self, d_model: int) -> RWKV6Channel:
        return RWKV6Channel(self, d_model)


class RWKV6State(NamedTuple):
    """`shift_B1D`: the last input; `memory_BHKV`: S."""

    shift_B1D: Tensor
    memory_BHKV: Tensor


class RWKV6(TokenMixer):
    """See the module's docstring and `RWKV6Config`."""

    NO_DECAY = frozenset({"mix_JD", "mix_down", "mix_up_JRD", "decay_down", "decay_up", "bonus_HK"})

    def __init__(self, config: RWKV6Config, d_model: int):
        super().__init__()
        self.config, self.shape = config, config.shape(d_model)
        mixed, mix_rank, decay_rank = len(MIXED), config.mix_rank, config.decay_rank
        self.mix_x = nn.Parameter(torch.empty(d_model))
        self.mix_JD = nn.Parameter(torch.empty(mixed, d_model))
        self.mix_down = nn.Parameter(torch.empty(mixed * mix_rank, d_model))
        self.mix_up_JRD = nn.Parameter(torch.empty(mixed, mix_rank, d_model))
        self.decay = nn.Parameter(torch.empty(d_model))
        self.decay_down = nn.Parameter(torch.empty(decay_rank, d_model))
        self.decay_up = nn.Parameter(torch.empty(d_model, decay_rank))
        self.bonus_HK = nn.Parameter(torch.empty(self.shape.heads, self.shape.key_width))
        self.key, self.value, self.receptance, self.gate, self.output = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(5)
        )
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(d_model)) for _ in range(2))

    def init_weights(self, init: Initializer) -> None:
        nn.init.zeros_(self.norm_bias)
        if self.config.init == "fla":
            self._init_as_fla(init)
            return
        config, d_model = self.config, self.decay.numel()
        place = torch.arange(d_model) / max(1, d_model - 1)
        zigzag = 0.1 * ((torch.arange(d_model) + 1) % 3 - 1)
        mu = 1 - config.mix(d_model)
        mu_of = {"v": mu - 0.3 * config.depth, "r": 1 - config.mix(d_model, 0.5), "g": 1 - config.mix(d_model, 0.5)}
        with torch.no_grad():
            self.mix_x.copy_(mu)
            self.mix_JD.copy_(torch.stack([mu_of.get(name, mu) for name in MIXED]))
            self.decay.copy_(-6 + 5 * place ** (0.7 + 1.3 * config.depth))
            self.bonus_HK.copy_((config.depth * (1 - place) + zigzag).view_as(self.bonus_HK))
        for down, up in ((self.mix_down, self.mix_up_JRD), (self.decay_down, self.decay_up)):
            nn.init.zeros_(down)
            nn.init.uniform_(up, -0.01, 0.01)
        for linear, gain in ((self.key, 0.1), (self.gate, 0.1), (self.value, 1.0), (self.receptance, 1.0)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.norm_weight, ((1 + config.layer) / config.layers) ** 0.7)

    def _init_as_fla(self, init: Initializer) -> None:
        for parameter in (self.mix_x, self.mix_JD, self.decay, self.bonus_HK):
            nn.init.zeros_(parameter)
        for weight in (self.mix_down, self.mix_up_JRD, self.decay_down, self.decay_up):
            nn.init.normal_(weight, std=init.std)
        for linear in (self.key, self.value, self.receptance, self.gate):
            init.linear(linear)
        nn.init.kaiming_uniform_(self.output.weight, a=math.sqrt(5))  # torch's default
        with torch.no_grad():
            self.output.weight.div_(math.sqrt(2 * self.config.layers))
        nn.init.ones_(self.norm_weight)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.key.weight
        return RWKV6State(
            torch.zeros(batch, 1, weight.shape[1], device=device or weight.device, dtype=dtype or weight.dtype),
            self.shape.zeros(batch, weight, device, dtype),
        )

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        past_BTD, shift_B1D = shifted(x_BTD, None if state is None else state.shift_B1D, segments)
        xw_BTD, xk_BTD, xv_BTD, xr_BTD, xg_BTD = self.mixed_inputs(x_BTD, past_BTD)
        # The decay's exponent is exponentiated twice, so it is summed in float32.
        low_BTR = F.linear(xw_BTD, self.decay_down).tanh()
        log_alpha_BTD = -(at_least_fp32(F.linear(low_BTR, self.decay_up)) + self.decay).exp()
        projected = (self.receptance(xr_BTD), self.key(xk_BTD), self.value(xv_BTD), log_alpha_BTD)
        r_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK = (x.unflatten(-1, (self.shape.heads, -1)) for x in projected)
        o_BTHV, memory_BHKV = wkv(
            r_BTHK,
            k_BTHK,
            v_BTHV,
            log_alpha_BTHK,
            self.bonus_HK,
            None if state is None else state.memory_BHKV,
            segments,
        )
        normed_BTD = F.layer_norm(o_BTHV, o_BTHV.shape[-1:], eps=self.config.norm_eps).flatten(-2)
        normed_BTD = (normed_BTD * self.norm_weight + self.norm_bias).to(v_BTHV.dtype)
        y_BTD = self.output(normed_BTD * F.silu(self.gate(xg_BTD)))
        if state is None:
            return y_BTD, None
        return y_BTD, RWKV6State(shift_B1D.to(state.shift_B1D.dtype), memory_BHKV.to(state.memory_BHKV.dtype))

    def mixed_inputs(self, x_BTD: Tensor, past_BTD: Tensor) -> tuple[Tensor, ...]:
        """x_w, x_k, x_v, x_r and x_g."""
        delta_BTD = past_BTD - x_BTD
        low_BTR = F.linear(x_BTD + delta_BTD * self.mix_x, self.mix_down).tanh()
        mu_JBTD = torch.einsum("btjr,jrd->jbtd", low_BTR.unflatten(-1, (len(MIXED), -1)), self.mix_up_JRD)
        return torch.addcmul(x_BTD, mu_JBTD + self.mix_JD[:, None, None], delta_BTD).unbind()


def wkv(
    r_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTHK: Tensor,
    bonus_HK: Tensor,
    memory_BHKV: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """o_BTHV = r_t (S_{t-1} + (bonus * k_t)^T v_t) and S after the last token, both in at least float32.

    Padding leaves S alone, its own outputs are arbitrary; each document after the first starts from S = 0.
    """
    k_of_last, log_alpha_of_last = k_BTHK[:, -1], log_alpha_BTHK[:, -1]
    follows_BT11 = None
    if segments is not None:
        ids_BT, valid_BT = segments.ids_BT, segments.valid_BT
        follows_BT11 = F.pad((ids_BT[:, 1:] == ids_BT[:, :-1]) & valid_BT[:, 1:], (1, 0))[:, :, None, None]
        k_of_last, log_alpha_of_last = (
            x.masked_fill(~valid_BT[:, -1, None, None], 0.0) for x in (k_of_last, log_alpha_of_last)
        )

    def late(x: Tensor) -> Tensor:
        """Of the token before in the same document, 0 where there is none: no key and no decay."""
        x = F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0))
        return x if follows_BT11 is None else x.masked_fill(~follows_BT11, 0.0)

    o_BTHV, before_BHKV = gated_linear(
        r_BTHK, late(k_BTHK), late(v_BTHV), late(log_alpha_BTHK), state_BHKV=memory_BHKV, segments=segments
    )
    own_BTH1 = (at_least_fp32(r_BTHK) * k_BTHK * bonus_HK).sum(-1, keepdim=True)
    write_BHKV = k_of_last.to(before_BHKV.dtype).unsqueeze(-1) * v_BTHV[:, -1].unsqueeze(-2)
    memory_BHKV = log_alpha_of_last.exp().unsqueeze(-1) * before_BHKV + write_BHKV
    return o_BTHV + own_BTH1 * v_BTHV, memory_BHKV


class RWKV6Channel(ChannelMixing):
    """See `baselines/rwkv4.py` and `RWKV6ChannelConfig`."""

    def __init__(self, config: RWKV6ChannelConfig, d_model: int):
        super().__init__(config, d_model)
        self.config = config

    def init_weights(self, init: Initializer) -> None:
        with torch.no_grad():
            for mix in (self.mix_k, self.mix_r):
                mix.copy_(torch.ones_like(mix) if self.config.init == "fla" else self.config.mix(mix.numel()))
        if self.config.init == "fla":
            for linear in (self.key, self.receptance, self.value):
                init.linear(linear)
        else:
            nn.init.orthogonal_(self.key.weight)
            nn.init.zeros_(self.receptance.weight)
            nn.init.zeros_(self.value.weight)


@MODELS.register("rwkv6")
def rwkv6(size: Size) -> LanguageModelConfig:
    """Every layer is a block of its own, since their first weights differ. Norms are LayerNorms. A state of 64 x d."""
    return layered(size, RWKV6Config, RWKV6ChannelConfig)
