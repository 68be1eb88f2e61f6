"""Small checkpoints in the authors' layout, and that layout's own definition of the logits, a token at a time."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

V, D, LAYERS = 64, 32, 2


def config(block_type="rodimus_plus", *, attn=None, mixer=None, **values):
    return {
        "architectures": ["RodimusForCausalLM"],
        "model_type": "rodimus",
        "block_type": block_type,
        "d_model": D,
        "n_layer": LAYERS,
        "vocab_size": V,
        "norm_epsilon": 1e-5,
        "mixer_cfg": {"mem_size": 8, "input_gate_low_rank": "auto"} | (mixer or {}),
        "attn_cfg": {"num_heads": 4, "num_heads_k": 1, "num_heads_v": 4, "window_size": 12} | (attn or {}),
        "bos_token_id": 1,
        "eos_token_id": 0,
    } | values


def align8(width):
    return -(-int(width) // 8) * 8


def shapes(values):
    mixer, attn = values["mixer_cfg"], values["attn_cfg"]
    m, n = align8(D * mixer.get("expand_ratio", 2)), mixer["mem_size"]
    rank = mixer["input_gate_low_rank"]
    rank = max(D // 64, 16) if rank == "auto" else rank
    found = {"model.embeddings.weight": (V, D), "model.norm_f.weight": (D,)}
    if not values.get("tie_word_embeddings"):
        found["lm_head.weight"] = (V, D)
    if values.get("use_norm_embedding"):
        found["model.embed_norm.weight"] = (D,)
    for layer in range(LAYERS):
        at, inner = f"model.layers.{layer}.", f"model.layers.{layer}.mixer.inner_mixer."
        found |= {
            f"{at}mixer_norm.weight": (D,),
            f"{at}mixer.fc.weight": (2 * m, D),
            f"{at}mixer.act_norm.weight": (m,),
            f"{at}mixer.out_proj.weight": (D, m),
            f"{inner}residual_weight": (m,),
            f"{inner}short_conv.conv1d.weight": (m, 1, mixer.get("d_conv", 4)),
            f"{inner}short_conv.conv1d.bias": (m,),
            f"{inner}in_proj.weight": (2 * n, m),
            f"{inner}ch_gate_proj.0.weight": (rank, m),
            f"{inner}ch_gate_proj.1.weight": (m, rank),
            f"{inner}ch_gate_proj.1.bias": (m,),
            f"{inner}mem_gate_proj.weight": (2 * n, m),
            f"{inner}mem_gate_proj.bias": (2 * n,),
        }
        if values["block_type"] == "rodimus_plus":
            width, ffn = D // attn["num_heads"], align8(D * attn.get("ffn_expand_ratio", 4 / 3))
            found |= {
                f"{at}attn_norm.weight": (D,),
                f"{at}ffn_norm.weight": (D,),
                f"{at}attn.q_proj.weight": (D, D),
                f"{at}attn.k_proj.weight": (width * attn["num_heads_k"], D),
                f"{at}attn.v_proj.weight": (width * attn["num_heads_v"], D),
                f"{at}attn.out_proj.weight": (D, D),
                f"{at}ffn.fc.weight": (2 * ffn, D),
                f"{at}ffn.out_proj.weight": (D, ffn),
            }
    return found


def tensors(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(values).items():
        drawn = torch.randn(shape, generator=generator)
        found[name] = 1 + 0.2 * drawn if len(shape) == 1 and "bias" not in name else drawn * 0.3
    return found


def write(folder, values, weights, tokenizer=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


class Reference:
    """The logits of one row of tokens. With `defects`, tokens after the first `prompt` are read through the published
    cache, replayed slot by slot."""

    def __init__(self, values, weights):
        self.values = values
        self.w = {name: tensor.double() for name, tensor in weights.items()}
        self.n = values["mixer_cfg"]["mem_size"]

    def logits(self, ids, prompt=None):
        w, values = self.w, self.values
        table = w["model.embeddings.weight"]
        x = table[ids]
        if values.get("use_scale_embedding"):
            x = x * self.n**0.5
        if values.get("use_norm_embedding"):
            x = self.norm(x, "model.embed_norm")
        for layer in range(LAYERS):
            at = f"model.layers.{layer}."
            residual = x + self.mixer(self.norm(x, f"{at}mixer_norm"), f"{at}mixer.")
            if values["block_type"] == "rodimus_plus":
                attended = self.attention(self.norm(residual, f"{at}attn_norm"), f"{at}attn.", prompt)
                h = self.norm(attended + residual, f"{at}ffn_norm")
                up, gate = (h @ w[f"{at}ffn.fc.weight"].T).chunk(2, -1)
                residual = residual + (F.silu(gate) * up) @ w[f"{at}ffn.out_proj.weight"].T
            x = residual
        head = table if values.get("tie_word_embeddings") else w["lm_head.weight"]
        return self.norm(x, "model.norm_f") @ head.T

    def norm(self, x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.w[f"{name}.weight"]

    def mixer(self, u, at):
        w, inner = self.w, f"{at}inner_mixer."
        x, gate = (u @ w[f"{at}fc.weight"].T).chunk(2, -1)
        taps = w[f"{inner}short_conv.conv1d.weight"].squeeze(1)
        padded = torch.cat([x.new_zeros(taps.shape[1] - 1, x.shape[1]), x])
        conv = sum(padded[i : i + len(x)] * taps[:, i] for i in range(taps.shape[1]))
        conv = F.silu(conv + w[f"{inner}short_conv.conv1d.bias"])
        q, k = (conv @ w[f"{inner}in_proj.weight"].T).chunk(2, -1)
        low = x @ w[f"{inner}ch_gate_proj.0.weight"].T
        v = (low @ w[f"{inner}ch_gate_proj.1.weight"].T + w[f"{inner}ch_gate_proj.1.bias"]).sigmoid() * x
        gates = conv @ w[f"{inner}mem_gate_proj.weight"].T + w[f"{inner}mem_gate_proj.bias"]
        select, temperature = gates.chunk(2, -1)
        select, temperature = F.softplus(select), temperature.sigmoid()
        k = F.normalize(k, dim=-1) * select**temperature
        memory, read = x.new_zeros(self.n, x.shape[1]), []
        for t in range(len(x)):
            memory = (-select[t] * temperature[t]).exp()[:, None] * memory + k[t][:, None] * v[t]
            read.append(q[t] @ memory / self.n**0.5)
        o = (torch.stack(read) + conv * w[f"{inner}residual_weight"]) * F.silu(gate)
        return self.norm(o, f"{at}act_norm") @ w[f"{at}out_proj.weight"].T

    def attention(self, u, at, prompt):
        attn = self.values["attn_cfg"]
        heads, width = attn["num_heads"], D // attn["num_heads"]
        q, k, v = ((u @ self.w[f"{at}{name}_proj.weight"].T).unflatten(-1, (-1, width)) for name in "qkv")
        if attn.get("rotary_emb_dim", -1):
            q, k = (self.rotated(x, attn) for x in (q, k))
        k, v = (x.repeat(1, heads // x.shape[1], 1) for x in (k, v))
        window = attn.get("window_size")
        half = window // 2 if window else len(u)
        slots, out = None, []
        for t in range(len(u)):
            seen = list(range(max(0, t - half), t + 1))
            if prompt is not None and t >= prompt:
                slots = slots or published_slots(prompt, half)
                slots = published_step(slots, t, half)
                seen = slots[: t + 1]
            keys = torch.stack([k[s] if s is not None else torch.zeros_like(k[0]) for s in seen])
            found = torch.stack([v[s] if s is not None else torch.zeros_like(v[0]) for s in seen])
            share = (torch.einsum("hk,shk->hs", q[t], keys) / width**0.5).softmax(-1)
            out.append(torch.einsum("hs,shk->hk", share, found).flatten())
        return torch.stack(out) @ self.w[f"{at}out_proj.weight"].T

    def rotated(self, x, attn):
        width = x.shape[-1]
        frequency = attn.get("rotary_emb_base", 10000.0) ** -(torch.arange(0, width, 2).double() / width)
        angle = torch.outer(torch.arange(len(x)).double(), frequency)[:, None]
        cos, sin = angle.cos(), angle.sin()
        if attn.get("rotary_emb_interleaved"):
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def published_slots(prompt, slots):
    """Which token each slot holds after a prompt: token p goes to slot min(p, slots - 1), the last one staying."""
    held = [None] * slots
    for token in range(prompt):
        held[min(token, slots - 1)] = token
    return held


def published_step(held, token, slots):
    """The slots move on by one as soon as the last one is to be written, even where it is empty."""
    if token >= slots - 1:
        held = [*held[1:], held[0]]
    held = list(held)
    held[min(token, slots - 1)] = token
    return held
