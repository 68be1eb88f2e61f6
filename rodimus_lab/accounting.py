"""What a model costs at a context: FLOPs and bytes of memory, by the paper's rules and by the true ones."""

from __future__ import annotations

from dataclasses import dataclass

from rodimus_lab.nn.zoo import Size


@dataclass(frozen=True)
class Mamba2:
    """Mamba2's shape, for counting only: the model is not in the zoo, and where it is timed it is mamba-ssm's.

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
