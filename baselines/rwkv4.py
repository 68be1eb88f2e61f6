"""RWKV-4: attention without queries, as a recurrence (Peng et al., 2023).

Time mixing, with u the normed input and u' the one before it (0 at the start):

    r, k, v  = (mu_r u + (1 - mu_r) u') W_r, and likewise for k and v
    wkv_t    = (sum_{i<t} exp(k_i - (t-1-i) w) v_i + exp(k_t + bonus) v_t) / (the same without v)
    y        = (sigmoid(r) * wkv) W_out,    w = exp(decay)

Channel mixing: y = sigmoid(r) * (ReLU(k)^2 W_v), with k and r of mixed inputs as well.

Both sums are diagonal recurrences. They are kept as multiples of exp(p_t), where p_t = max(p_{t-1} - w, k_t) is the
largest exponent that they hold: the decay from t-1 to t is then exp(p_{t-1} - w - p_t) <= 1, the new term is
exp(k_t - p_t) <= 1, and the denominator is at least 1. wkv does not depend on p, which therefore needs no gradient.

Shapes: B batch, T time, D model width, F hidden width; 2: numerator, denominator.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.diagonal_scan import diagonal_scan, starts_BT
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.short_conv import short_conv

SHIFT_FLOPS = 4  # a channel: the shift is a convolution of two taps


class Layered(TokenMixerConfig):
    """The first weights depend on the place in the model: `layer` of `layers`."""

    layer: Annotated[int, Field(ge=0)] = 0
    layers: Annotated[int, Field(ge=1)] = 1

    def mix(self, d_model: int, power: float = 1.0) -> Tensor:
        """mu, from 0 at the first channel to nearly 1 at the last, and nearer to 1 with every layer."""
        return (torch.arange(d_model) / d_model) ** (power * (1 - self.layer / self.layers))

    @property
    def depth(self) -> float:
        """From 0 at the first layer to 1 at the last."""
        return self.layer / max(1, self.layers - 1)


class RWKV4Config(Layered):
    """Time mixing. `init="plain"` draws linear weights from N(0, std^2) instead of the authors' orthogonal and zero
    ones."""

    kind: ClassVar[str] = "rwkv4"

    init: Literal["official", "plain"] = "official"

    def build(self, d_model: int) -> RWKV4:
        return RWKV4(self, d_model)

    def num_params(self, d_model: int) -> int:
        return 4 * d_model * d_model + 5 * d_model

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 8 * d_model * d_model + SHIFT_FLOPS * d_model

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * 4 * d_model * dtype.itemsize


class ChannelMixingConfig(Layered):
    """Channel mixing of a hidden width that is `width(d_model)`."""

    @abstractmethod
    def width(self, d_model: int) -> int:
        """F."""

    def num_params(self, d_model: int) -> int:
        return (2 * self.width(d_model) + d_model) * d_model + 2 * d_model

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 2 * (2 * self.width(d_model) + d_model) * d_model + SHIFT_FLOPS * d_model

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * d_model * dtype.itemsize


class RWKV4ChannelConfig(ChannelMixingConfig):
    """Channel mixing; F is `expand` * d_model. `init` is as in `RWKV4Config`."""

    kind: ClassVar[str] = "rwkv4_channel"

    expand: Annotated[int, Field(ge=1)] = 4
    init: Literal["official", "plain"] = "official"

    def width(self, d_model: int) -> int:
        return self.expand * d_model

    def build(self, d_model: int) -> RWKV4Channel:
        return RWKV4Channel(self, d_model)


class RWKV4State(NamedTuple):
    """`shift_B1D`: the last input; `sums_BD2`: numerator and denominator over exp(p); `top_BD`: p, of no meaning where
    the denominator is 0."""

    shift_B1D: Tensor
    sums_BD2: Tensor
    top_BD: Tensor


class RWKV4ChannelState(NamedTuple):
    """`shift_B1D`: the last input."""

    shift_B1D: Tensor


class RWKV4(TokenMixer):
    """See the module's docstring and `RWKV4Config`."""

    def __init__(self, config: RWKV4Config, d_model: int):
        super().__init__()
        self.config = config
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.empty(d_model)) for _ in range(3))
        self.decay, self.bonus = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.key, self.value, self.receptance, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))

    def init_weights(self, init: Initializer) -> None:
        config, d_model = self.config, self.decay.numel()
        channel = torch.arange(d_model)
        decay = -5 + 8 * (channel / max(1, d_model - 1)) ** (0.7 + 1.3 * config.depth)
        with torch.no_grad():
            self.mix_k.copy_(config.mix(d_model))
            self.mix_v.copy_(config.mix(d_model) + 0.3 * config.depth)
            self.mix_r.copy_(config.mix(d_model, 0.5))
            self.decay.copy_(decay)
            self.bonus.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        if config.init == "plain":
            for linear in (self.key, self.value, self.receptance, self.output):
                init.linear(linear, writes_residual=linear is self.output)
        else:
            nn.init.orthogonal_(self.value.weight)
            for linear in (self.key, self.receptance, self.output):
                nn.init.zeros_(linear.weight)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.key.weight
        d_model, device = weight.shape[0], device or weight.device
        wide = dtype or torch.promote_types(weight.dtype, torch.float32)
        return RWKV4State(
            torch.zeros(batch, 1, d_model, device=device, dtype=dtype or weight.dtype),
            torch.zeros(batch, d_model, 2, device=device, dtype=wide),
            torch.zeros(batch, d_model, device=device, dtype=wide),
        )

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        past_BTD, shift = shifted(x_BTD, None if state is None else state.shift_B1D, segments)
        k_BTD = at_least_fp32(self.key(mixed(past_BTD, x_BTD, self.mix_k)))
        v_BTD = self.value(mixed(past_BTD, x_BTD, self.mix_v))
        r_BTD = self.receptance(mixed(past_BTD, x_BTD, self.mix_r))
        sums = top = None
        if state is not None:
            sums, top = state.sums_BD2.to(k_BTD.dtype), state.top_BD.to(k_BTD.dtype)
        log_w_D = -at_least_fp32(self.decay).exp()
        wkv_BTD, sums, top = wkv(k_BTD, at_least_fp32(v_BTD), log_w_D, self.bonus, sums, top, segments)
        y_BTD = self.output(r_BTD.sigmoid() * wkv_BTD.to(r_BTD.dtype))
        if state is None:
            return y_BTD, None
        return y_BTD, RWKV4State(
            shift.to(state.shift_B1D.dtype), sums.to(state.sums_BD2.dtype), top.to(state.top_BD.dtype)
        )


