"""HGRN (Qin et al., 2023): an elementwise recurrence whose forget gate has a lower bound that rises with depth.

    i, f, z = x W_i, x W_f, x W_z
    alpha   = l + (1 - l) sigmoid(f)                     l: the layer's lower bound, 0 in the first
    h_t     = alpha_t * h_{t-1} + (1 - alpha_t) * SiLU(i_t)
    y       = (RMSNorm(h) * SiLU(z)) W_out

The lower bounds are HGRN2's: one parameter of the whole model. The state is real, as in flash-linear-attention; the
paper's is complex and also turns by a learned angle at every token, which HGRN2 dropped.

Shapes: B batch, T time, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from baselines.hgrn2 import HGRN2, LowerBounds
from baselines.linear_attention import with_feed_forward
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import Norm, at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.diagonal_scan import diagonal_scan
from rodimus_lab.ops.segments import Segments


class HGRNConfig(TokenMixerConfig):
    """Without `lower_bounds` every layer's is 0."""

    kind: ClassVar[str] = "hgrn"

    lower_bounds: bool = True
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5

    def build(self, d_model: int) -> HGRN:
        return HGRN(self, d_model)

    def num_params(self, d_model: int) -> int:
        return 4 * d_model**2 + d_model + d_model * self.lower_bounds

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 8 * d_model**2

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * d_model * dtype.itemsize


class HGRNState(NamedTuple):
    """`memory_BD`: h."""

    memory_BD: Tensor


class HGRN(TokenMixer):
    """See the module's docstring and `HGRNConfig`. By itself it is the first layer of one."""

    bounds: LowerBounds | None
    layer_1: Tensor
    layer = 0

    def __init__(self, config: HGRNConfig, d_model: int):
        super().__init__()
        self.config = config
        self.ifz_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.norm = Norm(d_model, eps=config.norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.bounds = LowerBounds(1, d_model) if config.lower_bounds else None
        self.register_buffer("layer_1", torch.zeros(1, dtype=torch.long), persistent=False)

    @staticmethod
    def join(mixers: Sequence[HGRN]) -> LowerBounds | None:
        """As HGRN2's layers have theirs in common."""
        return HGRN2.join(mixers)  # type: ignore[arg-type]

    def reset_buffers(self) -> None:
        self.layer_1.fill_(self.layer)

    def init_weights(self, init: Initializer) -> None:
        init.linear(self.ifz_proj)
        init.linear(self.out_proj, writes_residual=True)
        self.norm.reset_parameters()
        if self.bounds is not None:
            nn.init.zeros_(self.bounds.weight)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.out_proj.weight
        device, wide = device or weight.device, torch.promote_types(weight.dtype, torch.float32)
        return HGRNState(torch.zeros(batch, weight.shape[0], device=device, dtype=dtype or wide))

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        i_BTD, f_BTD, z_BTD = self.ifz_proj(x_BTD).chunk(3, dim=-1)
        f_BTD = at_least_fp32(f_BTD)
        room = 1.0 if self.bounds is None else 1 - self.bounds(self.layer_1).to(f_BTD.dtype)
        alpha_BTD = 1 - room + room * f_BTD.sigmoid()
        h_BTD, memory = diagonal_scan(
            (room * (-f_BTD).sigmoid()).to(i_BTD.dtype) * F.silu(i_BTD),
            alpha_BTD.clamp(min=torch.finfo(f_BTD.dtype).tiny).log(),
            state_BX=None if state is None else state.memory_BD,
            segments=segments,
        )
        y_BTD = self.out_proj(self.norm(h_BTD) * F.silu(z_BTD))
        return y_BTD, None if state is None else HGRNState(memory.to(state.memory_BD.dtype))


@MODELS.register("hgrn")
def hgrn(size: Size) -> LanguageModelConfig:
    """4d^2 parameters a mixer, as attention has."""
    return with_feed_forward(size, HGRNConfig())
