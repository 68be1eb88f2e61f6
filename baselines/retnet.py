"""RetNet's retention (Sun et al., 2023) and YOCO's gated retention (Sun et al., 2024).

    q, k    = R^t (x W_q), R^t (x W_k)                     rotary positions
    v, g    = x W_v, x W_g
    S_t     = alpha_t S_{t-1} + k_t^T v_t                  alpha_t: one number a head
    o_t     = q_t S_t / sqrt(K)
    y       = (SiLU(g) * Norm(o)) W_out                    each head normalised by itself, without weights

RetNet's decays are constants, alpha = 1 - 2^(-5-h) in head h; gated retention (gRetNet in Table 4) makes them of the
token, alpha_t = sigmoid(x W_alpha)^(1/16).

Shapes: B batch, T time, D model width, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from baselines.linear_attention import HeadShape, Positive, with_feed_forward
from rodimus_lab.config import ConfigError
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import at_least_fp32
from rodimus_lab.nn.rotary import rotary_table, rotate
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.gated_linear import gated_linear
from rodimus_lab.ops.segments import Segments


class RetentionConfig(TokenMixerConfig):
    """`decay`: RetNet's constants or, "gated", one gate a head and token, the sigmoid to the power of 1/`temperature`.

    Heads have keys of width `head_width` (or there is one as wide as the model) and values `expand_v` times as wide.
    `init="fla"` draws all weights from the model's normal distribution instead of the authors' uniform ones.
    """

    kind: ClassVar[str] = "retention"

    decay: Literal["constant", "gated"] = "constant"
    head_width: Positive = 256
    expand_v: Positive = 1
    temperature: Annotated[float, Field(gt=0)] = 16.0
    rotary_base: Annotated[float, Field(gt=1)] = 10000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    init: Literal["authors", "fla"] = "authors"

    def shape(self, d_model: int) -> HeadShape:
        """Raises `ConfigError` where the rotation lacks pairs."""
        shape = HeadShape.of(max(1, d_model // self.head_width), d_model, self.expand_v * d_model)
        if shape.key_width % 2:
            raise ConfigError(
                f"the rotation needs keys of an even width, not {shape.key_width}; give another head_width"
            )
        return shape

    def build(self, d_model: int) -> Retention:
        return Retention(self, d_model)

    def num_params(self, d_model: int) -> int:
        gates = self.shape(d_model).heads if self.decay == "gated" else 0
        return (2 + 3 * self.expand_v) * d_model**2 + gates * d_model

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 2 * self.num_params(d_model) + 4 * self.shape(d_model).numel

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * (self.shape(d_model).numel * dtype.itemsize + 8)


class RetentionState(NamedTuple):
    """`memory_BHKV`: S; `length_B`: tokens seen of the document, for the rotation."""

    memory_BHKV: Tensor
    length_B: Tensor


class Retention(TokenMixer):
    """See the module's docstring and `RetentionConfig`."""

    def __init__(self, config: RetentionConfig, d_model: int):
        super().__init__()
        self.config, self.shape = config, config.shape(d_model)
        values = config.expand_v * d_model
        self.widths = (d_model, d_model, values, values)
        self.qkvg_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.decay_proj = nn.Linear(d_model, self.shape.heads, bias=False) if config.decay == "gated" else None
        self.out_proj = nn.Linear(values, d_model, bias=False)

    def init_weights(self, init: Initializer) -> None:
        inward = [self.qkvg_proj] if self.decay_proj is None else [self.qkvg_proj, self.decay_proj]
        if self.config.init == "fla":
            for layer in inward:
                init.linear(layer)
            init.linear(self.out_proj, writes_residual=True)
            return
        for rows in (*self.qkvg_proj.weight.split(self.widths), *(layer.weight for layer in inward[1:])):
            nn.init.xavier_uniform_(rows, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=init.out_scale * (0.5 if self.decay_proj else 1.0))

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.out_proj.weight
        return RetentionState(
            self.shape.zeros(batch, weight, device, dtype),
            torch.zeros(batch, device=device or weight.device, dtype=torch.long),
        )

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        q_BTHK, k_BTHK, v_BTHV, g_BTHV = (
            x.unflatten(-1, (self.shape.heads, -1)) for x in self.qkvg_proj(x_BTD).split(self.widths, dim=-1)
        )
        positions_BT = _positions(x_BTD, state, segments)
        table = rotary_table(positions_BT, self.shape.key_width, self.config.rotary_base, q_BTHK.dtype)
        o_BTHV, memory_BHKV = gated_linear(
            rotate(q_BTHK, table),
            rotate(k_BTHK, table),
            v_BTHV,
            self.log_decay(x_BTD),
            scale=self.shape.key_width**-0.5,
            state_BHKV=None if state is None else state.memory_BHKV,
            segments=segments,
            last_state=state is not None,
        )
        normed_BTHV = F.rms_norm(at_least_fp32(o_BTHV), o_BTHV.shape[-1:], eps=self.config.norm_eps).to(o_BTHV.dtype)
        y_BTD = self.out_proj((F.silu(g_BTHV) * normed_BTHV).flatten(-2))
        if state is None:
            return y_BTD, None
        length_B = positions_BT[:, -1] + 1
        if segments is not None:
            length_B = torch.where(segments.valid_BT[:, -1], length_B, state.length_B)
        return y_BTD, RetentionState(memory_BHKV.to(state.memory_BHKV.dtype), length_B)

    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """log_alpha, (B, T, H, 1) or the same for all tokens, (1, 1, H, 1)."""
        if self.decay_proj is not None:
            logits_BTH = at_least_fp32(self.decay_proj(x_BTD))
            return (F.logsigmoid(logits_BTH) / self.config.temperature).unsqueeze(-1)
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        head_H = torch.arange(self.shape.heads, device=x_BTD.device, dtype=wide)
        return torch.log1p(-torch.exp2(-5 - head_H)).view(1, 1, -1, 1)


def _positions(x_BTD: Tensor, state: RetentionState | None, segments: Segments | None) -> Tensor:
    """positions_BT of the tokens in their documents; one row for all where they are the same in all."""
    batch, length = x_BTD.shape[:2]
    if segments is not None:
        start_B = torch.zeros(batch, dtype=torch.long, device=x_BTD.device) if state is None else state.length_B
        return segments.positions_BT(start_B)
    index_1T = torch.arange(length, device=x_BTD.device).unsqueeze(0)
    return index_1T if state is None else index_1T + state.length_B.unsqueeze(1)


@MODELS.register("retnet")
def retnet(size: Size) -> LanguageModelConfig:
    """A state of 256 x d, 5d^2 parameters a mixer, the surplus over attention's saved on the feed-forward."""
    return with_feed_forward(size, RetentionConfig())


@MODELS.register("gretnet")
def gretnet(size: Size) -> LanguageModelConfig:
    """RetNet with YOCO's gate in place of the constants."""
    return with_feed_forward(size, RetentionConfig(decay="gated"))
