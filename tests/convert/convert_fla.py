"""flash-linear-attention's layouts in small, and their definitions of the logits, step by step in float64."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

V, D, LAYERS = 64, 32, 3
BASE = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "norm_eps": 1e-4}
FEED = {"intermediate_size": 40}
SKA = {"num_heads": 4, "window_size": 5}
CONFIGS = {
    "rodimus": {"block_type": "rodimus", "expand_ratio": 8},
    "rodimus+": {"model_type": "rodimus", "expand_ratio": 8, "ska_attn": SKA, "hidden_ratio": 1.9},
    "rodimus+ biased": {
        "model_type": "rodimus",
        "expand_ratio": 8,
        "ska_attn": SKA | {"qkv_bias": True, "rope_theta": 300.0},
        "tie_word_embeddings": False,
        "attn": {"layers": [1], "num_heads": 2},
    },
    "gla": FEED,
    "gla shared": {
        "model_type": "gla",
        "num_kv_heads": 2,
        "expand_k": 1.0,
        "expand_v": 2.0,
        "tie_word_embeddings": True,
    },
    "gla plain norm": {"model_type": "gla", "elementwise_affine": False, "fuse_norm": False, "num_heads": 2} | FEED,
    "gla hybrid": {
        "model_type": "gla",
        "attn": {"layers": [0, 2], "num_heads": 4, "num_kv_heads": 2, "window_size": 6, "qkv_bias": True},
    }
    | FEED,
    "hgrn2": {"expand_ratio": 8} | FEED,
    "hgrn2 unbounded": {"model_type": "hgrn2", "expand_ratio": None, "num_heads": 2, "use_lower_bound": False} | FEED,
    "mamba": {"state_size": 5},
    "mamba bare": {"model_type": "mamba", "use_conv_bias": False, "expand": 3, "dt_rank": 4, "conv_kernel": 3},
    "mamba2": {"head_dim": 16, "state_size": 8},
    "mamba2 bare": {"model_type": "mamba2", "head_dim": 32, "state_size": 6, "use_conv_bias": False, "expand": 1},
    "retnet": {"num_heads": 4} | FEED,
    "retnet shared": {"model_type": "retnet", "num_heads": 4, "num_kv_heads": 2, "expand_v": 1.0, "fuse_norm": False}
    | FEED,
    "retnet plain norm": {
        "model_type": "retnet",
        "num_heads": 2,
        "elementwise_affine": False,
        "tie_word_embeddings": True,
    },
    "rwkv6": {"num_heads": 4, "expand_k": 1.0, "proj_low_rank_dim": 4, "gate_low_rank_dim": 6},
    "rwkv6 narrow keys": {"model_type": "rwkv6", "num_heads": 2, "intermediate_size": 64, "norm_bias": False},
    "rwkv6 tied": {"model_type": "rwkv6", "tie_word_embeddings": True},
    "rwkv6 without first norm": {"model_type": "rwkv6", "tie_word_embeddings": True, "norm_first": False},
    "gated_deltanet": {"num_heads": 2, "head_dim": 12} | FEED,
    "gated_deltanet shared": {
        "model_type": "gated_deltanet",
        "num_heads": 2,
        "num_v_heads": 4,
        "head_dim": 6,
        "expand_v": 1.5,
        "allow_neg_eigval": True,
    }
    | FEED,
    "gated_deltanet bare": {"model_type": "gated_deltanet", "num_heads": 2, "head_dim": 8, "use_short_conv": False}
    | FEED,
    "transformer": {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 4, "rope_theta": 400.0} | FEED,
    "transformer plain": {"model_type": "transformer", "num_heads": 2, "tie_word_embeddings": True},
}
CONFIGS = {name: BASE | {"model_type": name} | values for name, values in CONFIGS.items()}


def tensors(names_and_shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in names_and_shapes.items():
        drawn = torch.randn(shape, generator=generator)
        positive = len(shape) == 1 and name.endswith("weight")
        found[name] = 1 + 0.2 * drawn if positive else drawn * (0.5 if "lower_bounds" in name else 0.3)
    return found


def write(folder, values, weights):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def rms(x, weight=None, eps=1e-4):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def layer_norm(x, weight, bias, eps=1e-4):
    y = x - x.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def rotated(x, base=10000.0):
    width = x.shape[-1]
    angle = torch.outer(torch.arange(len(x)).double(), base ** -(torch.arange(0, width, 2).double() / width))[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def linear_attention(q, k, v, log_decay, scale):
    """(T, H, K), (T, H, K), (T, H, V), (T, H, K or 1)"""
    memory, read = q.new_zeros(q.shape[1], q.shape[2], v.shape[2]), []
    for t in range(len(q)):
        memory = log_decay[t].exp()[..., None] * memory + k[t][..., None] * v[t][:, None]
        read.append(torch.einsum("hk,hkv->hv", q[t] * scale, memory))
    return torch.stack(read)


def convolved(x, taps, bias=None):
    padded = torch.cat([x.new_zeros(taps.shape[-1] - 1, x.shape[1]), x])
    y = sum(padded[i : i + len(x)] * taps[:, 0, i] for i in range(taps.shape[-1]))
    return F.silu(y if bias is None else y + bias)


class Reference:
    def __init__(self, values, weights):
        self.c, self.w = values, {name: tensor.double() for name, tensor in weights.items()}
        self.family = values["model_type"]

    def get(self, key, default):
        value = self.c.get(key, default)
        return default if value is None else value

    def lin(self, x, name):
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, x, name):
        if self.family == "rwkv6":
            return layer_norm(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))
        return rms(x, self.w[f"{name}.weight"])

    def logits(self, ids):
        root = "backbone." if self.family in ("mamba", "mamba2") else "model."
        table = self.w[f"{root}embeddings.weight"]
        x = table[ids]
        for layer in range(LAYERS):
            x = self.layer(x, f"{root}layers.{layer}.", layer)
        x = self.norm(x, f"{root}norm" if root == "model." else f"{root}norm_f")
        return x @ self.w.get("lm_head.weight", table).T

    def layer(self, x, at, layer):
        if self.family in ("mamba", "mamba2"):
            return x + getattr(self, self.family)(self.norm(x, f"{at}norm"), f"{at}mixer.")
        attn = self.c.get("attn") or {}
        ordinary = self.c if self.family == "transformer" else attn if layer in attn.get("layers", []) else None
        if self.family == "rodimus" and ordinary is None:
            x = x + self.rodimus(self.norm(x, f"{at}mixer_norm"), f"{at}mixer.")
            if self.c.get("block_type") == "rodimus":
                return x
            ska = {"window_size": 1024} | self.c["ska_attn"]
            y = self.attention(self.norm(x, f"{at}ska_attn_norm"), f"{at}ska_attn.", ska)
            return x + self.feed_forward(self.norm(x + y, f"{at}mlp_norm"), f"{at}mlp.")
        if f"{at}pre_norm.weight" in self.w:
            x = self.norm(x, f"{at}pre_norm")
        u = self.norm(x, f"{at}attn_norm")
        if ordinary is not None:
            x = x + self.attention(u, f"{at}attn.", ordinary)
        elif self.family == "hgrn2":
            x = x + self.hgrn2(u, f"{at}attn.", layer)
        else:
            x = x + getattr(self, self.family)(u, f"{at}attn.")
        if self.family == "rwkv6":
            return x + self.channel(self.norm(x, f"{at}ffn_norm"), f"{at}ffn.")
        return x + self.feed_forward(self.norm(x, f"{at}mlp_norm"), f"{at}mlp.")

    def feed_forward(self, u, at):
        return self.lin(F.silu(self.lin(u, f"{at}gate_proj")) * self.lin(u, f"{at}up_proj"), f"{at}down_proj")

    def attention(self, u, at, c):
        heads = c["num_heads"]
        q, k, v = (self.lin(u, f"{at}{name}_proj").unflatten(-1, (-1, D // heads)) for name in "qkv")
        q, k = (rotated(x, c.get("rope_theta", 10000.0)) for x in (q, k))
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("thk,shk->hts", q, k) * (D // heads) ** -0.5
        t, s = torch.arange(len(u))[:, None], torch.arange(len(u))
        seen = (s <= t) & (t - s < (c.get("window_size") or len(u)))
        share = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.lin(torch.einsum("hts,shv->thv", share, v).flatten(-2), f"{at}o_proj")

    def rodimus(self, u, at):
        w = self.w
        x, gate = self.lin(u, f"{at}up_proj"), self.lin(u, f"{at}gate_proj")
        h = convolved(x, w[f"{at}short_conv.weight"], w[f"{at}short_conv.bias"])
        v = self.lin(self.lin(x, f"{at}i_gate_proj.0"), f"{at}i_gate_proj.1").sigmoid() * x
        g, tau = F.softplus(self.lin(h, f"{at}g_gate_proj")), self.lin(h, f"{at}tau_gate_proj").sigmoid()
        k = F.normalize(self.lin(h, f"{at}k_proj"), dim=-1) * g**tau
        q = self.lin(h, f"{at}q_proj")
        o = linear_attention(q[:, None], k[:, None], v[:, None], (-g * tau)[:, None], q.shape[-1] ** -0.5)[:, 0]
        o = (o + h * w[f"{at}residual_weight"]) * F.silu(gate)
        return self.lin(rms(o, w[f"{at}activation_norm.weight"]), f"{at}down_proj")

    def heads(self, u, at, heads, names):
        shared = self.get("num_kv_heads", heads)
        found = []
        for name in names:
            count = heads if name in ("q", "g") else shared
            found.append(
                self.lin(u, f"{at}{name}_proj").unflatten(-1, (count, -1)).repeat_interleave(heads // count, 1)
            )
        return found

    def head_norm(self, at):
        return self.w.get(f"{at}g_norm_swish_gate.weight", self.w.get(f"{at}g_norm.weight"))

    def gla(self, u, at):
        heads = self.get("num_heads", 4)
        q, k, v, g = self.heads(u, at, heads, "qkvg")
        decay = F.logsigmoid(self.lin(self.lin(u, f"{at}gk_proj.0"), f"{at}gk_proj.1")) / 16
        decay = decay.unflatten(-1, (-1, q.shape[-1]))
        decay = decay.repeat_interleave(heads // decay.shape[1], 1)
        o = linear_attention(q, k, v, decay, q.shape[-1] ** -0.5)
        return self.lin((rms(o, self.head_norm(at)) * F.silu(g)).flatten(-2), f"{at}o_proj")

    def retnet(self, u, at):
        heads = self.get("num_heads", 8)
        q, k, v, g = self.heads(u, at, heads, "qkvg")
        decay = (1 - 2.0 ** (-5 - torch.arange(heads).double())).log()[:, None].expand(len(u), -1, -1)
        o = linear_attention(rotated(q), rotated(k), v, decay, q.shape[-1] ** -0.5)
        return self.lin((rms(o, self.head_norm(at)) * F.silu(g)).flatten(-2), f"{at}o_proj")

    def hgrn2(self, u, at, layer):
        expand = self.c["expand_ratio"] or D // self.c["num_heads"]
        q, f, i = (self.lin(u, f"{at}{name}_proj") for name in "qfi")
        alpha = f.sigmoid()
        if self.get("use_lower_bound", True) and layer > 0:
            share = self.w["model.lower_bounds"].softmax(0)
            bound = (share.cumsum(0) - share[0])[layer]
            alpha = bound + (1 - bound) * alpha
        q, k, i, g = (x.unflatten(-1, (-1, expand)) for x in (F.silu(q), 1 - alpha, i, alpha.log()))
        o = linear_attention(q, k, i, g, expand**-0.5).flatten(-2)
        return self.lin(rms(o, self.w[f"{at}g_norm.weight"], 1e-5), f"{at}o_proj")

    def mamba(self, u, at):
        w, n = self.w, self.get("state_size", 16)
        x, z = self.lin(u, f"{at}in_proj").chunk(2, -1)
        x = convolved(x, w[f"{at}conv1d.weight"], w.get(f"{at}conv1d.bias"))
        low, b, c = self.lin(x, f"{at}x_proj").tensor_split([-2 * n, -n], -1)
        step = F.softplus(self.lin(low, f"{at}dt_proj"))
        memory, read = x.new_zeros(x.shape[1], n), []
        for t in range(len(x)):
            memory = (-step[t][:, None] * w[f"{at}A_log"].exp()).exp() * memory + (step[t] * x[t])[:, None] * b[t]
            read.append(memory @ c[t])
        return self.lin((torch.stack(read) + x * w[f"{at}D"]) * F.silu(z), f"{at}out_proj")

    def mamba2(self, u, at):
        w, n, width = self.w, self.c["state_size"], self.c["head_dim"]
        m = self.get("expand", 2) * D
        z, mixed, step = self.lin(u, f"{at}in_proj").split([m, m + 2 * n, m // width], -1)
        mixed = convolved(mixed, w[f"{at}conv1d.weight"], w.get(f"{at}conv1d.bias"))
        x, b, c = mixed.split([m, n, n], -1)
        x, step = x.unflatten(-1, (-1, width)), F.softplus(step + w[f"{at}dt_bias"])
        b, c = (y[:, None].expand(-1, m // width, -1) for y in (b, c))
        o = linear_attention(c, b, x * step[..., None], (-step * w[f"{at}A_log"].exp())[..., None], 1.0)
        o = (o + x * w[f"{at}D"][:, None]).flatten(-2) * F.silu(z)
        return self.lin(rms(o, w[f"{at}norm.weight"]), f"{at}out_proj")

    def rwkv6(self, u, at):
        w, heads = self.w, self.get("num_heads", 4)
        delta = F.pad(u[:-1], (0, 0, 1, 0)) - u
        low = self.lin(u + delta * w[f"{at}x_proj.0.mu"], f"{at}x_proj.0.linear").tanh().unflatten(-1, (5, -1))
        mu = torch.einsum("tnr,hnr->tnh", low, w[f"{at}x_proj.2.weight"].unflatten(-1, (5, -1))) + w[f"{at}x_bias"]
        r, d, k, v, g = (u + delta * mu[:, index] for index in range(5))
        r, k, v, g = (self.lin(x, f"{at}{name}_proj.linear") for x, name in ((r, "r"), (k, "k"), (v, "v"), (g, "g")))
        d = self.lin(self.lin(d, f"{at}w_proj.linear.lora.0").tanh(), f"{at}w_proj.linear.lora.2")
        r, k, v, d = (x.unflatten(-1, (heads, -1)) for x in (r, k, v, -d.exp()))
        memory, read = u.new_zeros(heads, k.shape[-1], v.shape[-1]), []
        for t in range(len(u)):
            new = k[t][..., None] * v[t][:, None]
            read.append(torch.einsum("hk,hkv->hv", r[t], memory + w[f"{at}bonus"][..., None] * new))
            memory = d[t].exp()[..., None] * memory + new
        o = layer_norm(torch.stack(read), 1.0, None).flatten(-2) * w[f"{at}g_norm.weight"] + w[f"{at}g_norm.bias"]
        return self.lin(o * F.silu(g), f"{at}o_proj")

    def channel(self, u, at):
        delta = F.pad(u[:-1], (0, 0, 1, 0)) - u
        k, r = (self.lin(u + delta * self.w[f"{at}{x}.mu"], f"{at}{x}.linear") for x in ("key", "receptance"))
        return r.sigmoid() * self.lin(k.relu().square(), f"{at}value")

    def gated_deltanet(self, u, at):
        w, heads = self.w, self.c["num_heads"]
        values = self.get("num_v_heads", heads)
        q, k, v = (self.lin(u, f"{at}{name}_proj") for name in "qkv")
        if self.get("use_short_conv", True):
            q, k, v = (convolved(x, w[f"{at}{name}_conv1d.weight"]) for x, name in ((q, "q"), (k, "k"), (v, "v")))
        else:
            q, k, v = map(F.silu, (q, k, v))
        q, k = (x.unflatten(-1, (heads, -1)).repeat_interleave(values // heads, 1) for x in (q, k))
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        v, g = (x.unflatten(-1, (values, -1)) for x in (v, self.lin(u, f"{at}g_proj")))
        beta = self.lin(u, f"{at}b_proj").sigmoid() * (2 if self.c.get("allow_neg_eigval") else 1)
        decay = (-w[f"{at}A_log"].exp() * F.softplus(self.lin(u, f"{at}a_proj") + w[f"{at}dt_bias"])).exp()
        memory, read = u.new_zeros(values, q.shape[-1], v.shape[-1]), []
        for t in range(len(u)):
            memory = decay[t][:, None, None] * memory
            held = torch.einsum("hk,hkv->hv", k[t], memory)
            memory = memory + k[t][..., None] * (beta[t][:, None] * (v[t] - held))[:, None]
            read.append(torch.einsum("hk,hkv->hv", q[t] * q.shape[-1] ** -0.5, memory))
        o = rms(torch.stack(read), w[f"{at}o_norm.weight"]) * F.silu(g)
        return self.lin(o.flatten(-2), f"{at}o_proj")