def wkv(
    k_BTD: Tensor,
    v_BTD: Tensor,
    log_w_D: Tensor,
    bonus_D: Tensor,
    sums_BD2: Tensor | None = None,
    top_BD: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """wkv_BTD, the sums after the last token over exp(p), and that p; `log_w_D` is -w."""
    if sums_BD2 is None or top_BD is None:
        top_BD = torch.zeros_like(k_BTD[:, 0])
        sums_BD2 = torch.stack([top_BD, top_BD], dim=-1)
    log_w_BTD = log_w_D.expand_as(k_BTD)
    seen_k_BTD = k_BTD
    if segments is not None:
        padding_BT1 = ~segments.valid_BT.unsqueeze(-1)
        seen_k_BTD = k_BTD.masked_fill(padding_BT1, -math.inf)
        log_w_BTD = log_w_BTD.masked_fill(padding_BT1, 0.0)
    with torch.no_grad():
        top_BD = top_BD.masked_fill(sums_BD2[..., 1] == 0, -math.inf)
        before_BTD, after_BTD = running_top(seen_k_BTD, log_w_BTD, top_BD, segments)
        after_BTD = after_BTD.masked_fill(after_BTD == -math.inf, 0.0)  # nothing seen yet: any p will do
    new_BTD2 = (seen_k_BTD - after_BTD).exp().unsqueeze(-1) * torch.stack([v_BTD, torch.ones_like(v_BTD)], dim=-1)
    log_a_BTD1 = (before_BTD + log_w_BTD - after_BTD).unsqueeze(-1)
    h_BTD2, last_BD2 = diagonal_scan(new_BTD2, log_a_BTD1, state_BX=sums_BD2, segments=segments)
    past_BTD2 = torch.cat([sums_BD2.unsqueeze(1), h_BTD2[:, :-1]], dim=1)
    if segments is not None:  # Padding gives 0; the token after it continues the state.
        after_padding_BT = F.pad(~segments.valid_BT[:, :-1], (1, 0))[:, :, None, None]
        past_BTD2 = torch.where(after_padding_BT, sums_BD2.unsqueeze(1), past_BTD2)
    own_BTD = k_BTD + bonus_D
    with torch.no_grad():
        most_BTD = torch.maximum(before_BTD, own_BTD)
    past_weight_BTD, own_weight_BTD = (before_BTD - most_BTD).exp(), (own_BTD - most_BTD).exp()
    numerator_BTD = past_weight_BTD * past_BTD2[..., 0] + own_weight_BTD * v_BTD
    denominator_BTD = past_weight_BTD * past_BTD2[..., 1] + own_weight_BTD
    return numerator_BTD / denominator_BTD, last_BD2, after_BTD[:, -1]


def running_top(k_BTD: Tensor, log_w_BTD: Tensor, top_BD: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """p_{t-1} and p_t of p_t = max(p_{t-1} + log_w_t, k_t), from p_0 = top and in each later document from -inf.

    In log2(T) steps: after each, a p knows of twice as many tokens.
    """
    if segments is not None:
        log_w_BTD = log_w_BTD.masked_fill(starts_BT(segments).unsqueeze(-1), -math.inf)
    p = torch.cat([top_BD.unsqueeze(1), k_BTD], dim=1)
    decay = torch.cat([torch.full_like(top_BD, -math.inf).unsqueeze(1), log_w_BTD], dim=1)
    reach = 1
    while reach < p.shape[1]:
        p = torch.cat([p[:, :reach], torch.maximum(p[:, reach:], p[:, :-reach] + decay[:, reach:])], dim=1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] + decay[:, :-reach]], dim=1)
        reach *= 2
    before = p[:, :-1]
    if segments is not None:
        before = before.masked_fill(starts_BT(segments).unsqueeze(-1), -math.inf)
    return before, p[:, 1:]


