"""`attention_step` in Triton: the slots are split among programs, then one small kernel joins what they found.

A program has R query heads that share both their key head and their value head (R = gcd(H/G, H/J)), and a stretch of
the filled slots. The slot of the new token is left out of what is read; the first stretch takes the new key and value
from the projection itself, and one program of each key or value head writes them. The parts are joined in a fixed
order, so the same inputs give the same bits.

Shapes: see step.py; P stretches, KH = K/2 (BK: padded), BR: R padded, BS slots at a time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.attention.cache import KVCache
from rodimus_lab.ops.launch import gdc_launch_dependents, gdc_wait, launch_options

PROGRAMS = 4 * 132  # They fill a Hopper GPU a few times over.
PI = tl.constexpr(math.pi)
MOST_STRETCHES = 128  # One program joins them.
SLOTS_AT_ONCE = 64


@triton.jit
def _stretch_kernel(
    q_ptr, k_ptr, v_ptr, cache_k_ptr, cache_v_ptr, length_ptr, frequency_ptr, o_out, top_out, sum_out,
    q_stride, k_stride, v_stride, scale, S,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, P: tl.constexpr,
    ROTARY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    p, group = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = group * R
    g, j = head // (H // G), head // (H // J)
    r, i, c, s = tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BS)
    KH: tl.constexpr = K // 2
    in_K, in_V, in_R = i < KH, c < V, r < R
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(length_ptr + b)
    cos, sin = tl.full([BK], 1.0, tl.float32), tl.zeros([BK], tl.float32)
    if ROTARY:
        # Whole turns are taken off in float64, which leaves little to do in float32.
        turns = length.to(tl.float64) * (tl.load(frequency_ptr + i, mask=in_K, other=0.0) * (0.5 / PI))
        angle = (turns - tl.floor(turns + 0.5)).to(tl.float32) * (2 * PI)
        cos, sin = tl.cos(angle), tl.sin(angle)
    q_at = q_ptr + b * q_stride + (head + r)[:, None] * K + i[None, :]
    q_in = in_R[:, None] & in_K[None, :]
    q1 = tl.load(q_at, mask=q_in, other=0.0).to(tl.float32)
    q2 = tl.load(q_at + KH, mask=q_in, other=0.0).to(tl.float32)
    k_at = k_ptr + b * k_stride + g * K + i
    k1 = tl.load(k_at, mask=in_K, other=0.0).to(tl.float32)
    k2 = tl.load(k_at + KH, mask=in_K, other=0.0).to(tl.float32)
    v_new = tl.load(v_ptr + b * v_stride + j * V + c, mask=in_V, other=0.0)
    dtype = cache_k_ptr.dtype.element_ty
    qa = (q1 * cos[None, :] - q2 * sin[None, :]).to(dtype)
    qb = (q2 * cos[None, :] + q1 * sin[None, :]).to(dtype)
    ka, kb = (k1 * cos - k2 * sin).to(dtype), (k2 * cos + k1 * sin).to(dtype)
    slot = length % S
    if p == 0:
        if head % (H // G) == 0:
            new_k_at = cache_k_ptr + ((b * S + slot) * G + g) * K + i
            tl.store(new_k_at, ka, mask=in_K)
            tl.store(new_k_at + KH, kb, mask=in_K)
        if head % (H // J) == 0:
            new_v_at = cache_v_ptr + ((b * S + slot) * J + j) * V + c
            tl.store(new_v_at, v_new.to(cache_v_ptr.dtype.element_ty), mask=in_V)
    wide_a, wide_b = qa.to(tl.float32), qb.to(tl.float32)
    own = tl.sum(wide_a * ka.to(tl.float32)[None, :] + wide_b * kb.to(tl.float32)[None, :], 1) * scale
    first = p == 0
    top = tl.where(first, own, float("-inf"))
    total = tl.where(first & (r < BR), 1.0, 0.0)
    o = tl.where(first, v_new.to(tl.float32)[None, :] + tl.zeros([BR, BV], tl.float32), 0.0)
    filled = tl.minimum(length, S).to(tl.int32)
    each = tl.cdiv(tl.cdiv(filled, P), BS) * BS
    for start in range(p * each, tl.minimum(p * each + each, filled), BS):
        here = start + s
        seen = (here < filled) & (here != slot)
        place = (b * S + here)[:, None]
        ks_at = cache_k_ptr + (place * G + g) * K + i[None, :]
        ks_in = seen[:, None] & in_K[None, :]
        ka_s = tl.load(ks_at, mask=ks_in, other=0.0)
        kb_s = tl.load(ks_at + KH, mask=ks_in, other=0.0)
        v_s = tl.load(cache_v_ptr + (place * J + j) * V + c[None, :], mask=seen[:, None] & in_V[None, :], other=0.0)
        if BR == 1:
            score = tl.sum(ka_s.to(tl.float32) * wide_a + kb_s.to(tl.float32) * wide_b, 1)[None, :]
        else:
            score = tl.dot(qa, tl.trans(ka_s), input_precision="tf32x3")
            score = tl.dot(qb, tl.trans(kb_s), score, input_precision="tf32x3")
        score = tl.where(seen[None, :], score * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # A stretch may hold nothing but the new token's slot, and then has no top.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp(top - base)
        weight = tl.exp(score - base[:, None])
        total = total * kept + tl.sum(weight, 1)
        if BR == 1:
            found = tl.sum(tl.trans(weight) * v_s.to(tl.float32), 0)[None, :]
        else:
            found = tl.dot(weight.to(v_s.dtype), v_s, input_precision="tf32x3")
        o = o * kept[:, None] + found
        top = higher
    part = (b * H + head + r) * P + p
    tl.store(top_out + part, top, mask=in_R)
    tl.store(sum_out + part, total, mask=in_R)
    tl.store(o_out + part[:, None] * V + c[None, :], o, mask=in_R[:, None] & in_V[None, :])


@triton.jit
def _join_kernel(
    part_ptr, top_ptr, sum_ptr, length_ptr, o_out,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    p, c = tl.arange(0, BP), tl.arange(0, BV)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if h == 0:
        tl.store(length_ptr + b, tl.load(length_ptr + b) + 1)
    at = (b * H + h) * P + p
    top = tl.load(top_ptr + at, mask=p < P, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(tl.load(sum_ptr + at, mask=p < P, other=0.0) * weight, 0)
    part = tl.load(part_ptr + at[:, None] * V + c[None, :], mask=(p < P)[:, None] & (c < V)[None, :], other=0.0)
    o = tl.sum(part * weight[:, None], 0) / total
    tl.store(o_out + (b * H + h) * V + c, o.to(o_out.dtype.element_ty), mask=c < V)


def split_attention(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, frequency: Tensor | None, scale: float) -> Tensor:
    """See `attention_step`; q, k and v may be parts of one row. Sums and scores in float32."""
    B, H, K = q.shape
    S, G = cache.k_BSGK.shape[1:3]
    J, V = v.shape[1:]
    for x, width in ((q, K), (k, K), (v, V)):
        assert x.stride()[1:] == (width, 1)
    assert all(x.is_contiguous() for x in cache)
    R = math.gcd(H // G, H // J)
    P = max(1, min(triton.cdiv(S, 2 * SLOTS_AT_ONCE), PROGRAMS // (B * H // R), MOST_STRETCHES))
    part = q.new_empty(B, H, P, V, dtype=torch.float32)
    top, total = part.new_empty(B, H, P), part.new_empty(B, H, P)
    o = q.new_empty(B, H, V)
    options = launch_options(q)
    BV, BR = triton.next_power_of_2(V), 1 if R == 1 else max(16, triton.next_power_of_2(R))
    _stretch_kernel[(P, H // R, B)](
        q, k, v, cache.k_BSGK, cache.v_BSJV, cache.length_B, q if frequency is None else frequency, part, top, total,
        q.stride(0), k.stride(0), v.stride(0), scale, S, H=H, G=G, J=J, K=K, V=V, R=R,
        BK=max(16, triton.next_power_of_2(K // 2)), BV=max(16, BV), BR=BR, BS=SLOTS_AT_ONCE, P=P,
        ROTARY=frequency is not None, num_warps=4, **options,
    )  # fmt: skip
    _join_kernel[(H, B)](
        part, top, total, cache.length_B, o, H=H, V=V, BV=BV, P=P, BP=triton.next_power_of_2(P), num_warps=4, **options
    )
    return o
