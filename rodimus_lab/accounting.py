"""What a model costs: FLOPs of training and decoding, and the memory that decoding needs beside the weights.

Two rules. `paper_accounting` is the one that the numbers printed in Tables 7, 14, 19 and 20 and Figure 4 imply; it
counts some things twice and leaves others out, as its docstring says. `true_accounting` counts what our models do, and
reads memory off real states. Both take a model's config and draw no weights; a multiply-add is 2 FLOPs.

Shapes: d model width, V vocabulary, T tokens, L blocks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.mixer import TokenMixerConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.rodimus import RodimusConfig
from rodimus_lab.nn.zoo import Size

HALF = torch.bfloat16
ONE_HEAD = 64  # columns of the state that Table 20 counts, whatever the inner width


class NoPaperRule(UserError):
    """The paper counts no such sublayer."""


@dataclass(frozen=True)
class Mamba2:
    """Mamba2's shape, for counting only: in Tables 19 and 20 it is mamba-ssm's model that is timed.

    `num_layers` blocks; `heads` heads of `head_width` make the inner width; all heads share B and C (one group).
    """

    num_layers: int
    d_model: int
    vocab_size: int
    heads: int
    head_width: int = 64
    state: int = 128
    conv_width: int = 4

    @classmethod
    def of(cls, size: Size) -> Mamba2:
        """Two blocks for a layer of the size, of twice its width."""
        return cls(2 * size.num_layers, size.d_model, size.vocab_size, heads=2 * size.d_model // cls.head_width)

    @property
    def inner_width(self) -> int:
        return self.heads * self.head_width

    @property
    def matrix_weights(self) -> int:
        """Weights of the projections of all blocks: in (z, x, B, C, dt) and out."""
        widths = 3 * self.inner_width + 2 * self.state + self.heads
        return self.num_layers * self.d_model * widths

    def num_params(self) -> int:
        """Learnable scalars, the embedding tied."""
        conv = (self.inner_width + 2 * self.state) * (self.conv_width + 1)
        block = conv + 3 * self.heads + self.inner_width + self.d_model
        return self.vocab_size * self.d_model + self.matrix_weights + self.num_layers * block + self.d_model

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one decoding step by the rule of our own models (`TokenMixerConfig.flops_per_token`)."""
        conv = 2 * (self.inner_width + 2 * self.state) * self.conv_width
        update = 4 * self.state * self.inner_width
        return 2 * (self.vocab_size * self.d_model + self.matrix_weights) + self.num_layers * (conv + update)

    def training_flops_per_token(self, seq_len: int) -> float:
        """Forward and backward FLOPs a token: nothing in it grows with the context."""
        return 3.0 * self.flops_per_token(seq_len)

    def memory(self, batch: int, dtype: torch.dtype = HALF) -> Memory:
        """Bytes of what mamba-ssm keeps for a batch: S, and the last `conv_width` inputs of the convolution."""
        rows = self.num_layers * batch * dtype.itemsize
        conv = (self.inner_width + 2 * self.state) * self.conv_width
        return Memory(rows * self.inner_width * self.state, rows * conv)


Architecture = LanguageModelConfig | Mamba2


@dataclass(frozen=True)
class Memory:
    """Bytes: `remembered` in recurrent states, keys and values; in the windows of short convolutions; in counters."""

    remembered: int
    convolution: int = 0
    counters: int = 0

    @property
    def whole(self) -> int:
        return self.remembered + self.convolution + self.counters


@dataclass(frozen=True)
class Cost:
    """At a context of T tokens: FLOPs of training on one sequence, FLOPs of decoding one token after T - 1 others, and
    the bytes remembered of one sequence in bfloat16."""

    training_flops: float
    decode_flops: int
    memory: Memory


def true_accounting(model: Architecture, context: int) -> Cost:
    """Forward and backward of causal attention, convolutions, state updates and the head, all counted once; the
    embedding is a look-up. Mamba2's memory alone is computed and not read, for it is mamba-ssm's."""
    memory = model.memory(1) if isinstance(model, Mamba2) else real_memory(model, 1, context)
    return Cost(model.training_flops_per_token(context) * context, model.flops_per_token(context), memory)


