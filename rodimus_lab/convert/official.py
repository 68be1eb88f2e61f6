"""The authors' checkpoints: Rodimus and Rodimus+ (`RodimusForCausalLM`), base and chat.

What differs from this project's modules, beside names: the attention window is halved inside, and query head h reads
key head h mod num_heads_k where here it reads h // (num_heads / num_heads_k), so heads change places. A scaled or
normalised embedding is worked into the table, which is then no longer tied to the head.

Shapes in comments: V vocabulary, d model width, m inner width, n state expansion, r rank of the value gate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.config import Config
from rodimus_lab.convert.settings import Settings, times
from rodimus_lab.convert.tensors import Source, dtype_name
from rodimus_lab.errors import UserError
from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.model import InitConfig, LanguageModelConfig
from rodimus_lab.nn.rodimus import RodimusConfig, ValueGate
from rodimus_lab.nn.zoo import align8

Tensors = dict[str, Tensor]

# The model registers its decoding buffers, so a checkpoint saved after generating may hold them.
BUFFERS = r"\.(key_cache|value_cache|conv_state|ssm_state)_\d+$|\.rotary_emb\.(inv_freq|scale)$"
EPS = 1e-12


def read_config(settings: Settings) -> LanguageModelConfig:
    """The model that an official `config.json` describes. Raises `UserError` naming what is beyond this zoo."""
    d, eps = settings.count("d_model", 2048), settings.number("norm_epsilon", 1e-5)
    kind = settings.get("block_type", "rodimus")
    if kind not in ("rodimus", "rodimus_plus"):
        settings.refuse("block_type")
    hops: tuple[tuple[Any, ...], ...] = ((_mixer(settings.part("mixer_cfg"), d, eps),),)
    if kind == "rodimus_plus":
        attention = settings.part("attn_cfg")
        width = align8(d * attention.number("ffn_expand_ratio", 4 / 3))
        hops = (*hops, (_attention(attention, d), FeedForwardConfig(width=width)))
    embedded = settings.flag("use_scale_embedding", False) or settings.flag("use_norm_embedding", False)
    return LanguageModelConfig(
        vocab_size=settings.count("vocab_size", 50277),
        d_model=d,
        pattern=(BlockConfig(hops=hops, norm_eps=eps),),
        repeats=settings.count("n_layer", 24),
        tie_embeddings=settings.flag("tie_word_embeddings", False) and not embedded,
        init=InitConfig(rescale_residual=True),
    )


def _mixer(settings: Settings, d: int, eps: float) -> RodimusConfig:
    settings.only("normalize_epsilon", None, EPS)
    rank = settings.get("input_gate_low_rank", "auto")
    if isinstance(rank, str) and rank.isdecimal():
        rank = int(rank)
    if rank != "auto" and (not isinstance(rank, int) or rank < 1):
        settings.refuse("input_gate_low_rank")
    return RodimusConfig(
        n=settings.count("mem_size", 64),
        expand=times(d, align8(int(d * settings.number("expand_ratio", 2)))),
        conv_width=settings.count("d_conv", 4),
        beta_hat=ValueGate(rank=rank),
        norm_eps=eps,
    )


def _attention(settings: Settings, d: int) -> AttentionConfig:
    settings.only("softmax_scale", None)
    settings.only("rotary_emb_scale_base", None)
    heads = settings.get("num_heads", None) or max(1, d // 128)
    if d % heads:
        raise UserError(f"num_heads={heads} in {settings.where} does not divide d_model={d}")
    settings.only("rotary_emb_dim", -1, 0, d // heads)
    sharing = HeadSharing(
        num_heads=heads, num_key_heads=settings.count("num_heads_k"), num_value_heads=settings.count("num_heads_v")
    )
    head_order(sharing)
    window = settings.get("window_size", None)
    return AttentionConfig(
        heads=sharing,
        window=window if window and window > 0 else None,
        window_convention="official",
        rotary_base=None if settings.get("rotary_emb_dim", -1) == 0 else settings.number("rotary_emb_base", 10000.0),
    )


def read_tensors(source: Source, settings: Settings, config: LanguageModelConfig) -> Tensors:
    """The tensors of a `LanguageModel` of that config. Raises `UserError` naming what is missing or does not fit."""
    d, block = config.d_model, config.pattern[0]
    tensors: Tensors = {}
    embedding = source.take("model.embeddings.weight", (config.vocab_size, d))
    tied = settings.flag("tie_word_embeddings", False)
    head = embedding
    if not tied or "lm_head.weight" in source:
        head = source.take("lm_head.weight", embedding.shape)
        if tied and not torch.equal(head, embedding):
            raise UserError("'lm_head.weight' is not the embedding, though the config says that they are tied")
    if not config.tie_embeddings:
        tensors["head.weight"] = head
    tensors["embedding.weight"] = _embedding(source, settings, embedding, block.norm_eps)
    tensors["final_norm.weight"] = source.take("model.norm_f.weight", (d,))
    for layer in range(config.repeats):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        for index, (name, sublayer) in enumerate(zip(("mixer", "attn", "ffn"), block.sublayers, strict=False)):
            tensors[f"{ours}norms.{index}.weight"] = source.take(f"{theirs}{name}_norm.weight", (d,))
            prefix = f"{theirs}{name}."
            read: Tensors
            if isinstance(sublayer, RodimusConfig):
                read = _read_mixer(source, prefix, sublayer, d)
            elif isinstance(sublayer, AttentionConfig):
                interleaved = settings.part("attn_cfg").flag("rotary_emb_interleaved", False)
                read = _read_attention(source, prefix, sublayer, d, interleaved)
            else:
                width = sublayer.width  # type: ignore[attr-defined]
                read = {
                    "in_proj.weight": source.take(f"{prefix}fc.weight", (2 * width, d)),
                    "out_proj.weight": source.take(f"{prefix}out_proj.weight", (d, width)),
                }
            tensors |= {f"{ours}mixers.{index}.{key}": tensor for key, tensor in read.items()}
    source.finish(BUFFERS)
    return tensors


def _embedding(source: Source, settings: Settings, weight: Tensor, eps: float) -> Tensor:
    wide = weight
    if settings.flag("use_scale_embedding", False):
        wide = wide.float() * math.sqrt(settings.part("mixer_cfg").count("mem_size", 64))
    if settings.flag("use_norm_embedding", False):
        norm = source.take("model.embed_norm.weight", (weight.shape[1],))
        wide = F.rms_norm(wide.float(), weight.shape[1:], norm.float(), eps)
    return wide.to(weight.dtype)


def _read_mixer(source: Source, prefix: str, config: RodimusConfig, d: int) -> Tensors:
    m, n, inner = config.inner_width(d), config.n, f"{prefix}inner_mixer."
    assert config.beta_hat is not None
    rank = config.rank_of(config.beta_hat, d)
    return {
        "fc.weight": source.take(f"{prefix}fc.weight", (2 * m, d)),
        "norm.weight": source.take(f"{prefix}act_norm.weight", (m,)),
        "out_proj.weight": source.take(f"{prefix}out_proj.weight", (d, m)),
        "feedthrough": source.take(f"{inner}residual_weight", (m,)),
        "conv_weight": source.take(f"{inner}short_conv.conv1d.weight", (m, 1, config.conv_width)).squeeze(1),
        "conv_bias": source.take(f"{inner}short_conv.conv1d.bias", (m,)),
        "state_proj.weight": torch.cat(
            [
                source.take(f"{inner}in_proj.weight", (2 * n, m)),
                source.take(f"{inner}mem_gate_proj.weight", (2 * n, m)),
            ]
        ),
        "gate_bias": source.take(f"{inner}mem_gate_proj.bias", (2 * n,)),
        "value_gate.down.weight": source.take(f"{inner}ch_gate_proj.0.weight", (rank, m)),
        "value_gate.up.weight": source.take(f"{inner}ch_gate_proj.1.weight", (m, rank)),
        "value_gate.up.bias": source.take(f"{inner}ch_gate_proj.1.bias", (m,)),
    }


def _read_attention(source: Source, prefix: str, config: AttentionConfig, d: int, interleaved: bool) -> Tensors:
    width, heads = config.width_of_head(d), config.heads
    queries, values = head_order(heads)
    q, k, v = (
        source.take(f"{prefix}{name}_proj.weight", (count * width, d)).unflatten(0, (count, width))
        for name, count in (("q", heads.num_heads), ("k", heads.num_key_heads), ("v", heads.num_value_heads))
    )
    if interleaved:  # Pairs (2i, 2i + 1) become pairs (i, i + width / 2).
        pairs = torch.arange(width).view(-1, 2).T.flatten()
        q, k = q[:, pairs], k[:, pairs]
    out = source.take(f"{prefix}out_proj.weight", (d, d)).unflatten(1, (heads.num_heads, width))
    return {
        "qkv_proj.weight": torch.cat([x.flatten(0, 1) for x in (q[queries], k, v[values])]),
        "out_proj.weight": out[:, queries].flatten(1),
    }


def head_order(heads: HeadSharing) -> tuple[list[int], list[int]]:
    """Which of their query heads, and of their value heads, stands at each place here; key heads stay.

    Raises `UserError` for key heads whose number does not divide that of the value heads.
    """
    h, g, j = heads.num_heads, heads.num_key_heads, heads.num_value_heads
    if j % g:
        raise UserError(f"num_heads_k={g} does not divide num_heads_v={j}; such heads are not converted")
    values = [place % (j // g) * g + place // (j // g) for place in range(j)]
    return [place % (h // j) * j + values[place // (h // j)] for place in range(h)], values


def to_official(config: LanguageModelConfig, tensors: Tensors, facts: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """An official `config.json` and its tensors, which compute the same.

    `facts` are the ids of special tokens. Raises `UserError` naming what that layout cannot hold.
    """
    if len(config.pattern) != 1:
        raise UserError("the official layout has layers of one form only; this model has several")
    block, d = config.pattern[0], config.d_model
    kinds = tuple(tuple(type(sublayer) for sublayer in hop) for hop in block.hops)
    plus = kinds == ((RodimusConfig,), (AttentionConfig, FeedForwardConfig))
    if not plus and kinds != ((RodimusConfig,),):
        named = " | ".join(", ".join(sublayer.kind for sublayer in hop) for hop in block.hops)
        raise UserError(f"the official layout holds Rodimus and Rodimus+, not blocks of {named}")
    mixer: RodimusConfig = block.sublayers[0]  # type: ignore[assignment]
    _need_default(config, head_bias=False, max_positions=0)
    _need_default(block, norm="rms")
    _need_default(mixer, beta=None, key_norm=True, feedthrough=True, norm_eps=block.norm_eps)
    if not mixer.learns_tau or mixer.beta_hat is None or mixer.conv_width < 1 or mixer.g is None:
        raise UserError("the official layout has every gate and the convolution; this Rodimus lacks one")
    values: dict[str, Any] = {
        "architectures": ["RodimusForCausalLM"],
        "model_type": "rodimus",
        "block_type": "rodimus_plus" if plus else "rodimus",
        "d_model": d,
        "n_layer": config.repeats,
        "vocab_size": config.vocab_size,
        "norm_epsilon": block.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "residual_in_fp32": True,
        "use_scale_embedding": False,
        "use_norm_embedding": False,
        "max_position_embeddings": 2048,
        "mixer_cfg": {
            "mem_size": mixer.n,
            "expand_ratio": times(d, mixer.inner_width(d)),
            "d_conv": mixer.conv_width,
            "input_gate_low_rank": mixer.rank_of(mixer.beta_hat, d),
        },
        "attn_cfg": {},
        "torch_dtype": dtype_name(tensors),
        **facts,
    }
    if plus:
        _, attention, feed_forward = block.sublayers
        values["attn_cfg"] = _attention_values(attention, feed_forward, d)  # type: ignore[arg-type]
    return values, _their_tensors(config, tensors)


def _need_default(config: Config, **values: Any) -> None:
    for key, value in values.items():
        if getattr(config, key) != value:
            raise UserError(f"the official layout has no {key}={getattr(config, key)!r}; it holds {value!r} only")


def _attention_values(attention: AttentionConfig, feed_forward: FeedForwardConfig, d: int) -> dict[str, Any]:
    _need_default(attention, bias=False)
    _need_default(feed_forward, activation="swiglu", bias=False)
    heads = attention.heads
    if attention.width_of_head(d) * heads.num_heads != d:
        raise UserError(f"the official layout's heads fill d_model={d}; these are {attention.width_of_head(d)} wide")
    if feed_forward.width % 8:
        raise UserError(f"the official layout's feed-forward is a multiple of 8 wide, not {feed_forward.width}")
    keys = attention.keys_in_window
    if keys == 1:
        raise UserError("the official layout has no window of one key")
    head_order(heads)
    return {
        "num_heads": heads.num_heads,
        "num_heads_k": heads.num_key_heads,
        "num_heads_v": heads.num_value_heads,
        "window_size": None if keys is None else 2 * (keys - 1),
        "ffn_expand_ratio": times(d, feed_forward.width),
        "rotary_emb_dim": 0 if attention.rotary_base is None else -1,
        "rotary_emb_base": attention.rotary_base or 10000.0,
    }


def _their_tensors(config: LanguageModelConfig, tensors: Tensors) -> Tensors:
    d, sublayers = config.d_model, config.pattern[0].sublayers
    theirs = {
        "model.embeddings.weight": tensors["embedding.weight"],
        "model.norm_f.weight": tensors["final_norm.weight"],
    }
    if not config.tie_embeddings:
        theirs["lm_head.weight"] = tensors["head.weight"]
    for layer in range(config.repeats):
        prefix, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        own = {key.removeprefix(ours): tensor for key, tensor in tensors.items() if key.startswith(ours)}
        for index, name in enumerate(("mixer", "attn", "ffn")[: len(sublayers)]):
            theirs[f"{prefix}{name}_norm.weight"] = own[f"norms.{index}.weight"]
            theirs[f"{prefix}{name}.out_proj.weight"] = own[f"mixers.{index}.out_proj.weight"]
        inner = f"{prefix}mixer.inner_mixer."
        theirs[f"{prefix}mixer.fc.weight"] = own["mixers.0.fc.weight"]
        theirs[f"{prefix}mixer.act_norm.weight"] = own["mixers.0.norm.weight"]
        theirs[f"{inner}residual_weight"] = own["mixers.0.feedthrough"]
        theirs[f"{inner}short_conv.conv1d.weight"] = own["mixers.0.conv_weight"].unsqueeze(1)
        theirs[f"{inner}short_conv.conv1d.bias"] = own["mixers.0.conv_bias"]
        theirs[f"{inner}in_proj.weight"], theirs[f"{inner}mem_gate_proj.weight"] = own[
            "mixers.0.state_proj.weight"
        ].chunk(2)
        theirs[f"{inner}mem_gate_proj.bias"] = own["mixers.0.gate_bias"]
        theirs[f"{inner}ch_gate_proj.0.weight"] = own["mixers.0.value_gate.down.weight"]
        theirs[f"{inner}ch_gate_proj.1.weight"] = own["mixers.0.value_gate.up.weight"]
        theirs[f"{inner}ch_gate_proj.1.bias"] = own["mixers.0.value_gate.up.bias"]
        if len(sublayers) > 1:
            attention: AttentionConfig = sublayers[1]  # type: ignore[assignment]
            width = attention.width_of_head(d)
            queries, values = head_order(attention.heads)
            q, k, v = own["mixers.1.qkv_proj.weight"].split(attention._widths(d))
            theirs[f"{prefix}attn.q_proj.weight"] = _placed(q, queries, width)
            theirs[f"{prefix}attn.k_proj.weight"] = k
            theirs[f"{prefix}attn.v_proj.weight"] = _placed(v, values, width)
            out = theirs[f"{prefix}attn.out_proj.weight"]
            theirs[f"{prefix}attn.out_proj.weight"] = _placed(out.T, queries, width).T
            theirs[f"{prefix}ffn.fc.weight"] = own["mixers.2.in_proj.weight"]
    return theirs


def _placed(rows: Tensor, order: list[int], width: int) -> Tensor:
    """Heads put back where `order` found them."""
    heads = rows.unflatten(0, (-1, width))
    return heads[torch.tensor(order).argsort()].flatten(0, 1)
