"""Samba: Mamba and local attention by turns, each before a SwiGLU feed-forward (Ren et al., 2024).

The attention has rotary positions and sees half the training context. There is nothing of its own in it: any other
hybrid of the zoo's sublayers is written as data in the same way.
"""

from __future__ import annotations

from baselines.mamba import MambaConfig
from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import MODELS, Size, align8, hybrid


@MODELS.register("samba")
def samba(size: Size) -> LanguageModelConfig:
    """A block of Mamba before each of attention; where the layers are odd, the first is of attention."""
    attention = AttentionConfig(heads=HeadSharing.of("mha", size.num_heads), window=size.context // 2)
    feed_forward = FeedForwardConfig(width=align8(8 * size.d_model / 3))
    group = tuple(BlockConfig(hops=((mixer,), (feed_forward,))) for mixer in (MambaConfig(), attention))
    return hybrid(size, group)
