"""Griffin: Hawk's recurrence and local attention, two to one, each before a gated feed-forward (De et al., 2024).

The attention has one key and value head and sees half the training context. As data it is hops like any other's.
"""

from __future__ import annotations

from baselines.hawk import GatedGELUConfig, hawk_mixer
from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import MODELS, Size, hybrid


@MODELS.register("griffin")
def griffin(size: Size) -> LanguageModelConfig:
    """Two recurrent blocks before each of attention; where layers are left over, the first group is short of them, and
    the least model has one block of each."""
    attention = AttentionConfig(heads=HeadSharing.of("mqa", size.num_heads), window=size.context // 2)
    recurrent, local = (BlockConfig(hops=((mixer,), (GatedGELUConfig(),))) for mixer in (hawk_mixer(size), attention))
    return hybrid(size, (recurrent, recurrent, local))
