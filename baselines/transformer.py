"""Transformers: GPT-3's, Transformer++ (Llama's form), its sliding-window variant, and Llama 3's grouped queries.

All are data over one attention module. Their counts at Table 1's configuration are discussed in `docs/parameters.md`.
"""

from __future__ import annotations

from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.mixer import TokenMixerConfig
from rodimus_lab.nn.model import InitConfig, LanguageModelConfig
from rodimus_lab.nn.zoo import MODELS, Size, align8


def _model(size: Size, *sublayers: TokenMixerConfig) -> LanguageModelConfig:
    return LanguageModelConfig(
        vocab_size=size.vocab_size,
        d_model=size.d_model,
        pattern=(BlockConfig(hops=tuple((sublayer,) for sublayer in sublayers)),),
        repeats=size.num_layers,
    )


def _swiglu(size: Size) -> FeedForwardConfig:
    # 8d/3 up to a multiple of 8; flash-linear-attention's multiple of 256 on WikiText-103, which Table 1 follows.
    width = 1536 if size.name == "wikitext103" else align8(8 * size.d_model / 3)
    return FeedForwardConfig(width=width)


@MODELS.register("transformer")
def transformer(size: Size) -> LanguageModelConfig:
    """GPT-3: learned absolute positions, LayerNorm, GELU, biases."""
    attention = AttentionConfig(heads=HeadSharing.of("mha", size.num_heads), rotary_base=None, bias=True)
    feed_forward = FeedForwardConfig(width=4 * size.d_model, activation="gelu", bias=True)
    config = _model(size, attention, feed_forward)
    block = config.pattern[0].replace(norm="layer")
    return config.replace(pattern=(block,), max_positions=size.context, init=InitConfig(rescale_residual=True))


@MODELS.register("transformer++", aliases=("transformer_pp",))
def transformer_pp(size: Size) -> LanguageModelConfig:
    """Rotary positions, RMSNorm, SwiGLU, no biases."""
    return _model(size, AttentionConfig(heads=HeadSharing.of("mha", size.num_heads)), _swiglu(size))


@MODELS.register("transformer++-swa", aliases=("transformer_pp-swa",))
def transformer_pp_swa(size: Size) -> LanguageModelConfig:
    """Transformer++ whose tokens see half the training context."""
    attention = AttentionConfig(heads=HeadSharing.of("mha", size.num_heads), window=size.context // 2)
    return _model(size, attention, _swiglu(size))


@MODELS.register("llama3")
def llama3(size: Size) -> LanguageModelConfig:
    """Transformer++ with a quarter as many key-value heads, the parameters so saved spent on the feed-forward.

    On WikiText-103 its width is the one that closes Table 1's count of 46.48 M.
    """
    groups = max(1, size.num_heads // 4)
    saved = 2 * (1 - groups / size.num_heads) * size.d_model / 3
    width = 1824 if size.name == "wikitext103" else align8(8 * size.d_model / 3 + saved)
    attention = AttentionConfig(heads=HeadSharing.of("gqa", size.num_heads, groups))
    return _model(size, attention, FeedForwardConfig(width=width))
