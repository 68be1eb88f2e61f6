"""The language model: embedding, blocks, final norm, head. The only model class; an architecture is its config.

Shapes: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from rodimus_lab.config import Config
from rodimus_lab.errors import UserError
from rodimus_lab.nn.block import Block, BlockConfig
from rodimus_lab.nn.embedding import Embedding
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer
from rodimus_lab.nn.norm import Norm, is_plain
from rodimus_lab.ops.cross_entropy import cross_entropy
from rodimus_lab.ops.linear_step import linear_step
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sequence import first_position, refuse_state, sequence_shard

IGNORE = -100


class InitConfig(Config):
    """Weights are N(0, std^2) unless a mixer says otherwise; with `rescale_residual` every projection onto the residual
    stream is divided by the square root of the number of sublayers in the model."""

    std: Annotated[float, Field(gt=0)] = 0.02
    rescale_residual: bool = False


class LanguageModelConfig(Config):
    """`pattern` is the sequence of blocks that is repeated `repeats` times. `max_positions` > 0 adds learned absolute
    position embeddings for that many positions; tokens further on share the last one."""

    vocab_size: Annotated[int, Field(ge=2)]
    d_model: Annotated[int, Field(ge=1)]
    pattern: Annotated[tuple[BlockConfig, ...], Field(min_length=1)]
    repeats: Annotated[int, Field(ge=1)]
    tie_embeddings: bool = True
    head_bias: bool = False
    max_positions: Annotated[int, Field(ge=0)] = 0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    init: InitConfig = InitConfig()

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        return self.pattern * self.repeats

    def build(self) -> LanguageModel:
        return LanguageModel(self)

    def num_params(self) -> int:
        """Learnable scalars, a tied embedding counted once."""
        embeddings = self.d_model * (self.vocab_size * (1 if self.tie_embeddings else 2) + self.max_positions)
        final_norm = Norm.num_params(self.d_model, self.pattern[0].norm)
        head_bias = self.vocab_size * self.head_bias
        return embeddings + final_norm + head_bias + sum(block.num_params(self.d_model) for block in self.blocks)

    def flops_per_token(self, context: int) -> int:
        """Forward matrix-product FLOPs of one decoding step with `context` - 1 tokens before it; the head is counted,
        the embedding look-up is not."""
        pattern = sum(block.flops_per_token(self.d_model, context) for block in self.pattern)
        return 2 * self.d_model * self.vocab_size + self.repeats * pattern

    def training_flops_per_token(self, seq_len: int) -> float:
        """Forward and backward FLOPs a token at training length `seq_len`: three times the forward FLOPs, averaged over
        the positions (causal, not full, attention)."""
        return 3 * sum(self.flops_per_token(context) for context in range(1, seq_len + 1)) / seq_len

    def state_bytes(self, batch: int, context: int, dtype: torch.dtype) -> int:
        """Bytes of the real state after `context` tokens, the position counter included."""
        return 8 * batch + sum(block.state_bytes(self.d_model, batch, context, dtype) for block in self.blocks)


class ModelState(NamedTuple):
    """`length_B`: tokens seen of the current document; `blocks`: one state a block."""

    length_B: Tensor
    blocks: tuple[tuple[State, ...], ...]


class LanguageModel(nn.Module):
    """See `LanguageModelConfig`. Weights are drawn at construction from torch's global generator."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_positions, config.d_model) if config.max_positions else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(block, config.d_model, config.dropout) for block in config.blocks])
        self.final_norm = Norm(config.d_model, config.pattern[0].norm, config.pattern[0].norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size)) if config.head_bias else None
        self.shared = self._join()
        self.init_weights()

    def _join(self) -> nn.ModuleDict:
        """What mixers of different blocks have in common, which is the model's to hold.

        A mixer's class may have a function `join(mixers) -> nn.Module | None`. It is called with all of the model's
        mixers of that class, first block first, and may tell each its depth. A module that it returns is held here, and
        by none of the mixers that read it, so that its weights are saved once and sharded with no block.
        """
        classes: dict[type, list[TokenMixer]] = {}
        for block in self.blocks:
            for mixer in block.mixers:  # type: ignore[union-attr]
                classes.setdefault(type(mixer), []).append(mixer)
        joined = {cls.__name__: cls.join(mixers) for cls, mixers in classes.items() if hasattr(cls, "join")}
        return nn.ModuleDict({name: module for name, module in joined.items() if module is not None})

    def init_weights(self) -> None:
        init = self.config.init
        sublayers = sum(len(block.sublayers) for block in self.config.blocks)
        out_scale = 1 / math.sqrt(sublayers) if init.rescale_residual else 1.0
        nn.init.normal_(self.embedding.weight, std=init.std)
        for extra in (self.positions, self.head):
            if extra is not None:
                nn.init.normal_(extra.weight, std=init.std)
        if self.head_bias is not None:
            nn.init.zeros_(self.head_bias)
        self.final_norm.reset_parameters()
        for block in self.blocks:
            block.init_weights(Initializer(init.std, out_scale))  # type: ignore[operator]

    def check_splits_sequence(self) -> None:
        """Raise `UserError`, naming the sublayer, where this model does not run on sequences split over ranks."""
        for block in self.blocks:
            for mixer in block.mixers:  # type: ignore[union-attr]
                if not mixer.SPLITS_SEQUENCE:
                    raise UserError(
                        f"{type(mixer).__name__} does not run on sequences split over ranks; give each rank whole ones"
                    )

    @property
    def head_weight_VD(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """The state before the first token, on the model's own device unless told otherwise; see `TokenMixer`."""
        device = device or self.embedding.weight.device
        return ModelState(
            torch.zeros(batch, dtype=torch.long, device=device),
            tuple(
                block.init_state(batch, context=context, device=device, dtype=dtype)  # type: ignore[operator]
                for block in self.blocks
            ),
        )

    def hidden(
        self,
        ids_BT: Tensor,
        state: ModelState | None = None,
        segments: Segments | None = None,
        *,
        positions_BP: Tensor | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """Token ids to final normalised activations x_BTD, with `positions_BP` (int64) only those of these places,
        x_BPD; and the new state where one came in. Raises `UserError` for sequences without a token."""
        if ids_BT.shape[1] == 0:
            raise UserError("the model was given sequences without a token; give each at least one")
        if sequence_shard() is not None:
            refuse_state("a model", state, segments)
        x_BTD = self.embedding(ids_BT)
        start = first_position(ids_BT.shape[1])
        length_B = ids_BT.new_full((ids_BT.shape[0],), start) if state is None else state.length_B
        if self.positions is not None or state is not None:
            documents = segments or Segments(torch.zeros_like(ids_BT))
            positions_BT = documents.positions_BT(length_B)
            if self.positions is not None:
                x_BTD = x_BTD + self.positions(positions_BT.clamp(max=self.config.max_positions - 1))
            length_B = torch.where(documents.valid_BT[:, -1], positions_BT[:, -1] + 1, length_B)
        x_BTD = self.dropout(x_BTD)
        states = []
        for index, block in enumerate(self.blocks):
            x_BTD, block_state = block(x_BTD, None if state is None else state.blocks[index], segments)
            states.append(block_state)
        new_state = None if state is None else ModelState(length_B, tuple(states))
        if positions_BP is not None:
            x_BTD = x_BTD.gather(1, positions_BP.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))
        return self.final_norm(x_BTD), new_state

    def forward(
        self, ids_BT: Tensor, state: ModelState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, ModelState | None]:
        """Token ids to logits_BTV (float32), and the new state where one came in."""
        x_BTD, state = self.hidden(ids_BT, state, segments)
        return self.logits(x_BTD), state

    def logits_at(self, ids_BT: Tensor, positions_BP: Tensor) -> Tensor:
        """logits_BPV (float32) at these places (int64) only."""
        x_BPD, _ = self.hidden(ids_BT, positions_BP=positions_BP)
        return self.logits(x_BPD)

    @torch.no_grad()
    def step(self, ids_B: Tensor, state: ModelState) -> Tensor:
        """`forward` of one token a row, without dropout and without gradients: logits_BV in float32.

        The state is overwritten, so the call may be captured in a CUDA graph; it must have room for the token.
        """
        x_BD = self.embedding(ids_B)
        if self.positions is not None:
            x_BD = x_BD + self.positions(state.length_B.clamp(max=self.config.max_positions - 1))
        state.length_B.add_(1)
        for block, block_state in zip(self.blocks, state.blocks, strict=True):
            x_BD = block.step(x_BD, block_state)  # type: ignore[operator]
        norm = self.final_norm.rms
        if norm is None:
            x_BD = self.final_norm(x_BD)
        dtype = torch.promote_types(x_BD.dtype, torch.float32)
        return linear_step(x_BD, self.head_weight_VD, self.head_bias, norm=norm, dtype=dtype)

    def logits(self, x_BTD: Tensor) -> Tensor:
        if self.head is None or is_plain(self.head):
            logits = nn.functional.linear(x_BTD, self.head_weight_VD.to(x_BTD.dtype))
        else:
            logits = self.head(x_BTD)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.head_bias is None else logits + self.head_bias

    def loss(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        segments: Segments | None = None,
        *,
        positions_BP: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Cross entropy in nats of `targets_BT` (-100: not counted); the logits are never all in memory.

        `reduction="none"` gives loss_BT, 0 where not counted. With `positions_BP` only these places reach the final
        norm and the head, and the targets and the loss are theirs, BP instead of BT.
        """
        x_BTD, _ = self.hidden(ids_BT, segments=segments, positions_BP=positions_BP)
        return self.loss_of_hidden(x_BTD, targets_BT, reduction=reduction)

    def loss_of_hidden(
        self, x_BTD: Tensor, targets_BT: Tensor, *, reduction: Literal["mean", "sum", "none"] = "mean"
    ) -> Tensor:
        """`loss` from what `hidden` gave."""
        if not (self.head is None or is_plain(self.head)):
            logits_NV = self.logits(x_BTD).flatten(0, -2)
            losses = nn.functional.cross_entropy(
                logits_NV, targets_BT.flatten(), ignore_index=IGNORE, reduction=reduction
            )
            return losses.view_as(targets_BT) if reduction == "none" else losses
        return cross_entropy(
            x_BTD, self.head_weight_VD, targets_BT, bias_V=self.head_bias, ignore_index=IGNORE, reduction=reduction
        )
