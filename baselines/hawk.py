"""Hawk: the real-gated linear recurrent unit, RG-LRU, in a block of two branches (De et al., 2024).

With u the normed input,

    x'   = ShortConv(u W_x)
    r, i = sigmoid(x' W_r + b_r), sigmoid(x' W_i + b_i)           in blocks on the diagonal
    h_t  = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x'_t),        log a_t = -c softplus(Lambda) * r_t
    y    = (h * GELU(u W_y)) W_out

The first token of a document has nothing before it to make room for, and the authors' code leaves its input whole: 1
stands for the root there. Hawk alternates this with a gated feed-forward, `GatedGELUConfig`.

Shapes: B batch, T time, D model width, M width of the recurrence, G gate blocks, K = M/G, F hidden width.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.model import InitConfig, LanguageModelConfig
from rodimus_lab.nn.norm import at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.diagonal_scan import diagonal_scan
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.short_conv import short_conv

Positive = Annotated[int, Field(ge=1)]
Open01 = Annotated[float, Field(gt=0, lt=1)]


class HawkConfig(TokenMixerConfig):
    """M is `expand` * d_model, up to a multiple of 8 in each of the `gate_blocks`. exp(-softplus(Lambda)), which is the
    decay where c r = 1, starts between `decay_min` and `decay_max`, its square uniform."""

    kind: ClassVar[str] = "hawk"

    expand: Annotated[float, Field(gt=0)] = 4 / 3
    gate_blocks: Positive = 8
    c: Annotated[float, Field(gt=0)] = 8.0
    conv_width: Annotated[int, Field(ge=2)] = 4
    decay_min: Open01 = 0.9
    decay_max: Open01 = 0.999

    def inner_width(self, d_model: int) -> int:
        return math.ceil(self.expand * d_model / (8 * self.gate_blocks)) * 8 * self.gate_blocks

    def _matrices(self, d_model: int) -> int:
        m = self.inner_width(d_model)
        return 3 * d_model * m + 2 * m * m // self.gate_blocks

    def build(self, d_model: int) -> Hawk:
        return Hawk(self, d_model)

    def num_params(self, d_model: int) -> int:
        # Beside the matrices: biases of x, y, r, i and out, the convolution and its bias, Lambda.
        return self._matrices(d_model) + self.inner_width(d_model) * (4 + self.conv_width + 1 + 1) + d_model

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 2 * (self._matrices(d_model) + self.inner_width(d_model) * self.conv_width)

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * (self.inner_width(d_model) * self.conv_width * dtype.itemsize + 8)


class HawkState(NamedTuple):
    """`conv_BWM`: the last conv_width - 1 inputs of the short convolution; `memory_BM`: h; `length_B`: tokens seen of
    the current document."""

    conv_BWM: Tensor
    memory_BM: Tensor
    length_B: Tensor


class Hawk(TokenMixer):
    """See the module's docstring and `HawkConfig`."""

    NO_DECAY = frozenset({"gate_bias"})

    def __init__(self, config: HawkConfig, d_model: int):
        super().__init__()
        self.config = config
        m, blocks = config.inner_width(d_model), config.gate_blocks
        self.in_proj = nn.Linear(d_model, 2 * m, bias=True)
        self.conv_weight = nn.Parameter(torch.empty(m, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(m))
        # One product gives the logits of both gates.
        self.gate_weight = nn.Parameter(torch.empty(blocks, m // blocks, 2 * (m // blocks)))
        self.gate_bias = nn.Parameter(torch.empty(blocks, 2 * (m // blocks)))
        self.decay = nn.Parameter(torch.empty(m))
        self.out_proj = nn.Linear(m, d_model, bias=True)

    def init_weights(self, init: Initializer) -> None:
        config, (d_model, m) = self.config, self.out_proj.weight.shape
        nn.init.normal_(self.in_proj.weight, std=d_model**-0.5)
        # The authors' variance is 2 over the number of blocks and M; `out_scale` counts two sublayers a block.
        nn.init.normal_(self.out_proj.weight, std=2 * init.out_scale * m**-0.5)
        nn.init.normal_(self.conv_weight, std=0.1 * config.conv_width**-0.5)
        nn.init.normal_(self.gate_weight, std=self.gate_weight.shape[1] ** -0.5)
        for bias in (self.in_proj.bias, self.out_proj.bias, self.conv_bias, self.gate_bias):
            nn.init.zeros_(bias)
        with torch.no_grad():
            self.decay.uniform_(config.decay_min**2, config.decay_max**2)
            self.decay.log_().mul_(-0.5).expm1_().log_()  # softplus(Lambda) = -log(decay)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight, config = self.out_proj.weight, self.config
        m, device, wide = weight.shape[1], device or weight.device, torch.promote_types(weight.dtype, torch.float32)
        return HawkState(
            torch.zeros(batch, config.conv_width - 1, m, device=device, dtype=dtype or weight.dtype),
            torch.zeros(batch, m, device=device, dtype=dtype or wide),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        x_BTM, gelu_BTM = self.in_proj(x_BTD).chunk(2, dim=-1)
        x_BTM, conv_state = short_conv(
            x_BTM,
            self.conv_weight,
            self.conv_bias,
            state_BWD=None if state is None else state.conv_BWM,
            segments=segments,
        )
        positions_BT = self._positions(x_BTD, state, segments)
        r_BTM, i_BTM = self._gates(x_BTM)
        log_a_BTM = -self.config.c * F.softplus(at_least_fp32(self.decay)) * r_BTM
        root_BTM = _BoundedRoot.apply(-torch.expm1(2 * log_a_BTM))
        root_BTM = root_BTM.masked_fill((positions_BT == 0).unsqueeze(-1), 1.0)
        h_BTM, memory = diagonal_scan(
            root_BTM * i_BTM * x_BTM,
            log_a_BTM,
            state_BX=None if state is None else state.memory_BM,
            segments=segments,
        )
        y_BTD = self.out_proj(h_BTM.to(x_BTM.dtype) * F.gelu(gelu_BTM, approximate="tanh"))
        if state is None:
            return y_BTD, None
        length_B = positions_BT[:, -1] + 1
        if segments is not None:
            length_B = torch.where(segments.valid_BT[:, -1], length_B, state.length_B)
        return y_BTD, HawkState(conv_state.to(state.conv_BWM.dtype), memory.to(state.memory_BM.dtype), length_B)

    def _gates(self, x_BTM: Tensor) -> list[Tensor]:
        """r and i, in at least float32."""
        blocks = self.gate_weight.shape[0]
        x_GRK = x_BTM.flatten(0, 1).unflatten(-1, (blocks, -1)).transpose(0, 1)  # R = B T rows
        logits = at_least_fp32(x_GRK @ self.gate_weight) + self.gate_bias.unsqueeze(1)
        return [z.transpose(0, 1).reshape(x_BTM.shape) for z in logits.sigmoid().chunk(2, dim=-1)]

    @staticmethod
    def _positions(x_BTD: Tensor, state: HawkState | None, segments: Segments | None) -> Tensor:
        batch, length = x_BTD.shape[:2]
        zeros_BT = torch.zeros(batch, length, dtype=torch.long, device=x_BTD.device)
        segments = Segments(zeros_BT) if segments is None else segments
        return segments.positions_BT(zeros_BT[:, 0] if state is None else state.length_B)


class _BoundedRoot(torch.autograd.Function):
    """The square root with a derivative of at most 1000, as the authors bound it: it has none at a decay of 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return gradient * (0.5 / root).clamp(max=1000.0)


class GatedGELUConfig(TokenMixerConfig):
    """W_out(GELU(x W_gate) * x W_up) with biases; F is `expand` * d_model."""

    kind: ClassVar[str] = "gated_gelu"

    expand: Positive = 3

    def build(self, d_model: int) -> GatedGELU:
        return GatedGELU(self, d_model)

    def num_params(self, d_model: int) -> int:
        return 3 * d_model * self.expand * d_model + 2 * self.expand * d_model + d_model

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 6 * d_model * self.expand * d_model

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return 0


class GatedGELU(TokenMixer):
    """See `GatedGELUConfig`."""

    def __init__(self, config: GatedGELUConfig, d_model: int):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * config.expand * d_model, bias=True)
        self.out_proj = nn.Linear(config.expand * d_model, d_model, bias=True)

    def init_weights(self, init: Initializer) -> None:
        d_model, width = self.out_proj.weight.shape
        nn.init.normal_(self.in_proj.weight, std=d_model**-0.5)
        nn.init.normal_(self.out_proj.weight, std=2 * init.out_scale * width**-0.5)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        return ()

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        gate_BTF, up_BTF = self.in_proj(x_BTD).chunk(2, dim=-1)
        return self.out_proj(F.gelu(gate_BTF, approximate="tanh") * up_BTF), state


def hawk_mixer(size: Size) -> HawkConfig:
    """With as many blocks of gates as the size has attention heads."""
    return HawkConfig(gate_blocks=size.num_heads)


@MODELS.register("hawk")
def hawk(size: Size) -> LanguageModelConfig:
    return LanguageModelConfig(
        vocab_size=size.vocab_size,
        d_model=size.d_model,
        pattern=(BlockConfig(hops=((hawk_mixer(size),), (GatedGELUConfig(),))),),
        repeats=size.num_layers,
        init=InitConfig(rescale_residual=True),
    )
