"""Figures 2 and 3, drawings in the paper: here they are drawn of the configs that the code builds its models from.

Figure 2 is the blocks of Rodimus and Rodimus+ and the inside of the Rodimus sublayer, with their widths at Table 1's
size; Figure 3 which key and value head every query head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rodimus_lab.nn.heads import HeadKind, HeadSharing
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.rodimus import RodimusConfig
from rodimus_lab.nn.zoo import model_config
from rodimus_lab.records import Record
from rodimus_lab.report import FIGURES, Box, Diagram, Panels, PaperResults, Wire, diagrams_of

FLOW = (
    "S_t = (alpha^T 1) * S_(t-1) + (alpha_hat * k)^T v with alpha = exp(-g tau), alpha_hat = g^tau; o = q S / sqrt(n)"
)
HEADS, GROUPS = 4, 2
NAMES: dict[HeadKind, str] = {"mha": "MHA", "gqa": "GQA", "mqa": "MQA", "ska": "SKA"}


@FIGURES.register("figure02")
def figure_2(records: Sequence[Record], paper: PaperResults) -> Panels:
    """The blocks of both models, and what is inside the Rodimus sublayer."""
    configs = {name: model_config(name) for name in ("rodimus", "rodimus+")}
    parts = [_model(name, config) for name, config in configs.items()]
    config = configs["rodimus"]
    (sublayer,) = config.pattern[0].sublayers
    assert isinstance(sublayer, RodimusConfig)
    parts.append(inside(sublayer, config.d_model))
    head = "is the embedding again" if config.tie_embeddings else "has weights of its own"
    remark = (
        f"drawn from the configs in the code, of no run, at Table 1's size with d = {config.d_model}; before the blocks"
        f" is an embedding of {config.vocab_size:,} x {config.d_model}, after them a norm and the head, which {head};"
        f" in the sublayer {FLOW}"
    )
    return Panels("Figure 2. The blocks of Rodimus and Rodimus+", parts, columns=1, remark=remark)


def _model(name: str, config: LanguageModelConfig) -> Diagram:
    (drawn,) = diagrams_of(config, lambda sublayer: _widths(sublayer, config.d_model))
    return replace(drawn, title=f"{name}: {drawn.title}")


def _widths(sublayer: Any, d_model: int) -> str:
    if sublayer.kind == "rodimus":
        return f"n = {sublayer.n}, m = {sublayer.inner_width(d_model):,}"
    if sublayer.kind == "attention":
        heads = sublayer.heads
        return f"{heads.num_heads} heads, {heads.num_key_heads} of keys, window {sublayer.window}"
    return f"width {sublayer.width:,}"


def inside(config: RodimusConfig, d_model: int) -> Diagram:
    """What a Rodimus sublayer with every gate of the paper's model does, in the order of `nn/rodimus.py`."""
    n, m = config.n, config.inner_width(d_model)
    assert config.beta_hat is not None
    rank = config.rank_of(config.beta_hat, d_model)
    width, height, gap, middle = 124, 38, 20, 92
    names = (
        ("x, z", f"W_fc: {d_model} to 2 x {m:,}"),
        ("x'", f"conv {config.conv_width}, SiLU"),
        ("q, k, g, tau", f"{m:,} to 4 x {n}"),
        ("S", f"state {n} x {m:,}"),
        ("+ d x'", f"feedthrough, {m:,}"),
        ("o SiLU(z)", f"RMSNorm, {m:,}"),
        ("y", f"W_out: {m:,} to {d_model}"),
    )
    lefts = [24 + index * (width + gap) for index in range(len(names))]
    top = middle - height / 2
    boxes = [
        Box("sublayer", text, x, top, width, height, detail) for x, (text, detail) in zip(lefts, names, strict=True)
    ]
    below = middle + 56
    boxes.append(Box("sublayer", "v = x beta_hat", lefts[1], below - height / 2, width, height, f"rank {rank}"))
    centre = [x + width / 2 for x in lefts]
    above, bottom = top - 18, middle + height / 2
    wires = [Wire([(4, middle), (lefts[0], middle)])]
    wires += [Wire([(x - gap, middle), (x, middle)]) for x in lefts[1:]]
    wires += [
        Wire([(centre[0], bottom), (centre[0], below), (lefts[1], below)]),
        Wire([(lefts[1] + width, below), (centre[3], below), (centre[3], bottom)]),
        Wire([(centre[1], top), (centre[1], above), (centre[4], above), (centre[4], top)]),
        Wire([(centre[0], top), (centre[0], above - 16), (centre[5], above - 16), (centre[5], top)]),
        Wire([(lefts[-1] + width, middle), (lefts[-1] + width + gap, middle)]),
    ]
    told = "; ".join(f"{box.text}: {box.detail}" for box in boxes)
    return Diagram(
        "Inside the Rodimus sublayer", told, boxes, wires, lefts[-1] + width + gap + 8, below + height / 2 + 8
    )


@FIGURES.register("figure03")
def figure_3(records: Sequence[Record], paper: PaperResults) -> Panels:
    """Which key and value head every query head reads, for each kind of sharing."""
    parts = [sharing(NAMES[kind], HeadSharing.of(kind, HEADS, GROUPS)) for kind in NAMES]
    remark = (
        "drawn from the code's head sharing, of no run: a query head reads the key and the value head that its lines "
        "lead to; keys and values are what a cache holds"
    )
    return Panels("Figure 3. Head sharing: MHA, GQA, MQA and SKA", parts, remark=remark)


def sharing(name: str, heads: HeadSharing) -> Diagram:
    """Values above, queries in the middle and keys below."""
    side, pitch, left = 40, 64, 70
    rows = {"value": (30, heads.num_value_heads), "query": (120, heads.num_heads), "key": (210, heads.num_key_heads)}
    across = pitch * heads.num_heads
    middles = {
        sort: [left + across * (index + 0.5) / count for index in range(count)] for sort, (_, count) in rows.items()
    }
    boxes = [
        Box(sort, f"{sort[0]}{index + 1}", x - side / 2, rows[sort][0], side, side)
        for sort, places in middles.items()
        for index, x in enumerate(places)
    ]
    wires = []
    for index, x in enumerate(middles["query"]):
        key = middles["key"][index // (heads.num_heads // heads.num_key_heads)]
        value = middles["value"][index // (heads.num_heads // heads.num_value_heads)]
        wires.append(Wire([(x, 120 + side), (key, 210)], arrow=False))
        wires.append(Wire([(x, 120), (value, 30 + side)], arrow=False))
    keys, values = heads.num_key_heads, heads.num_value_heads
    told = f"{heads.num_heads} query, {keys} key, {values} value heads; {keys + values} cached"
    return Diagram(f"{name}: {told}", told, boxes, wires, left + across + 70, 264)
