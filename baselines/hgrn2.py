"""HGRN2 (Qin et al., 2024): the forget gate is the decay, and what it forgets is what is written.

    q, f, v = SiLU(x W_q), x W_f, x W_v
    alpha   = l + (1 - l) sigmoid(f)                       l: the layer's lower bound, 0 in the first
    S_t     = alpha_t^T * S_{t-1} + (1 - alpha_t)^T v_t
    o_t     = q_t S_t / sqrt(K)
    y       = RMSNorm(o) W_out                             over all heads together

The lower bounds rise with depth: with Gamma (L x d) one parameter of the whole model and P its softmax over the layers,
l of layer i is P_1 + ... + P_i (the first layer is 0).

Shapes: B batch, T time, D model width, H heads, K key width, V value width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from baselines.linear_attention import HeadShape, LinearMixer, Positive, Recurrence, with_feed_forward
from rodimus_lab.nn.mixer import Initializer, TokenMixerConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import Norm, at_least_fp32
from rodimus_lab.nn.zoo import MODELS, Size


class HGRN2Config(TokenMixerConfig):
    """`expand` is K, the state expansion, or the model's width where that is less."""

    kind: ClassVar[str] = "hgrn2"

    expand: Positive = 128
    lower_bounds: bool = True
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5

    def shape(self, d_model: int) -> HeadShape:
        return HeadShape.of(max(1, d_model // self.expand), d_model, d_model)

    def build(self, d_model: int) -> HGRN2:
        return HGRN2(self, d_model)

    def num_params(self, d_model: int) -> int:
        return 4 * d_model**2 + d_model + d_model * self.lower_bounds

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 8 * d_model**2 + 4 * self.shape(d_model).numel

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * self.shape(d_model).numel * dtype.itemsize


class LowerBounds(nn.Module):
    """Gamma, one row a layer, and the bounds made of it."""

    NO_DECAY = frozenset({"weight"})

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, width))

    def forward(self, layer_1: Tensor) -> Tensor:
        share_LD = at_least_fp32(self.weight).softmax(0)
        return (share_LD.cumsum(0) - share_LD[:1]).index_select(0, layer_1).squeeze(0)


class HGRN2(LinearMixer):
    """See the module's docstring and `HGRN2Config`. By itself it is the first layer of one."""

    bounds: LowerBounds | None
    layer_1: Tensor
    layer = 0

    def __init__(self, config: HGRN2Config, d_model: int):
        super().__init__()
        self.config, self.shape = config, config.shape(d_model)
        self.qfv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.norm = Norm(d_model, eps=config.norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.bounds = LowerBounds(1, d_model) if config.lower_bounds else None
        # A tensor, not a number, so that one compiled block serves all layers.
        self.register_buffer("layer_1", torch.zeros(1, dtype=torch.long), persistent=False)

    @staticmethod
    def join(mixers: Sequence[HGRN2]) -> LowerBounds | None:
        """Give the layers of a model their common bounds, and each its place; see `LanguageModel`."""
        bounded = [mixer for mixer in mixers if mixer.bounds is not None]
        if not bounded:
            return None
        bounds = LowerBounds(len(bounded), bounded[0].out_proj.weight.shape[0])
        for layer, mixer in enumerate(bounded):
            del mixer.bounds
            mixer.__dict__["bounds"] = bounds  # read, but not registered as a part of the mixer
            mixer.layer = layer
            mixer.reset_buffers()
        return bounds

    def reset_buffers(self) -> None:
        self.layer_1.fill_(self.layer)

    def init_weights(self, init: Initializer) -> None:
        init.linear(self.qfv_proj)
        init.linear(self.out_proj, writes_residual=True)
        self.norm.reset_parameters()
        if self.bounds is not None:
            nn.init.zeros_(self.bounds.weight)

    def read(self, x_BTD: Tensor) -> Recurrence:
        q, f, v = self.qfv_proj(x_BTD).chunk(3, dim=-1)
        f_BTD = at_least_fp32(f)
        room = 1.0 if self.bounds is None else 1 - self.bounds(self.layer_1).to(f_BTD.dtype)
        alpha_BTD = 1 - room + room * f_BTD.sigmoid()
        log_alpha_BTD = alpha_BTD.clamp(min=torch.finfo(f_BTD.dtype).tiny).log()
        k_BTD = (room * (-f_BTD).sigmoid()).to(v.dtype)
        return Recurrence(*(x.unflatten(-1, (self.shape.heads, -1)) for x in (F.silu(q), k_BTD, v, log_alpha_BTD)))

    def write(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        return self.out_proj(self.norm(o_BTHV.flatten(-2)))


@MODELS.register("hgrn2")
def hgrn2(size: Size) -> LanguageModelConfig:
    """A state of 128 x d, 4d^2 parameters a mixer."""
    return with_feed_forward(size, HGRN2Config())
