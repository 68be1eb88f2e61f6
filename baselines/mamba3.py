"""Mamba-3: a state space with a trapezoidal rule and a complex state (Lahoti et al., 2026), one input a head.

    z, x, B, C  = split(u W_in),  and for each head Delta = softplus(. + b), A = -softplus(.), lambda = sigmoid(.)
    B, C        = RMSNorm(B) + b_B, RMSNorm(C) + b_C               one for all heads, biases of each
    Theta_t     = Theta_{t-1} + Delta_t pi tanh(theta_t)           turns the first pairs of B_t and C_t
    h_t         = alpha_t h_{t-1} + (1 - lambda_t) Delta_t alpha_t B_{t-1}^T x_{t-1} + lambda_t Delta_t B_t^T x_t
    y           = ((C_t h_t + D x_t) * SiLU(z)) W_out,   alpha_t = exp(Delta_t A_t)

Both terms with B_s x_s have the decays after s in common, so that one memory takes them in one write. It is written a
token late, when lambda_{s+1} and Delta_{s+1} are known:

    S_{t-1}     = alpha_{t-1} S_{t-2} + (lambda_{t-1} Delta_{t-1} + (1 - lambda_t) Delta_t) B_{t-1}^T x_{t-1}
    C_t h_t     = alpha_t C_t S_{t-1} + lambda_t Delta_t (C_t B_t^T) x_t

which is the gated linear recurrence over the tokens before, and the token itself beside it.

Shapes: B batch, T time, D model width, H heads, K state expansion, V head width, A angles; X any further dimensions.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from baselines.linear_attention import HeadShape, Positive, with_feed_forward
from baselines.mamba import Step, init_steps
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.model import InitConfig, LanguageModelConfig
from rodimus_lab.nn.norm import Norm, at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.diagonal_scan import diagonal_scan, starts_BT
from rodimus_lab.ops.gated_linear import gated_linear
from rodimus_lab.ops.segments import Segments


class Mamba3Config(TokenMixerConfig):
    """Heads of width `head_width`, or one as wide as the inner width where that is narrower. `rotary_share` of the
    state's channels turn. Delta starts log-uniform between `dt_min` and `dt_max`; -A is at least `a_floor`.
    `init="fla"` draws all weights from the model's normal distribution."""

    kind: ClassVar[str] = "mamba3"

    state: Positive = 128
    expand: Positive = 2
    head_width: Positive = 64
    rotary_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    dt_min: Step = 0.001
    dt_max: Step = 0.1
    dt_floor: Step = 1e-4
    a_floor: Step = 1e-4
    norm_eps: Step = 1e-5
    init: Literal["official", "fla"] = "official"

    @property
    def angles(self) -> int:
        """Pairs of the state's channels that turn."""
        return int(self.state * self.rotary_share) // 2

    def shape(self, d_model: int) -> HeadShape:
        inner = self.expand * d_model
        heads = max(1, inner // self.head_width)
        return HeadShape.of(heads, heads * self.state, inner)

    def splits(self, d_model: int) -> list[int]:
        """Rows of the way in: z, x, B, C, Delta, A, lambda, theta."""
        inner, heads = self.expand * d_model, self.shape(d_model).heads
        return [inner, inner, self.state, self.state, heads, heads, heads, self.angles]

    def _matrices(self, d_model: int) -> int:
        return d_model * (sum(self.splits(d_model)) + self.expand * d_model)

    def build(self, d_model: int) -> Mamba3:
        return Mamba3(self, d_model)

    def num_params(self, d_model: int) -> int:
        # Beside the matrices: the norms of B and C, and for each head their biases, Delta's and D.
        return self._matrices(d_model) + 2 * self.state + self.shape(d_model).heads * (2 * self.state + 2)

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 2 * self._matrices(d_model) + 4 * self.shape(d_model).numel

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        heads, key_width, value_width = self.shape(d_model)
        last = heads * (key_width + value_width + 2 + self.angles)
        return batch * (self.shape(d_model).numel + last) * dtype.itemsize


class Mamba3State(NamedTuple):
    """`memory_BHKV`: S before the last token's write. Of the last token: B and x, which it will write, its lambda Delta
    and log alpha (`gates_BH2`), and Theta."""

    memory_BHKV: Tensor
    key_BHK: Tensor
    value_BHV: Tensor
    gates_BH2: Tensor
    angle_BHA: Tensor


class Mamba3(TokenMixer):
    """See the module's docstring and `Mamba3Config`."""

    NO_DECAY = frozenset({"B_bias", "C_bias"})

    def __init__(self, config: Mamba3Config, d_model: int):
        super().__init__()
        self.config, self.shape = config, config.shape(d_model)
        self.splits = config.splits(d_model)
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=False)
        self.B_norm, self.C_norm = (Norm(config.state, eps=config.norm_eps) for _ in range(2))
        self.B_bias, self.C_bias = (nn.Parameter(torch.empty(*self.shape[:2])) for _ in range(2))
        self.dt_bias, self.D = (nn.Parameter(torch.empty(self.shape.heads)) for _ in range(2))
        self.out_proj = nn.Linear(self.splits[0], d_model, bias=False)

    def init_weights(self, init: Initializer) -> None:
        config = self.config
        for linear in (self.in_proj, self.out_proj):
            if config.init == "fla":
                init.linear(linear, writes_residual=linear is self.out_proj)
            else:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))  # torch's default
        for norm in (self.B_norm, self.C_norm):
            norm.reset_parameters()
        for ones in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(ones)
        with torch.no_grad():
            if config.init == "official":
                self.out_proj.weight.mul_(init.out_scale)
            init_steps(self.dt_bias, config.dt_min, config.dt_max, config.dt_floor)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight, (heads, key_width, value_width) = self.out_proj.weight, self.shape
        device, wide = device or weight.device, dtype or torch.promote_types(weight.dtype, torch.float32)
        return Mamba3State(
            self.shape.zeros(batch, weight, device, dtype),
            torch.zeros(batch, heads, key_width, device=device, dtype=dtype or weight.dtype),
            torch.zeros(batch, heads, value_width, device=device, dtype=dtype or weight.dtype),
            torch.zeros(batch, heads, 2, device=device, dtype=wide),
            torch.zeros(batch, heads, self.config.angles, device=device, dtype=wide),
        )

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        before = self.init_state(x_BTD.shape[0], device=x_BTD.device) if state is None else state
        z, x, B, C, *gates, theta_BTA = self.in_proj(x_BTD).split(self.splits, dim=-1)
        z_BTHV, x_BTHV = (part.unflatten(-1, (self.shape.heads, -1)) for part in (z, x))
        dt, A, trapezoid = (at_least_fp32(part) for part in gates)
        dt_BTH, lambda_BTH = F.softplus(dt + self.dt_bias), trapezoid.sigmoid()
        log_alpha_BTH = -F.softplus(A).clamp(min=self.config.a_floor) * dt_BTH
        now_BTH, late_BTH = lambda_BTH * dt_BTH, (1 - lambda_BTH) * dt_BTH

        turn_BTHA = dt_BTH.unsqueeze(-1) * math.pi * at_least_fp32(theta_BTA).tanh().unsqueeze(-2)
        angle_BTHA, angle_BHA = diagonal_scan(
            turn_BTHA, turn_BTHA.new_zeros(1, 1, 1, 1), state_BX=before.angle_BHA, segments=segments
        )
        key_BTHK = turned(self.B_norm(B).unsqueeze(-2) + self.B_bias, angle_BTHA)
        query_BTHK = turned(self.C_norm(C).unsqueeze(-2) + self.C_bias, angle_BTHA)

        past_key, key_BHK = preceding(key_BTHK, before.key_BHK, segments)
        past_value, value_BHV = preceding(x_BTHV, before.value_BHV, segments)
        past_gates, gates_BH2 = preceding(torch.stack([now_BTH, log_alpha_BTH], dim=-1), before.gates_BH2, segments)
        past_now_BTH, past_log_alpha_BTH = past_gates.unbind(-1)
        read_BTHV, memory_BHKV = gated_linear(
            query_BTHK.to(x.dtype),
            ((past_now_BTH + late_BTH).unsqueeze(-1) * past_key).to(x.dtype),
            past_value,
            past_log_alpha_BTH.unsqueeze(-1),
            state_BHKV=before.memory_BHKV,
            segments=segments,
        )
        own_BTH = now_BTH * (query_BTHK * key_BTHK).sum(-1) + self.D
        y_BTHV = log_alpha_BTH.exp().unsqueeze(-1) * read_BTHV + own_BTH.unsqueeze(-1) * x_BTHV
        y_BTD = self.out_proj((y_BTHV.to(x.dtype) * F.silu(z_BTHV)).flatten(-2))
        if state is None:
            return y_BTD, None
        new = Mamba3State(memory_BHKV, key_BHK, value_BHV, gates_BH2, angle_BHA.remainder(2 * math.pi))
        return y_BTD, Mamba3State(*(part.to(old.dtype) for part, old in zip(new, state, strict=True)))