class ChannelMixing(TokenMixer):
    """Channel mixing as in the module's docstring, whatever its first weights."""

    def __init__(self, config: ChannelMixingConfig, d_model: int):
        super().__init__()
        width = config.width(d_model)
        self.mix_k, self.mix_r = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.key = nn.Linear(d_model, width, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(width, d_model, bias=False)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.receptance.weight
        shape = (batch, 1, weight.shape[0])
        return RWKV4ChannelState(torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype))

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        past_BTD, shift = shifted(x_BTD, None if state is None else state.shift_B1D, segments)
        k_BTF = self.key(mixed(past_BTD, x_BTD, self.mix_k))
        r_BTD = self.receptance(mixed(past_BTD, x_BTD, self.mix_r))
        y_BTD = r_BTD.sigmoid() * self.value(k_BTF.relu().square())
        return y_BTD, None if state is None else RWKV4ChannelState(shift.to(state.shift_B1D.dtype))


class RWKV4Channel(ChannelMixing):
    """See the module's docstring and `RWKV4ChannelConfig`."""

    def __init__(self, config: RWKV4ChannelConfig, d_model: int):
        super().__init__(config, d_model)
        self.config = config

    def init_weights(self, init: Initializer) -> None:
        config = self.config
        with torch.no_grad():
            for mix in (self.mix_k, self.mix_r):
                mix.copy_(config.mix(mix.numel()))
        if config.init == "plain":
            for linear in (self.key, self.receptance, self.value):
                init.linear(linear, writes_residual=linear is self.value)
        else:
            nn.init.orthogonal_(self.key.weight, gain=config.expand**0.5)
            nn.init.zeros_(self.receptance.weight)
            nn.init.zeros_(self.value.weight)


def shifted(x_BTD: Tensor, state_B1D: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """The input one token earlier in its document, 0 before the first; and the last input."""
    taps_D2 = F.pad(x_BTD.new_ones(x_BTD.shape[-1], 1), (0, 1))
    return short_conv(x_BTD, taps_D2, state_BWD=state_B1D, segments=segments)


def mixed(past_BTD: Tensor, x_BTD: Tensor, mu_D: Tensor) -> Tensor:
    """mu x + (1 - mu) past"""
    return torch.lerp(past_BTD, x_BTD, mu_D.to(x_BTD.dtype))


def layered(
    size: Size, time: Callable[..., TokenMixerConfig], channel: Callable[..., TokenMixerConfig]
) -> LanguageModelConfig:
    """Every layer is a block of its own, since their first weights differ: time mixing, then channel mixing, each after
    a LayerNorm."""
    layers = size.num_layers
    return LanguageModelConfig(
        vocab_size=size.vocab_size,
        d_model=size.d_model,
        pattern=tuple(
            BlockConfig(hops=((time(layer=i, layers=layers),), (channel(layer=i, layers=layers),)), norm="layer")
            for i in range(layers)
        ),
        repeats=1,
    )


@MODELS.register("rwkv4")
def rwkv4(size: Size) -> LanguageModelConfig:
    """Every layer is a block of its own, since their first weights differ. Norms are LayerNorms."""
    return layered(size, RWKV4Config, RWKV4ChannelConfig)
