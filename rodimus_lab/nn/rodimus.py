"""The Rodimus token mixer: gated linear recurrence with data-dependent tempered selection (Section 3.1, Eq. 9 to 11).

With u the normed input and the paper's symbols,

    x, z    = split(u W_fc)                                z: the GLU's gate
    x'      = SiLU(ShortConv(x))
    q, k    = split(x' W_qk),  k normalised to unit length
    g       = softplus(x' W_g + b_g),  tau = sigmoid(x' W_tau + b_tau)
    v       = x * sigmoid(x W_1 W_2 + b)                   beta_hat, of rank ell
    S_t     = (alpha_t^T beta_t) * S_{t-1} + (alpha_hat_t * k_t)^T v_t,   alpha = exp(-g tau),  alpha_hat = g^tau
    o_t     = q_t S_t / sqrt(n) + d * x'_t
    y       = RMSNorm(o * SiLU(z)) W_out

Each gate is a field of the config, and None leaves it out. Where the paper and the authors' published code differ, this
is the code: q, k, g and tau read x', beta_hat reads x, and the output gate comes before the norm.

Shapes: B batch, T time, D model width, M = m inner width, n state expansion.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from rodimus_lab.config import Config, ConfigError
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.norm import Norm, at_least_fp32, is_plain
from rodimus_lab.ops.conv_gate import LowRankGate, conv_gate
from rodimus_lab.ops.gated_linear import gated_linear
from rodimus_lab.ops.gated_norm import gated_norm
from rodimus_lab.ops.rodimus_step import RodimusWeights, rodimus_step
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.tempered_selection import tempered_selection

Positive = Annotated[int, Field(ge=1)]
Open01 = Annotated[float, Field(gt=0, lt=1)]
Rank = Positive | Literal["auto"]
XAVIER_GAIN = 2**-2.5


class SelectionGate(Config):
    """g (Eq. 9). Its bias starts so that g is log-uniform between the two values."""

    init_min: Annotated[float, Field(gt=0)] = 0.001
    init_max: Annotated[float, Field(gt=0)] = 0.1


class TemperatureGate(Config):
    """tau (Eq. 9). Its bias starts so that tau is uniform between the two values; `fixed` makes it a constant."""

    init_min: Open01 = 1 / 16
    init_max: Open01 = 0.9
    fixed: Open01 | None = None


class ValueGate(Config):
    """beta_hat = sigmoid(x W_1 W_2 + b) (Eq. 10) of rank ell; "auto" is the authors' max(d_model // 64, 16)."""

    rank: Rank = 16


class ValueDecay(Config):
    """beta = sigmoid(x W_1 W_2 + b)^(1/temperature), a decay of the state along m, which the paper tries and drops
    (Table 16) without giving its form: this one is GLA's."""

    rank: Rank = 16
    temperature: Annotated[float, Field(gt=0)] = 16.0