def turned(x_BTHK: Tensor, angle_BTHA: Tensor) -> Tensor:
    """Turn the first A pairs (x_0, x_1), (x_2, x_3) ... by their angles; in the angles' dtype."""
    turning, rest = x_BTHK.to(angle_BTHA.dtype).tensor_split([2 * angle_BTHA.shape[-1]], dim=-1)
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle_BTHA.cos(), angle_BTHA.sin()
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)


def preceding(x_BTX: Tensor, first_BX: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """x of the token before in the document, `first_BX` before the first token and 0 in a new document; the last x."""
    first_BX = first_BX.to(x_BTX.dtype)
    past_BTX = torch.cat([first_BX.unsqueeze(1), x_BTX[:, :-1]], dim=1)
    if segments is None:
        return past_BTX, x_BTX[:, -1].clone()  # A view would keep all of x in memory as long as the state.
    further = (slice(None), slice(None), *[None] * (x_BTX.ndim - 2))
    valid_BT = segments.valid_BT
    entered_BT = valid_BT & ~F.pad(valid_BT[:, :-1], (1, 0))
    past_BTX = torch.where(entered_BT[further], first_BX.unsqueeze(1), past_BTX)
    past_BTX = past_BTX.masked_fill(starts_BT(segments)[further], 0.0)
    return past_BTX, torch.where(valid_BT[further][:, -1], x_BTX[:, -1], first_BX)


@MODELS.register("mamba3")
def mamba3(size: Size) -> LanguageModelConfig:
    """A state of 128 x 2d; what the mixer has over attention is saved on the feed-forward."""
    return with_feed_forward(size, Mamba3Config(), exact=True).replace(init=InitConfig(rescale_residual=True))
