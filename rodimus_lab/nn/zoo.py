"""Model names and sizes: `build_model("rodimus", size="wikitext103")`.

A family of models is a function from a `Size` to a `LanguageModelConfig`, registered under its name in `MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rodimus_lab.config import did_you_mean
from rodimus_lab.errors import UserError
from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.mixer import TokenMixerConfig
from rodimus_lab.nn.model import InitConfig, LanguageModel, LanguageModelConfig
from rodimus_lab.nn.official_attention import OfficialAttentionConfig
from rodimus_lab.nn.rodimus import RodimusConfig, ValueGate
from rodimus_lab.registry import Registry, file_spelling, load_plugins


class Size(NamedTuple):
    """`num_layers` counts layers of attention and feed-forward, as GPT-3 does; a block that mixes tokens and channels
    at once is worth half of one, so such models have twice as many. `context` is the training length."""

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    vocab_size: int
    context: int


# Table 8 and D.1 of the paper; 460m and 1.6b are Table 2's (Table 8's shapes with the Rodimus tokenizer's vocabulary).
SIZES = {
    size.name: size
    for size in (
        Size("smoke", 2, 128, 2, 4096, 256),
        Size("mqar", 1, 64, 1, 8192, 128),
        Size("wikitext103", 6, 512, 8, 50265, 512),
        Size("125m", 12, 768, 12, 50277, 2048),
        Size("350m", 24, 1024, 16, 50277, 2048),
        Size("460m", 24, 1024, 16, 126340, 2048),
        Size("760m", 24, 1536, 16, 50277, 2048),
        Size("1.3b", 24, 2048, 32, 50277, 2048),
        Size("1.6b", 24, 2048, 32, 126340, 2048),
    )
}

Family = Callable[[Size], LanguageModelConfig]
MODELS: Registry[Family] = Registry("model")


def model_config(
    name: str, *, size: str | Size = "wikitext103", vocab_size: int | None = None, **overrides: Any
) -> LanguageModelConfig:
    """The config of the model `name` at a size.

    `overrides` set fields of the `LanguageModelConfig` (`dropout=0.1`) or, by their kind, of every sublayer of that
    kind: `rodimus={"n": 32}`, `attention={"window": 256}`. Raises `UserError` for an unknown name, size or field.
    """
    load_plugins()
    if isinstance(size, str):
        if size not in SIZES:
            raise UserError(f"there is no size named {size!r}{did_you_mean(size, SIZES)}")
        size = SIZES[size]
    config = MODELS[name](size)
    if vocab_size is not None:
        config = config.replace(vocab_size=vocab_size)
    fields = set(LanguageModelConfig.model_fields)
    kinds = {sublayer.kind for block in config.pattern for sublayer in block.sublayers}
    for key, value in overrides.items():
        if key in fields:
            config = config.replace(**{key: value})
        elif key in kinds:
            config = with_sublayers(config, key, value)
        else:
            raise UserError(f"the model {name!r} has no setting {key!r}{did_you_mean(key, fields | kinds)}")
    return config


def with_sublayers(config: LanguageModelConfig, kind: str, changes: dict[str, Any]) -> LanguageModelConfig:
    """`config` with some fields of every sublayer of a kind changed."""
    return config.replace(
        pattern=tuple(
            block.replace(
                hops=tuple(
                    tuple(sub.replace(**changes) if sub.kind == kind else sub for sub in hop) for hop in block.hops
                )
            )
            for block in config.pattern
        )
    )


def with_official_cache(config: LanguageModelConfig) -> LanguageModelConfig:
    """`config` decoding as the authors' published code does, defects and all; see `nn/official_attention.py`.

    Raises `UserError` where no sublayer has a window in the official convention.
    """
    blocks = tuple(
        block.replace(hops=tuple(tuple(_with_official_cache(sub) for sub in hop) for hop in block.hops))
        for block in config.pattern
    )
    if blocks == config.pattern:
        raise UserError("official_cache_compat is for the attention of the authors' checkpoints; there is none here")
    return config.replace(pattern=blocks)


def _with_official_cache(sublayer: TokenMixerConfig) -> TokenMixerConfig:
    if type(sublayer) is not AttentionConfig or sublayer.window is None or sublayer.window_convention != "official":
        return sublayer
    return OfficialAttentionConfig(**{name: getattr(sublayer, name) for name in AttentionConfig.model_fields})


def build_model(name: str, **options: Any) -> LanguageModel:
    """`model_config(name, ...)` built with freshly drawn weights."""
    return model_config(name, **options).build()


def slug(name: str) -> str:
    """A model's name as it stands in ids and file names."""
    load_plugins()
    return file_spelling(MODELS.canonical(name))


def hybrid(size: Size, group: tuple[BlockConfig, ...]) -> LanguageModelConfig:
    """A model whose blocks, one a layer, follow one another as in `group`.

    Where layers are left over the first group is short of its first blocks; the least model has two blocks.
    """
    groups, left_over = divmod(max(2, size.num_layers), len(group))
    return LanguageModelConfig(
        vocab_size=size.vocab_size,
        d_model=size.d_model,
        pattern=(group * (groups + 1))[len(group) - left_over :] if left_over else group,
        repeats=1 if left_over else groups,
        init=InitConfig(rescale_residual=True),
    )


def align8(width: float) -> int:
    """The integer part, rounded up to a multiple of 8."""
    return -(-int(width) // 8) * 8


def _expansion(size: Size, *, hybrid: bool) -> int:
    # 64 everywhere but for the pure recurrence on WikiText-103, whose count of 46.68 M says 32 (Table 1).
    return 32 if size.name in ("wikitext103", "smoke") and not hybrid else 64


def _rank(size: Size) -> ValueGate:
    # The 1.6 B of Table 2 closes with the rank that the authors' code picks at this width, 32.
    return ValueGate(rank="auto") if size.name in ("460m", "1.6b") else ValueGate(rank=16)


@MODELS.register("rodimus")
def rodimus(size: Size) -> LanguageModelConfig:
    """Twice as many blocks as a Transformer has layers, each its own channel mixer. A state of n x 2d, n = 64 or, at
    Table 1's and the smoke size, 32."""
    mixer = RodimusConfig(n=_expansion(size, hybrid=False), beta_hat=_rank(size))
    return LanguageModelConfig(
        vocab_size=size.vocab_size,
        d_model=size.d_model,
        pattern=(BlockConfig(hops=((mixer,),)),),
        repeats=2 * size.num_layers,
        init=InitConfig(rescale_residual=True),
    )


@MODELS.register("rodimus+", aliases=("rodimus_plus",))
def rodimus_plus(size: Size) -> LanguageModelConfig:
    """Rodimus, then windowed attention with shared keys and a feed-forward, joined by the two-hop residual (Eq. 13).

    Heads are 128 wide, the window is half the training context (D.5), the feed-forward 4d/3 wide.
    """
    head_width = min(128, size.d_model)
    attention = AttentionConfig(
        heads=HeadSharing.of("ska", size.d_model // head_width), head_width=head_width, window=size.context // 2
    )
    mixer = RodimusConfig(n=_expansion(size, hybrid=True), beta_hat=_rank(size))
    feed_forward = FeedForwardConfig(width=align8(4 * size.d_model / 3))
    return LanguageModelConfig(
        vocab_size=size.vocab_size,
        d_model=size.d_model,
        pattern=(BlockConfig(hops=((mixer,), (attention, feed_forward))),),
        repeats=size.num_layers,
        init=InitConfig(rescale_residual=True),
    )
