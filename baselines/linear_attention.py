"""Linear attention: a matrix memory that only adds, read through a feature map (Katharopoulos et al., 2020).

    q, k    = phi(x W_q), phi(x W_k)                       phi = ELU + 1
    v       = x W_v
    S_t     = S_{t-1} + k_t^T v_t
    o_t     = q_t S_t / sqrt(K)
    y       = Norm(o) W_out                                each head normalised by itself

Table 4's first row is linear attention "without scaling": what divides by the sum of all keys' weights is replaced by
the norm (Qin et al., 2022). `LinearMixer` here is what mixers with such a memory have in common.

Shapes: B batch, T time, D model width, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rodimus_lab.errors import UserError
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import Norm
from rodimus_lab.nn.zoo import MODELS, Size, align8
from rodimus_lab.ops.gated_linear import gated_linear
from rodimus_lab.ops.segments import Segments

Positive = Annotated[int, Field(ge=1)]


class LinearState(NamedTuple):
    """`memory_BHKV`: S."""

    memory_BHKV: Tensor


class HeadShape(NamedTuple):
    """H, K and V of a matrix memory."""

    heads: int
    key_width: int
    value_width: int

    @classmethod
    def of(cls, heads: int, keys: int, values: int) -> HeadShape:
        """From the widths of all heads together. Raises `UserError` where the heads do not divide them or are left
        without a width."""
        if keys < 1 or values < 1:
            raise UserError(
                f"keys of width {keys} and values of width {values} hold nothing; make both at least 1 wide"
            )
        if keys % heads or values % heads:
            raise UserError(f"{heads} heads do not divide keys of width {keys} and values of width {values}")
        return cls(heads, keys // heads, values // heads)

    @property
    def numel(self) -> int:
        return self.heads * self.key_width * self.value_width

    def zeros(self, batch: int, weight: Tensor, device: Any, dtype: torch.dtype | None) -> Tensor:
        """memory_BHKV before the first token, where the weights are and in at least float32 unless told otherwise."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros(batch, *self, device=device or weight.device, dtype=dtype or wide)


class Recurrence(NamedTuple):
    """What `gated_linear` is given."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    log_alpha_BTHK: Tensor | None = None


class LinearMixer(TokenMixer):
    """S_t = alpha_t^T * S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(K), between what comes in and what goes out."""

    SPLITS_SEQUENCE = True

    shape: HeadShape
    out_proj: nn.Linear

    @abstractmethod
    def read(self, x_BTD: Tensor) -> Recurrence:
        """What the memory is asked, told and made to forget."""

    @abstractmethod
    def write(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """y_BTD from what the memory answered."""

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        return LinearState(self.shape.zeros(batch, self.out_proj.weight, device, dtype))

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        o_BTHV, memory_BHKV = gated_linear(
            *self.read(x_BTD),
            scale=self.shape.key_width**-0.5,
            state_BHKV=None if state is None else state.memory_BHKV,
            segments=segments,
            last_state=state is not None,
        )
        y_BTD = self.write(o_BTHV, x_BTD)
        return y_BTD, None if state is None else LinearState(memory_BHKV.to(state.memory_BHKV.dtype))


class LinearAttentionConfig(TokenMixerConfig):
    """Heads of width `head_width`, or one as wide as the model where that is narrower."""

    kind: ClassVar[str] = "linear_attention"

    head_width: Positive = 256
    feature_map: Literal["elu", "relu", "identity"] = "elu"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5

    def shape(self, d_model: int) -> HeadShape:
        return HeadShape.of(max(1, d_model // self.head_width), d_model, d_model)

    def build(self, d_model: int) -> LinearAttention:
        return LinearAttention(self, d_model)

    def num_params(self, d_model: int) -> int:
        return 4 * d_model**2 + self.shape(d_model).value_width

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 8 * d_model**2 + 4 * self.shape(d_model).numel

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return batch * self.shape(d_model).numel * dtype.itemsize


class LinearAttention(LinearMixer):
    """See the module's docstring and `LinearAttentionConfig`."""

    def __init__(self, config: LinearAttentionConfig, d_model: int):
        super().__init__()
        self.config, self.shape = config, config.shape(d_model)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.norm = Norm(self.shape.value_width, eps=config.norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def init_weights(self, init: Initializer) -> None:
        init.linear(self.qkv_proj)
        init.linear(self.out_proj, writes_residual=True)
        self.norm.reset_parameters()

    def read(self, x_BTD: Tensor) -> Recurrence:
        q, k, v = self.qkv_proj(x_BTD).unflatten(-1, (3, self.shape.heads, -1)).unbind(-3)
        if self.config.feature_map == "elu":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        elif self.config.feature_map == "relu":
            q, k = F.relu(q), F.relu(k)
        return Recurrence(q, k, v)

    def write(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        return self.out_proj(self.norm(o_BTHV).flatten(-2))


def with_feed_forward(
    size: Size, mixer: TokenMixerConfig, feed_forward: FeedForwardConfig | None = None, *, exact: bool = False
) -> LanguageModelConfig:
    """Layers of `mixer` and a feed-forward: by default Transformer++'s SwiGLU, narrower by whatever the mixer has over
    the 4d^2 of attention, in whole d^2 or, with `exact`, to the width's multiple of 8."""
    d = size.d_model
    if feed_forward is None:
        width = 1536 if size.name == "wikitext103" else 8 * d / 3
        more = mixer.num_params(d) / d**2 - 4
        feed_forward = FeedForwardConfig(width=align8(width - (more if exact else math.floor(more)) * d / 3))
    return LanguageModelConfig(
        vocab_size=size.vocab_size,
        d_model=d,
        pattern=(BlockConfig(hops=((mixer,), (feed_forward,))),),
        repeats=size.num_layers,
    )


@MODELS.register("linear_attention")
def linear_attention(size: Size) -> LanguageModelConfig:
    """A state of 256 x d, 4d^2 parameters a mixer."""
    return with_feed_forward(size, LinearAttentionConfig())
