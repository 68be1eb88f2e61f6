"""RWKV-4: attention without queries, as a recurrence (Peng et al., 2023).

Time mixing, with u the normed input and u' the one before it (0 at the start):

    r, k, v  = (mu_r u + (1 - mu_r) u') W_r, and likewise for k and v
    wkv_t    = (sum_{i<t} exp(k_i - (t-1-i) w) v_i + exp(k_t + bonus) v_t) / (the same without v)
    y        = (sigmoid(r) * wkv) W_out,    w = exp(decay)

Channel mixing: y = sigmoid(r) * (ReLU(k)^2 W_v), with k and r of mixed inputs as well.

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
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.short_conv import short_conv
from rodimus_lab.ops.wkv import wkv

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
        k_BTD = self.key(mixed(past_BTD, x_BTD, self.mix_k))
        v_BTD = self.value(mixed(past_BTD, x_BTD, self.mix_v))
        r_BTD = self.receptance(mixed(past_BTD, x_BTD, self.mix_r))
        sums = top = None
        if state is not None:
            sums, top = at_least_fp32(state.sums_BD2), at_least_fp32(state.top_BD)
        log_w_D = -at_least_fp32(self.decay).exp()
        wkv_BTD, sums, top = wkv(
            k_BTD, v_BTD, log_w_D, at_least_fp32(self.bonus), sums, top, segments, last_state=state is not None
        )
        y_BTD = self.output(r_BTD.sigmoid() * wkv_BTD)
        if state is None:
            return y_BTD, None
        return y_BTD, RWKV4State(
            shift.to(state.shift_B1D.dtype), sums.to(state.sums_BD2.dtype), top.to(state.top_BD.dtype)
        )


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