def paper_accounting(
    model: Architecture, context: int, *, one_head: bool = False, embeddings: int = 2, value_gate: bool = False
) -> Cost:
    """The paper's rule, as its printed numbers imply it: with N matrix weights and a reach of W keys,

        training on a sequence    6 (N + 2Vd) T + 12 L d T W
        decoding a token          2 (N + 2Vd) + 4 L d W

    The embedding counts as a product beside the head (`embeddings=2`), attention is full and not causal, the value
    gate's projections are not in N (`value_gate=False`), and neither state updates nor convolutions count. Memory is
    that of states, keys and values; with `one_head`, as in Table 20, only 64 columns of each recurrent state count,
    which leaves out the number of heads.

    Raises `NoPaperRule` naming a sublayer that none of those tables has.
    """
    if isinstance(model, Mamba2):
        weights, attended = model.matrix_weights, 0
        columns = model.head_width if one_head else model.inner_width
        remembered = model.num_layers * model.state * columns * HALF.itemsize
    else:
        d, sublayers = model.d_model, [sublayer for block in model.blocks for sublayer in block.sublayers]
        weights = sum(_matrix_weights(sublayer, d, value_gate) for sublayer in sublayers)
        attended = sum(_query_width(sublayer, d) * _reach(sublayer, context) for sublayer in sublayers)
        remembered = sum(_remembered(sublayer, d, context, one_head) for sublayer in sublayers)
    products = weights + embeddings * model.vocab_size * model.d_model
    return Cost(6.0 * products * context + 12.0 * context * attended, 2 * products + 4 * attended, Memory(remembered))


def _matrix_weights(sublayer: TokenMixerConfig, d_model: int, value_gate: bool) -> int:
    match sublayer:
        case RodimusConfig():
            m = sublayer.inner_width(d_model)
            low_rank = 2 * m * sublayer.rank_of(sublayer.beta_hat, d_model) if value_gate and sublayer.beta_hat else 0
            return 3 * d_model * m + m * (2 * sublayer.n + sublayer.num_gate_rows) + low_rank
        case AttentionConfig() | FeedForwardConfig():
            return sublayer.replace(bias=False).num_params(d_model)
    raise NoPaperRule(f"the paper gives no rule for the cost of {sublayer.kind!r}; take the true accounting")


def _query_width(sublayer: TokenMixerConfig, d_model: int) -> int:
    if isinstance(sublayer, AttentionConfig):
        return sublayer.heads.num_heads * sublayer.width_of_head(d_model)
    return 0


def _reach(sublayer: TokenMixerConfig, context: int) -> int:
    window = sublayer.keys_in_window if isinstance(sublayer, AttentionConfig) else None
    return context if window is None else min(window, context)


def _remembered(sublayer: TokenMixerConfig, d_model: int, context: int, one_head: bool) -> int:
    if isinstance(sublayer, RodimusConfig):
        return sublayer.n * (ONE_HEAD if one_head else sublayer.inner_width(d_model)) * HALF.itemsize
    if isinstance(sublayer, AttentionConfig):
        heads = sublayer.heads.num_key_heads + sublayer.heads.num_value_heads
        return heads * sublayer.width_of_head(d_model) * _reach(sublayer, context) * HALF.itemsize
    return 0


def real_memory(model: LanguageModelConfig, batch: int, context: int, dtype: torch.dtype = HALF) -> Memory:
    """Bytes of the tensors of a real state (on the meta device, so that they take none here)."""
    with torch.device("meta"):
        state = model.build().init_state(batch, context=context, dtype=dtype)
    return Memory(**_by_kind(state))


def _by_kind(state: Any, field: str = "") -> Counter[str]:
    """Bytes of a nested state's tensors by the fields of `Memory`."""
    if isinstance(state, Tensor):
        kind = "convolution" if field.startswith("conv") else "remembered"
        return Counter({kind if state.is_floating_point() else "counters": state.numel() * state.element_size()})
    fields = getattr(state, "_fields", [""] * len(state))
    return sum((_by_kind(part, name) for part, name in zip(state, fields, strict=True)), Counter())