class RodimusConfig(TokenMixerConfig):
    """The Rodimus block's mixer. `n` is the state expansion; m is `expand` * d_model, up to a multiple of 8."""

    kind: ClassVar[str] = "rodimus"

    n: Positive = 64
    expand: Annotated[float, Field(gt=0)] = 2.0
    conv_width: Annotated[int, Field(ge=0)] = 4
    g: SelectionGate | None = SelectionGate()
    tau: TemperatureGate | None = TemperatureGate()
    beta_hat: ValueGate | None = ValueGate()
    beta: ValueDecay | None = None
    key_norm: bool = True
    feedthrough: bool = True
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5

    @model_validator(mode="after")
    def _temperature_needs_selection(self) -> RodimusConfig:
        if self.tau is not None and self.g is None:
            raise ValueError("tau tempers g: leaving g out means leaving tau out as well (set tau to null)")
        return self

    @property
    def learns_tau(self) -> bool:
        return self.tau is not None and self.tau.fixed is None

    @property
    def num_gate_rows(self) -> int:
        return self.n * ((self.g is not None) + self.learns_tau)

    def inner_width(self, d_model: int) -> int:
        """m. Raises `ConfigError` where nothing is left of it."""
        if self.expand * d_model < 1:
            raise ConfigError(f"expand={self.expand:g} leaves nothing of d_model={d_model}; give a larger one")
        return math.ceil(int(self.expand * d_model) / 8) * 8

    @staticmethod
    def rank_of(gate: ValueGate | ValueDecay, d_model: int) -> int:
        return max(d_model // 64, 16) if gate.rank == "auto" else gate.rank

    def _ranks(self, d_model: int) -> list[int]:
        return [self.rank_of(gate, d_model) for gate in (self.beta_hat, self.beta) if gate is not None]

    def build(self, d_model: int) -> Rodimus:
        return Rodimus(self, d_model)

    def num_params(self, d_model: int) -> int:
        m, rows = self.inner_width(d_model), self.num_gate_rows
        projections = 3 * d_model * m + m * (2 * self.n + rows) + rows
        low_rank = sum(2 * m * rank + m for rank in self._ranks(d_model))
        conv = m * (self.conv_width + 1) if self.conv_width else 0
        return projections + low_rank + conv + m * self.feedthrough + m

    def flops_per_token(self, d_model: int, context: int) -> int:
        m = self.inner_width(d_model)
        matrices = (
            3 * d_model * m + m * (2 * self.n + self.num_gate_rows) + sum(2 * m * r for r in self._ranks(d_model))
        )
        return 2 * (matrices + m * self.conv_width) + 4 * self.n * m

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * self.inner_width(d_model) * (self.n + max(self.conv_width - 1, 0)) * dtype.itemsize


class RodimusState(NamedTuple):
    """`conv_BWM`: the last conv_width - 1 inputs of the short convolution; `memory_B1nM`: S."""

    conv_BWM: Tensor
    memory_B1nM: Tensor


class Gates(NamedTuple):
    """g and tau of Eq. 9 in at least float32; tau is None where it is left out, and a constant one is spread."""

    g_BTn: Tensor
    tau_BTn: Tensor | None


class LowRank(nn.Module):
    """x_BTM -> logits_BTM = x W_1 W_2 + b."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=True)

    def init_weights(self) -> None:
        nn.init.xavier_uniform_(self.down.weight, gain=XAVIER_GAIN)
        nn.init.xavier_uniform_(self.up.weight, gain=XAVIER_GAIN)
        nn.init.zeros_(self.up.bias)

    @property
    def weights(self) -> LowRankGate | None:
        """For `conv_gate`, where they are all there is to the gate."""
        if not (is_plain(self.down) and is_plain(self.up)):
            return None
        return LowRankGate(self.down.weight, self.up.weight, self.up.bias)

    def forward(self, x_BTM: Tensor) -> Tensor:
        return self.up(self.down(x_BTM))


class Rodimus(TokenMixer):
    """See the module's docstring and `RodimusConfig`."""

    SPLITS_SEQUENCE = True

    def __init__(self, config: RodimusConfig, d_model: int):
        super().__init__()
        self.config = config
        n, m = config.n, config.inner_width(d_model)
        self.fc = nn.Linear(d_model, 2 * m, bias=False)
        # One product gives q, k and the gates' logits; the gates' bias is added in float32.
        self.state_proj = nn.Linear(m, 2 * n + config.num_gate_rows, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(config.num_gate_rows)) if config.num_gate_rows else None
        self.value_gate = LowRank(m, config.rank_of(config.beta_hat, d_model)) if config.beta_hat else None
        self.value_decay = LowRank(m, config.rank_of(config.beta, d_model)) if config.beta else None
        self.conv_weight = nn.Parameter(torch.empty(m, config.conv_width)) if config.conv_width else None
        self.conv_bias = nn.Parameter(torch.empty(m)) if config.conv_width else None
        self.feedthrough = nn.Parameter(torch.empty(m)) if config.feedthrough else None
        self.norm = Norm(m, "rms", config.norm_eps)
        self.out_proj = nn.Linear(m, d_model, bias=False)

    def init_weights(self, init: Initializer) -> None:
        config = self.config
        init.linear(self.fc)
        init.linear(self.out_proj, writes_residual=True)
        for rows in self.state_proj.weight.split([2 * config.n] + [config.num_gate_rows] * (config.num_gate_rows > 0)):
            nn.init.xavier_uniform_(rows, gain=XAVIER_GAIN)
        for low_rank in (self.value_gate, self.value_decay):
            if low_rank is not None:
                low_rank.init_weights()
        if self.conv_weight is not None and self.conv_bias is not None:
            bound = config.conv_width**-0.5
            nn.init.uniform_(self.conv_weight, -bound, bound)
            nn.init.uniform_(self.conv_bias, -bound, bound)
        if self.feedthrough is not None:
            nn.init.ones_(self.feedthrough)
        self.norm.reset_parameters()
        if self.gate_bias is not None:
            with torch.no_grad():
                self._init_gate_bias(self.gate_bias)

    def _init_gate_bias(self, bias: Tensor) -> None:
        gates = bias.split(self.config.n)
        if (g := self.config.g) is not None:
            span = math.log(g.init_max) - math.log(g.init_min)
            start = torch.exp(torch.rand_like(gates[0]) * span + math.log(g.init_min)).clamp(min=1e-4)
            gates[0].copy_(start + torch.log(-torch.expm1(-start)))  # the inverse of softplus
        if self.config.learns_tau and (tau := self.config.tau) is not None:
            gates[1].uniform_(tau.init_min, tau.init_max).logit_()

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight, config = self.out_proj.weight, self.config
        m, device, wide = weight.shape[1], device or weight.device, torch.promote_types(weight.dtype, torch.float32)
        return RodimusState(
            torch.zeros(batch, max(config.conv_width - 1, 0), m, device=device, dtype=dtype or weight.dtype),
            torch.zeros(batch, 1, config.n, m, device=device, dtype=dtype or wide),
        )

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        # Two products, not the halves of one: joining the halves' gradients would cost four trips through memory.
        if is_plain(self.fc):
            x_BTM, z_BTM = (F.linear(x_BTD, weight) for weight in self.fc.weight.chunk(2))
        else:
            x_BTM, z_BTM = self.fc(x_BTD).chunk(2, dim=-1)
        gate = None if self.value_gate is None else self.value_gate.weights
        conv_BTM, v_BTM, conv_state = conv_gate(
            x_BTM,
            self.conv_weight,
            self.conv_bias,
            gate,
            state_BWM=None if state is None else state.conv_BWM,
            segments=segments,
        )
        if self.value_gate is not None and gate is None:
            v_BTM = v_BTM * self.value_gate(v_BTM).sigmoid()
        q_BTn, k_BTn, gates = self.state_proj(conv_BTM).split(
            [self.config.n, self.config.n, self.config.num_gate_rows], dim=-1
        )
        log_alpha_BTn, k_BTn = self._select(k_BTn, gates)
        log_beta_BTM = None
        if self.value_decay is not None and self.config.beta is not None:
            log_beta_BTM = F.logsigmoid(at_least_fp32(self.value_decay(x_BTM))) / self.config.beta.temperature
        o_BT1M, memory = gated_linear(
            q_BTn.unsqueeze(2),
            k_BTn.unsqueeze(2),
            v_BTM.unsqueeze(2),
            None if log_alpha_BTn is None else log_alpha_BTn.unsqueeze(2),
            None if log_beta_BTM is None else log_beta_BTM.unsqueeze(2),
            scale=self.config.n**-0.5,
            state_BHKV=None if state is None else state.memory_B1nM,
            segments=segments,
            last_state=state is not None,
        )
        y_BTM = gated_norm(
            o_BT1M.squeeze(2), conv_BTM, z_BTM, self.feedthrough, self.norm.weight, eps=self.config.norm_eps
        )
        y_BTD = self.out_proj(y_BTM)
        if state is None:
            return y_BTD, None
        assert conv_state is not None
        return y_BTD, RodimusState(conv_state.to(state.conv_BWM.dtype), memory.to(state.memory_B1nM.dtype))

    def step(self, x_BD: Tensor, norm: Norm, base_BD: Tensor, state: State) -> Tensor:
        weights = self._weights_of_step(norm)
        if weights is None:
            return super().step(x_BD, norm, base_BD, state)
        return rodimus_step(x_BD, base_BD, state.conv_BWM, state.memory_B1nM, weights)

    def _weights_of_step(self, norm: Norm) -> RodimusWeights | None:
        """For `rodimus_step`, which knows the paper's model only."""
        config, entry, leave = self.config, norm.rms, self.norm.rms
        if not (config.learns_tau and config.key_norm and config.conv_width > 1) or self.value_decay is not None:
            return None
        if self.conv_weight is None or self.conv_bias is None or self.gate_bias is None or self.feedthrough is None:
            return None
        if self.value_gate is None or entry is None or leave is None:
            return None
        down, up = self.value_gate.down, self.value_gate.up
        if not all(map(is_plain, (self.fc, self.state_proj, down, up, self.out_proj))):
            return None
        return RodimusWeights(
            entry, self.fc.weight, self.conv_weight, self.conv_bias, self.state_proj.weight, self.gate_bias,
            down.weight, up.weight, up.bias, self.feedthrough, leave, self.out_proj.weight,
        )  # fmt: skip

    def gates(self, x_BTD: Tensor) -> Gates:
        """The gates that `forward` of x_BTD uses without a state, to be looked at. Raises `ValueError` without g."""
        config = self.config
        if self.gate_bias is None:
            raise ValueError("there is no gate g")
        gate = None if self.value_gate is None else self.value_gate.weights
        x_BTM = F.linear(x_BTD, self.fc.weight.chunk(2)[0])
        conv_BTM, _, _ = conv_gate(x_BTM, self.conv_weight, self.conv_bias, gate)
        logits = at_least_fp32(F.linear(conv_BTM, self.state_proj.weight[2 * config.n :])) + self.gate_bias
        g_BTn = F.softplus(logits[..., : config.n])
        if config.tau is None:
            return Gates(g_BTn, None)
        if config.tau.fixed is not None:
            return Gates(g_BTn, torch.full_like(g_BTn, config.tau.fixed))
        return Gates(g_BTn, logits[..., config.n :].sigmoid())

    def _select(self, k_BTn: Tensor, gates: Tensor) -> tuple[Tensor | None, Tensor]:
        """log alpha = -g tau and alpha_hat * k = g^tau * k."""
        config = self.config
        if self.gate_bias is None:
            if config.key_norm:
                k_BTn = F.normalize(at_least_fp32(k_BTn), dim=-1, eps=1e-12).to(k_BTn.dtype)
            return None, k_BTn
        fixed = config.tau.fixed if config.tau is not None else 1.0
        tau = 1.0 if fixed is None else fixed
        return tempered_selection(k_BTn, gates, self.gate_bias, tau=tau, key_norm=config.key_norm)
