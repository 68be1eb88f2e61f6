"""Checkpoints of flash-linear-attention 0.6: what a `config.json` describes and where each tensor goes.

The mixers are in `fla_mixers.py`. Whatever a config can say is either expressed exactly here, if need be by weights
(heads that share a key are repeated, a bias or a convolution that is not there is made of zeros and ones), or refused
by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.convert.fla_mixers import MIXERS, Reader, attention_of, feed_forward_of, read_attention
from rodimus_lab.convert.settings import Settings
from rodimus_lab.convert.tensors import Source
from rodimus_lab.errors import UserError
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.model import LanguageModelConfig

Tensors = dict[str, Tensor]

# Whose parts have other names.
MAMBAS = ("mamba", "mamba2")


@dataclass(frozen=True)
class Sub:
    """One sublayer: its config as a dict with its kind, its norm's name, and what reads its tensors."""

    config: dict[str, Any]
    norm: str
    read: Reader
    prefix: str


def families() -> tuple[str, ...]:
    """The values of `model_type` that can be read."""
    return tuple(sorted({*MIXERS, "transformer"} - {"rwkv6_channel"}))


def read(source: Source, settings: Settings) -> tuple[LanguageModelConfig, Tensors]:
    """The model in a directory and its tensors, named as a `LanguageModel`'s.

    Raises `UserError` naming what this zoo cannot express, what is missing and what does not fit.
    """
    family = settings.get("model_type")
    if family not in families():
        raise UserError(f"model_type {family!r} in {settings.where} is none of {', '.join(families())}")
    settings.only("attnres_block_size", None)
    d, layers = settings.count("hidden_size", 2048), settings.count("num_hidden_layers", 48 if family in MAMBAS else 24)
    eps = settings.number("norm_eps", 1e-5 if family in (*MAMBAS, "rodimus", "rwkv6") else 1e-6)
    norm = "layer" if family == "rwkv6" else "rms"
    stack = [_layer(settings, family, d, layer) for layer in range(layers)]
    blocks = [
        BlockConfig.from_dict({"hops": [[sub.config for sub in hop] for hop in hops], "norm": norm, "norm_eps": eps})
        for hops in stack
    ]
    same = all(block == blocks[0] for block in blocks)
    tied = settings.flag("tie_word_embeddings", family == "rodimus")
    normed = family == "rwkv6" and settings.flag("norm_first", True)
    config = LanguageModelConfig(
        vocab_size=settings.count("vocab_size", 126464 if family == "rodimus" else 32000),
        d_model=d,
        pattern=tuple(blocks[:1] if same else blocks),
        repeats=layers if same else 1,
        tie_embeddings=tied and not normed,
    )
    root = "backbone." if family in MAMBAS else "model."
    final = "norm_f" if family in MAMBAS else "norm"
    embedding = source.take(f"{root}embeddings.weight", (config.vocab_size, d))
    head = embedding
    if not tied or "lm_head.weight" in source:
        head = source.take("lm_head.weight", embedding.shape)
        if tied and not torch.equal(head, embedding):
            raise UserError("'lm_head.weight' is not the embedding, though the config says that they are tied")
    tensors = {"embedding.weight": embedding}
    if not config.tie_embeddings:
        tensors["head.weight"] = head
    tensors |= _norm(source, f"{root}{final}", "final_norm", d, norm)
    if normed:  # A norm of the embedding alone, which is therefore a table of normed rows.
        first = _norm(source, f"{root}layers.0.pre_norm", "norm", d, norm)
        weight, bias = (first[f"norm.{part}"].float() for part in ("weight", "bias"))
        tensors["embedding.weight"] = F.layer_norm(embedding.float(), (d,), weight, bias, eps).to(embedding.dtype)
    for layer, hops in enumerate(stack):
        for index, sub in enumerate(sub for hop in hops for sub in hop):
            place = f"{root}layers.{layer}."
            tensors |= _norm(source, f"{place}{sub.norm}", f"blocks.{layer}.norms.{index}", d, norm)
            found = sub.read(source, f"{place}{sub.prefix}.")
            tensors |= {f"blocks.{layer}.mixers.{index}.{name}": tensor for name, tensor in found.items()}
    if family == "hgrn2" and settings.flag("use_lower_bound", True):
        tensors["shared.HGRN2.weight"] = source.take(f"{root}lower_bounds", (layers, d))
    source.finish(r"\.rotary\.inv_freq$")
    return config, tensors


def _norm(source: Source, theirs: str, ours: str, d: int, kind: str) -> Tensors:
    tensors = {f"{ours}.weight": source.take(f"{theirs}.weight", (d,))}
    if kind == "layer":
        weight = tensors[f"{ours}.weight"]
        bias = f"{theirs}.bias"
        tensors[f"{ours}.bias"] = source.take(bias, (d,)) if bias in source else torch.zeros_like(weight)
    return tensors


def _layer(settings: Settings, family: str, d: int, layer: int) -> list[list[Sub]]:
    """The sublayers of a layer, hop by hop."""
    ordinary = _attention_settings(settings, layer)
    if family == "transformer":
        ordinary = settings
    if family in MAMBAS:
        config, reader = MIXERS[family](settings, d)
        return [[Sub(config, "norm", reader, "mixer")]]
    if family == "rwkv6" and ordinary is None:
        config, reader = MIXERS["rwkv6"](settings, d)
        channel, channel_reader = MIXERS["rwkv6_channel"](settings, d)
        return [[Sub(config, "attn_norm", reader, "attn")], [Sub(channel, "ffn_norm", channel_reader, "ffn")]]
    if family == "rodimus" and ordinary is None:
        config, reader = MIXERS["rodimus"](settings, d)
        first = [Sub(config, "mixer_norm", reader, "mixer")]
        if settings.get("block_type", "rodimus_plus") == "rodimus":
            return [first]
        shared = settings.part("ska_attn")
        config = attention_of(shared, d, shared_key=True)
        feed_forward, feed_reader = feed_forward_of(settings, d, family)
        attention = Sub(config, "ska_attn_norm", read_attention(config, d), "ska_attn")
        return [first, [attention, Sub(feed_forward, "mlp_norm", feed_reader, "mlp")]]
    if family == "rwkv6":
        raise UserError(f"attn in {settings.where} puts attention into RWKV-6 layers; it is not converted")
    feed_forward, feed_reader = feed_forward_of(settings, d, family)
    if ordinary is None:
        config, reader = MIXERS[family](settings, d)
    else:
        if family == "hgrn2" and settings.flag("use_lower_bound", True):
            raise UserError(
                f"attn in {settings.where} with lower bounds is beyond this zoo's HGRN2; it is not converted"
            )
        config = attention_of(ordinary, d)
        reader = read_attention(config, d)
    return [[Sub(config, "attn_norm", reader, "attn")], [Sub(feed_forward, "mlp_norm", feed_reader, "mlp")]]


def _attention_settings(settings: Settings, layer: int) -> Settings | None:
    """What `attn` says of a layer that has attention in place of the mixer."""
    parts = settings.get("attn", None) or []
    for part in parts if isinstance(parts, list) else [parts]:
        if not isinstance(part, dict) or not isinstance(part.get("layers"), list):
            raise UserError(f"attn in {settings.where} does not name its layers")
        if layer in part["layers"]:
            return Settings(part, f"attn of {settings.where}")
    return None
