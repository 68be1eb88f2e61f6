"""Every token mixer of flash-linear-attention that this zoo can express: its config, and a reader of its tensors.

Shapes in comments: d model width, H heads, K key width, V value width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rodimus_lab.convert.settings import Settings, times
from rodimus_lab.convert.tensors import Source
from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import align8

Tensors = dict[str, Tensor]
Reader = Callable[[Source, str], Tensors]
Family = Callable[[Settings, int], tuple[dict[str, Any], Reader]]

DEFAULT_FEED_RATIO = {"retnet": 2}
LOW_RANK, TEMPERATURE = 16, 16.0  # GLA's, which its config does not name.


def _whole(settings: Settings, key: str, default: float, d: int) -> int:
    """`key` times d, which must be a whole number."""
    width = settings.number(key, default) * d
    if abs(width - round(width)) > 1e-6 * width:
        raise UserError(f"{key}={settings.get(key, default)} in {settings.where} times {d} is no whole number")
    return round(width)


def _heads(settings: Settings, default: int, *widths: int) -> int:
    heads = settings.count("num_heads", default)
    if any(width % heads for width in widths):
        raise UserError(
            f"num_heads={heads} in {settings.where} does not divide widths of {', '.join(map(str, widths))}"
        )
    return heads


def _repeated(rows: Tensor, heads: int, groups: int) -> Tensor:
    """Rows of `heads` / `groups` heads, each `groups` times, as the heads that read it stand."""
    if groups == 1:
        return rows
    return rows.unflatten(0, (heads // groups, -1)).repeat_interleave(groups, 0).flatten(0, 1)


def feed_forward_of(settings: Settings, d: int, family: str) -> tuple[dict[str, Any], Reader]:
    """SwiGLU, 8d/3 wide up to a multiple of 256 unless told otherwise."""
    settings.only("hidden_act", "swish")
    if (width := settings.get("intermediate_size", None)) is not None:
        width = settings.count("intermediate_size")
    elif family == "rodimus":
        width = align8(d * (settings.get("hidden_ratio", None) or 4 / 3))
    else:
        ratio = settings.get("hidden_ratio", None) or DEFAULT_FEED_RATIO.get(family, 4)
        width = -(-int(d * ratio * 2 / 3) // 256) * 256

    def read(source: Source, prefix: str) -> Tensors:
        up, gate = (source.take(f"{prefix}{name}_proj.weight", (width, d)) for name in ("up", "gate"))
        return {
            "in_proj.weight": torch.cat([up, gate]),
            "out_proj.weight": source.take(f"{prefix}down_proj.weight", (d, width)),
        }

    return {"kind": "feed_forward", "width": width}, read


def attention_of(settings: Settings, d: int, *, shared_key: bool = False) -> dict[str, Any]:
    settings.only("qk_norm", False, None)
    heads = _heads(settings, 32, d)
    groups = 1 if shared_key else settings.get("num_kv_heads", None) or heads
    window = settings.get("window_size", 1024 if shared_key else None)
    return {
        "kind": "attention",
        "heads": {"num_heads": heads, "num_key_heads": groups, "num_value_heads": heads if shared_key else groups},
        "window": window,
        "rotary_base": settings.number("rope_theta", 10000.0),
        "bias": bool(settings.get("qkv_bias", False)),
    }


def read_attention(config: dict[str, Any], d: int) -> Reader:
    heads, bias = config["heads"], config["bias"]
    width = d // heads["num_heads"]
    counts = {"q": heads["num_heads"], "k": heads["num_key_heads"], "v": heads["num_value_heads"]}

    def read(source: Source, prefix: str) -> Tensors:
        found = {
            "qkv_proj.weight": torch.cat(
                [source.take(f"{prefix}{name}_proj.weight", (count * width, d)) for name, count in counts.items()]
            ),
            "out_proj.weight": source.take(f"{prefix}o_proj.weight", (d, d)),
        }
        if bias:  # There is none on the way out.
            found["qkv_proj.bias"] = torch.cat(
                [source.take(f"{prefix}{name}_proj.bias", (count * width,)) for name, count in counts.items()]
            )
            found["out_proj.bias"] = found["out_proj.weight"].new_zeros(d)
        return found

    return read


def rodimus(settings: Settings, d: int) -> tuple[dict[str, Any], Reader]:
    settings.only("use_short_conv", True)
    settings.only("k_norm_eps", None, 1e-12)
    settings.only("block_type", "rodimus_plus", "rodimus")
    n, conv, m = settings.count("expand_ratio", 64), settings.count("conv_size", 4), align8(2 * d)
    rank = settings.get("input_gate_low_rank", "auto")
    rank = max(d // 64, 16) if rank == "auto" else settings.count("input_gate_low_rank")

    def read(source: Source, prefix: str) -> Tensors:
        def take(name: str, *shape: int) -> Tensor:
            return source.take(prefix + name, shape)

        return {
            "fc.weight": torch.cat([take("up_proj.weight", m, d), take("gate_proj.weight", m, d)]),
            "conv_weight": take("short_conv.weight", m, 1, conv).squeeze(1),
            "conv_bias": take("short_conv.bias", m),
            "state_proj.weight": torch.cat(
                [take(f"{name}_proj.weight", n, m) for name in ("q", "k", "g_gate", "tau_gate")]
            ),
            "gate_bias": torch.cat([take("g_gate_proj.bias", n), take("tau_gate_proj.bias", n)]),
            "value_gate.down.weight": take("i_gate_proj.0.weight", rank, m),
            "value_gate.up.weight": take("i_gate_proj.1.weight", m, rank),
            "value_gate.up.bias": take("i_gate_proj.1.bias", m),
            "feedthrough": take("residual_weight", m),
            "norm.weight": take("activation_norm.weight", m),
            "out_proj.weight": take("down_proj.weight", d, m),
        }

    eps = settings.number("norm_eps", 1e-5)
    config = {"kind": "rodimus", "n": n, "conv_width": conv, "beta_hat": {"rank": rank}, "norm_eps": eps}
    return config, read


def gla(settings: Settings, d: int) -> tuple[dict[str, Any], Reader]:
    settings.only("use_short_conv", False)
    settings.only("use_output_gate", True)
    settings.only("feature_map", None, "identity")
    settings.only("clamp_min", None)
    settings.only("hidden_act", "swish")
    keys, values = _whole(settings, "expand_k", 0.5, d), _whole(settings, "expand_v", 1.0, d)
    heads = _heads(settings, 4, keys, values)
    groups = heads // (settings.get("num_kv_heads", None) or heads)
    affine = bool(settings.get("elementwise_affine", True))

    def read(source: Source, prefix: str) -> Tensors:
        def shared(name: str, width: int, *rest: int) -> Tensor:
            return _repeated(source.take(prefix + name, (width // groups, *rest)), heads, groups)

        found = {
            "in_proj.weight": torch.cat(
                [
                    source.take(f"{prefix}q_proj.weight", (keys, d)),
                    shared("k_proj.weight", keys, d),
                    shared("v_proj.weight", values, d),
                    source.take(f"{prefix}gk_proj.0.weight", (LOW_RANK, d)),
                ]
            ),
            "decay_proj.weight": shared("gk_proj.1.weight", keys, LOW_RANK),
            "decay_proj.bias": shared("gk_proj.1.bias", keys),
            "gate_proj.weight": source.take(f"{prefix}g_proj.weight", (values, d)),
            "out_proj.weight": source.take(f"{prefix}o_proj.weight", (d, values)),
        }
        if affine:
            found["norm.weight"] = _head_norm(source, prefix, values // heads, settings)
        return found

    return {
        "kind": "gla",
        "num_heads": heads,
        "expand_k": times(d, keys),
        "expand_v": times(d, values),
        "rank": LOW_RANK,
        "temperature": TEMPERATURE,
        "norm_weight": affine,
        "norm_eps": settings.number("norm_eps", 1e-6),
    }, read


def _head_norm(source: Source, prefix: str, width: int, settings: Settings) -> Tensor:
    """The norm of each head, fused with the gate or not."""
    name = "g_norm_swish_gate" if settings.flag("fuse_norm", True) else "g_norm"
    return source.take(f"{prefix}{name}.weight", (width,))


def retnet(settings: Settings, d: int) -> tuple[dict[str, Any], Reader]:
    settings.only("use_output_gate", True)
    settings.only("feature_map", None, "identity")
    settings.only("hidden_act", "swish")
    settings.only("expand_k", 1.0, 1)
    values = _whole(settings, "expand_v", 2.0, d)
    if values % d:
        settings.refuse("expand_v")
    heads = _heads(settings, 8, d)
    groups = heads // (settings.get("num_kv_heads", None) or heads)

    def read(source: Source, prefix: str) -> Tensors:
        k, v = (
            _repeated(source.take(f"{prefix}{name}_proj.weight", (width // groups, d)), heads, groups)
            for name, width in (("k", d), ("v", values))
        )
        q, g = (source.take(f"{prefix}{name}_proj.weight", (width, d)) for name, width in (("q", d), ("g", values)))
        out = source.take(f"{prefix}o_proj.weight", (d, values))
        if settings.get("elementwise_affine", True):  # The norm here has no weights; they scale what is read of it.
            norm = _head_norm(source, prefix, values // heads, settings)
            out = (out.float() * norm.float().repeat(heads)).to(out.dtype)
        return {"qkvg_proj.weight": torch.cat([q, k, v, g]), "out_proj.weight": out}

    return {
        "kind": "retention",
        "head_width": d // heads,
        "expand_v": values // d,
        "norm_eps": settings.number("norm_eps", 1e-6),
        "init": "fla",
    }, read


def hgrn2(settings: Settings, d: int) -> tuple[dict[str, Any], Reader]:
    settings.only("use_short_conv", False)
    expand = settings.get("expand_ratio", 128)
    expand = d // settings.count("num_heads") if expand is None else settings.count("expand_ratio", 128)
    if d % expand:
        raise UserError(
            f"expand_ratio={expand} in {settings.where} does not divide hidden_size={d}; it is not converted"
        )

    def read(source: Source, prefix: str) -> Tensors:
        qfv = [source.take(f"{prefix}{name}_proj.weight", (d, d)) for name in "qfi"]
        affine = settings.get("elementwise_affine", True)
        return {
            "qfv_proj.weight": torch.cat(qfv),
            "norm.weight": source.take(f"{prefix}g_norm.weight", (d,)) if affine else torch.ones_like(qfv[0][0]),
            "out_proj.weight": source.take(f"{prefix}o_proj.weight", (d, d)),
        }

    # The layer's norm goes through a function that is not told `norm_eps`: it is always 1e-5.
    bounds = settings.flag("use_lower_bound", True)
    return {"kind": "hgrn2", "expand": expand, "lower_bounds": bounds, "norm_eps": 1e-5}, read


def mamba(settings: Settings, d: int) -> tuple[dict[str, Any], Reader]:
    settings.only("use_bias", False)
    settings.only("hidden_act", "silu", "swish")
    m, n, conv = _whole(settings, "expand", 2, d), settings.count("state_size", 16), settings.count("conv_kernel", 4)
    if m % d:
        settings.refuse("expand")
    rank = settings.get("dt_rank", "auto")
    rank = -(-d // 16) if rank == "auto" else settings.count("dt_rank")

    def read(source: Source, prefix: str) -> Tensors:
        def take(name: str, *shape: int) -> Tensor:
            return source.take(prefix + name, shape)

        return {
            "in_proj.weight": take("in_proj.weight", 2 * m, d),
            **_conv(source, prefix, m, conv, settings),
            "x_proj.weight": take("x_proj.weight", rank + 2 * n, m),
            "dt_proj.weight": take("dt_proj.weight", m, rank),
            "dt_proj.bias": take("dt_proj.bias", m),
            "A_log": take("A_log", m, n),
            "D": take("D", m),
            "out_proj.weight": take("out_proj.weight", d, m),
        }

    return {"kind": "mamba", "state": n, "expand": m // d, "conv_width": conv, "dt_rank": rank, "init": "fla"}, read


def _conv(source: Source, prefix: str, channels: int, width: int, settings: Settings) -> Tensors:
    weight = source.take(f"{prefix}conv1d.weight", (channels, 1, width)).squeeze(1)
    biased = settings.flag("use_conv_bias", True)
    bias = source.take(f"{prefix}conv1d.bias", (channels,)) if biased else weight.new_zeros(channels)
    return {"conv_weight": weight, "conv_bias": bias}


def mamba2(settings: Settings, d: int) -> tuple[dict[str, Any], Reader]:
    settings.only("use_bias", False)
    settings.only("hidden_act", "silu", "swish")
    settings.only("n_groups", 1)
    settings.only("rmsnorm", True)
    settings.only("norm_before_gate", False)
    settings.only("D_has_hdim", False)
    if list(settings.get("dt_limit", [0.0, float("inf")])) != [0.0, float("inf")]:
        settings.refuse("dt_limit")
    m, n, conv = _whole(settings, "expand", 2, d), settings.count("state_size", 128), settings.count("conv_kernel", 4)
    width = settings.count("head_dim", 64)
    if m % d:
        settings.refuse("expand")
    if m % width:
        settings.refuse("head_dim")
    heads = m // width

    def read(source: Source, prefix: str) -> Tensors:
        def take(name: str, *shape: int) -> Tensor:
            return source.take(prefix + name, shape)

        return {
            "in_proj.weight": take("in_proj.weight", 2 * m + 2 * n + heads, d),
            **_conv(source, prefix, m + 2 * n, conv, settings),
            "dt_bias": take("dt_bias", heads),
            "A_log": take("A_log", heads),
            "D": take("D", heads),
            "norm.weight": take("norm.weight", m),
            "out_proj.weight": take("out_proj.weight", d, m),
        }

    return {
        "kind": "mamba2",
        "state": n,
        "expand": m // d,
        "head_width": width,
        "conv_width": conv,
        "norm_eps": settings.number("norm_eps", 1e-5),
        "init": "fla",
    }, read


def rwkv6(settings: Settings, d: int) -> tuple[dict[str, Any], Reader]:
    settings.only("expand_v", 1.0, 1)
    keys = _whole(settings, "expand_k", 0.5, d)
    heads = _heads(settings, 4, d, keys)
    if keys > d:
        settings.refuse("expand_k")
    mix, low = settings.count("proj_low_rank_dim", 32), settings.count("gate_low_rank_dim", 64)
    order = [1, 2, 3, 0, 4]  # Theirs is r, w, k, v, g; here it is w, k, v, r, g.

    def wide(rows: Tensor) -> Tensor:
        """Rows of heads K wide as rows of heads V wide. What is added is 0, and nothing is written to or read of it."""
        by_head = rows.unflatten(0, (heads, -1))
        more = by_head.new_zeros(heads, (d - keys) // heads, *by_head.shape[2:])
        return torch.cat([by_head, more], 1).flatten(0, 1)

    def read(source: Source, prefix: str) -> Tensors:
        def take(name: str, *shape: int) -> Tensor:
            return source.take(prefix + name, shape)

        return {
            "mix_x": take("x_proj.0.mu", d),
            "mix_down": take("x_proj.0.linear.weight", 5 * mix, d).unflatten(0, (5, mix))[order].flatten(0, 1),
            "mix_up_JRD": take("x_proj.2.weight", d, 5 * mix).unflatten(1, (5, mix)).permute(1, 2, 0)[order],
            "mix_JD": take("x_bias", 5, d)[order],
            "decay": wide(take("w_proj.linear.lora.2.bias", keys)),
            "decay_down": take("w_proj.linear.lora.0.weight", low, d),
            "decay_up": wide(take("w_proj.linear.lora.2.weight", keys, low)),
            "bonus_HK": wide(take("bonus", heads, keys // heads).flatten()).view(heads, -1),
            "key.weight": wide(take("k_proj.linear.weight", keys, d)),
            "receptance.weight": wide(take("r_proj.linear.weight", keys, d)),
            "value.weight": take("v_proj.linear.weight", d, d),
            "gate.weight": take("g_proj.linear.weight", d, d),
            "output.weight": take("o_proj.weight", d, d),
            "norm_weight": take("g_norm.weight", d),
            "norm_bias": take("g_norm.bias", d),
        }

    eps = settings.number("norm_eps", 1e-5)
    config = {"kind": "rwkv6", "head_width": d // heads, "mix_rank": mix, "decay_rank": low, "norm_eps": eps}
    return config | {"init": "fla"}, read


def rwkv6_channel(settings: Settings, d: int) -> tuple[dict[str, Any], Reader]:
    settings.only("hidden_act", "sqrelu")
    if (width := settings.get("intermediate_size", None)) is None:
        width = -(-int(d * (settings.get("hidden_ratio", None) or 3.5)) // 32) * 32
    else:
        width = settings.count("intermediate_size")

    def read(source: Source, prefix: str) -> Tensors:
        return {
            "mix_k": 1 - source.take(f"{prefix}key.mu", (d,)),
            "mix_r": 1 - source.take(f"{prefix}receptance.mu", (d,)),
            "key.weight": source.take(f"{prefix}key.linear.weight", (width, d)),
            "receptance.weight": source.take(f"{prefix}receptance.linear.weight", (d, d)),
            "value.weight": source.take(f"{prefix}value.weight", (d, width)),
        }

    return {"kind": "rwkv6_channel", "hidden": width, "init": "fla"}, read


def gated_deltanet(settings: Settings, d: int) -> tuple[dict[str, Any], Reader]:
    settings.only("use_gate", True)
    settings.only("output_gate_activation", "swish", "silu")
    width, groups_of = settings.count("head_dim", 256), settings.count("num_heads", 6)
    heads = settings.get("num_v_heads", None) or groups_of
    if heads % groups_of:
        settings.refuse("num_v_heads")
    value_width = _whole(settings, "expand_v", 2.0, width)
    keys, values, shared = heads * width, heads * value_width, heads // groups_of
    conv = settings.count("conv_size", 4)
    convolved = settings.flag("use_short_conv", True)

    def read(source: Source, prefix: str) -> Tensors:
        rows, taps = [], []
        for name, channels, groups in (("q", keys, shared), ("k", keys, shared), ("v", values, 1)):
            rows.append(_repeated(source.take(f"{prefix}{name}_proj.weight", (channels // groups, d)), heads, groups))
            if convolved:
                weight = source.take(f"{prefix}{name}_conv1d.weight", (channels // groups, 1, conv)).squeeze(1)
                taps.append(_repeated(weight, heads, groups))
            else:  # A convolution that gives back the token itself.
                taps.append(torch.eye(conv, dtype=rows[-1].dtype)[-1].expand(channels, -1))
        return {
            "qkv_proj.weight": torch.cat(rows),
            "conv_weight": torch.cat(taps),
            "step_proj.weight": torch.cat([source.take(f"{prefix}{x}_proj.weight", (heads, d)) for x in "ab"]),
            "gate_proj.weight": source.take(f"{prefix}g_proj.weight", (values, d)),
            "A_log": source.take(f"{prefix}A_log", (heads,)),
            "dt_bias": source.take(f"{prefix}dt_bias", (heads,)),
            "norm.weight": source.take(f"{prefix}o_norm.weight", (value_width,)),
            "out_proj.weight": source.take(f"{prefix}o_proj.weight", (d, values)),
        }

    return {
        "kind": "gated_deltanet",
        "num_heads": heads,
        "expand_k": times(d, keys),
        "expand_v": times(d, values),
        "conv_width": conv,
        "beta_max": 2 if settings.flag("allow_neg_eigval", False) else 1,
        "norm_eps": settings.number("norm_eps", 1e-6),
    }, read


MIXERS: dict[str, Family] = {
    "rodimus": rodimus,
    "gla": gla,
    "retnet": retnet,
    "hgrn2": hgrn2,
    "mamba": mamba,
    "mamba2": mamba2,
    "rwkv6": rwkv6,
    "rwkv6_channel": rwkv6_channel,
    "gated_deltanet": gated_deltanet,
}
