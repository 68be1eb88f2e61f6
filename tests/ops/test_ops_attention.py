"""Softmax attention and its cache, against a definition in explicit loops.

Shapes: B batch, T time, H query heads, G key heads, J value heads, K key width, V value width.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops import Segments, attention
from rodimus_lab.ops.attention import KVCache
from rodimus_lab.ops.backend import EXAMPLES, choose

SHARINGS = {"mha": (4, 4, 4), "gqa": (4, 2, 2), "mqa": (4, 1, 1), "ska": (4, 1, 4), "odd": (8, 2, 4)}
K, V = 6, 5


def draw(length: int, sharing: str = "ska", batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    heads, keys, values = SHARINGS[sharing]
    shapes = ((heads, K), (keys, K), (values, V))
    q, k, v = (torch.randn(batch, length, *shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, segments: Segments | None = None) -> Tensor:
    """One query, one head, one key at a time. Rows of padding are left at zero."""
    batch, length, heads, _ = q.shape
    rows = []
    for b in range(batch):
        ids = [0] * length if segments is None else segments.ids_BT[b].tolist()
        for t in range(length):
            for h in range(heads):
                key_head = h // (heads // k.shape[2])
                value_head = h // (heads // v.shape[2])
                if ids[t] < 0:
                    rows.append(torch.zeros(v.shape[-1], dtype=v.dtype))
                    continue
                first = 0 if window is None else max(0, t - window + 1)
                seen = [s for s in range(first, t + 1) if ids[s] == ids[t]]
                weights = torch.stack([(q[b, t, h] @ k[b, s, key_head] / math.sqrt(k.shape[-1])).exp() for s in seen])
                total = sum(w * v[b, s, value_head] for w, s in zip(weights, seen, strict=True))
                rows.append(total / weights.sum())
    return torch.stack(rows).reshape(batch, length, heads, -1)


def masked(o: Tensor, segments: Segments | None) -> Tensor:
    return o if segments is None else o.masked_fill(~segments.valid_BT[:, :, None, None], 0.0)


def ragged(length: int) -> Segments:
    """Row 0: two of padding, then documents; row 1: documents cut elsewhere."""
    ids = torch.zeros(2, length, dtype=torch.long)
    ids[0, :2] = -1
    ids[0, length // 2 :] = 1
    ids[1, 1:] = 1
    ids[1, length - 2 :] = 2
    return Segments(ids)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_attention_is_the_definition(sharing: str, window: int | None, backend: str) -> None:
    q, k, v = draw(9, sharing)
    for segments in (None, ragged(9)):
        o, cache = attention(q, k, v, window=window, segments=segments, backend=backend)
        assert cache is None
        with torch.no_grad():
            want = by_hand(q, k, v, window, segments)
        torch.testing.assert_close(masked(o, segments), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_gradients_are_the_definitions(sharing: str, packed: bool) -> None:
    q, k, v = draw(7, sharing)
    segments = ragged(7) if packed else None
    weight = torch.randn(2, 7, q.shape[2], V, dtype=torch.float64)
    want = torch.autograd.grad((by_hand(q, k, v, 3, segments) * weight).sum(), (q, k, v))
    for backend in ("naive", "sdpa"):
        o, _ = attention(q, k, v, window=3, segments=segments, backend=backend)
        got = torch.autograd.grad((masked(o, segments) * weight).sum(), (q, k, v))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_scale_is_the_callers() -> None:
    q, k, v = draw(5)
    o, _ = attention(q, k, v, scale=0.25)
    want, _ = attention(q * (0.25 * math.sqrt(K)), k, v)
    torch.testing.assert_close(o, want)


def test_padding_gives_finite_values() -> None:
    q, k, v = draw(6)
    for backend in ("naive", "sdpa"):
        o, _ = attention(q, k, v, segments=Segments.from_mask(torch.zeros(2, 6)), backend=backend)
        assert o.isfinite().all()


def empty_cache(slots: int, sharing: str = "ska", batch: int = 2) -> KVCache:
    """What empty slots hold must not matter."""
    _, keys, values = SHARINGS[sharing]
    return KVCache(
        torch.full((batch, slots, keys, K), 9.0, dtype=torch.float64),
        torch.full((batch, slots, values, V), 9.0, dtype=torch.float64),
        torch.zeros(batch, dtype=torch.long),
    )


def in_pieces(
    q: Tensor, k: Tensor, v: Tensor, pieces: list[int], window: int | None, slots: int, padding: list[int] | None = None
) -> tuple[Tensor, KVCache]:
    """The tokens fed a few at a time, `padding[i]` junk tokens left of piece i."""
    cache: KVCache | None = empty_cache(slots)
    outputs, start = [], 0
    for index, piece in enumerate(pieces):
        part = [x[:, start : start + piece] for x in (q, k, v)]
        pad, segments = 0 if padding is None else padding[index], None
        if pad:
            part = [torch.cat([torch.full_like(x[:, :1], 1e3).expand(-1, pad, -1, -1), x], dim=1) for x in part]
            segments = Segments.from_mask((torch.arange(pad + piece) >= pad).expand(2, -1))
        o, cache = attention(*part, window=window, cache=cache, segments=segments)
        outputs.append(o[:, pad:])
        start += piece
    assert cache is not None
    return torch.cat(outputs, dim=1), cache


@settings(max_examples=30, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    window=st.sampled_from([None, 1, 2, 4, 5]),
    preallocated=st.booleans(),
    pads=st.lists(st.sampled_from([0, 0, 1, 3]), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
)
def test_any_cut_into_prefill_and_steps_is_the_whole(
    pieces: list[int], window: int | None, preallocated: bool, pads: list[int], seed: int
) -> None:
    """Prompts shorter than, as long as and longer than the window, then steps and further prompts."""
    torch.manual_seed(seed)
    length = sum(pieces)
    with torch.no_grad():
        q, k, v = draw(length)
        want, _ = attention(q, k, v, window=window, backend="naive")
        slots = min(length, window or length) if preallocated else 0
        o, cache = in_pieces(q, k, v, pieces, window, slots, pads)
    torch.testing.assert_close(o, want, rtol=0, atol=1e-12)
    assert cache.k_BSGK.shape[1] == min(length, window or length)
    assert_holds(cache, k, v, [length, length])


def assert_holds(cache: KVCache, k: Tensor, v: Tensor, lengths: list[int]) -> None:
    """The cache holds the last tokens of each row, each in the slot of its position."""
    slots = cache.k_BSGK.shape[1]
    assert cache.length_B.tolist() == lengths
    for row, length in enumerate(lengths):
        for position in range(max(0, length - slots), length):
            from_end = k.shape[1] - length + position
            assert cache.positions_BS[row, position % slots] == position
            torch.testing.assert_close(cache.k_BSGK[row, position % slots], k[row, from_end])
            torch.testing.assert_close(cache.v_BSJV[row, position % slots], v[row, from_end])
        assert (cache.positions_BS[row] >= 0).sum() == min(length, slots)


@pytest.mark.parametrize("prompt", [3, 4, 5, 9])
def test_decoding_after_a_prompt_around_the_window(prompt: int) -> None:
    with torch.no_grad():
        q, k, v = draw(prompt + 6)
        want = by_hand(q, k, v, 4)
        o, cache = in_pieces(q, k, v, [prompt] + [1] * 6, 4, 4)
    torch.testing.assert_close(o, want, rtol=0, atol=1e-12)
    assert_holds(cache, k, v, [prompt + 6] * 2)


@pytest.mark.parametrize("window", [None, 4])
def test_rows_of_different_lengths_share_a_cache(window: int | None) -> None:
    """A ragged, left-padded prompt, one step, and a second ragged prompt, each row against itself alone."""
    lengths, rows = [[6, 1, 2], [2, 1, 5]], []
    alone = [draw(sum(row), batch=1) for row in lengths]
    with torch.no_grad():
        cache: KVCache | None = empty_cache(0)
        starts = [0, 0]
        for step in range(3):
            widest = max(row[step] for row in lengths)
            batch = []
            for x in range(3):
                parts = [a[x][0, s : s + row[step]] for a, s, row in zip(alone, starts, lengths, strict=True)]
                batch.append(
                    torch.stack([torch.cat([p.new_full((widest - len(p), *p.shape[1:]), 50.0), p]) for p in parts])
                )
            mask = torch.stack([(torch.arange(widest) >= widest - row[step]).long() for row in lengths])
            o, cache = attention(*batch, window=window, cache=cache, segments=Segments.from_mask(mask))
            rows.append([o[r, widest - lengths[r][step] :] for r in range(2)])
            starts = [s + row[step] for s, row in zip(starts, lengths, strict=True)]
        for r in range(2):
            want = by_hand(*alone[r], window)[0]
            torch.testing.assert_close(torch.cat([piece[r] for piece in rows]), want, rtol=0, atol=1e-12)
    assert cache is not None
    assert cache.length_B.tolist() == [9, 8]


@pytest.mark.parametrize("window", [None, 3])
def test_a_cache_keeps_the_last_packed_document(window: int | None) -> None:
    """What follows continues the last document, and the first one continues the cache."""
    lengths = [4, 2, 5]
    with torch.no_grad():
        q, k, v = draw(2 + sum(lengths) + 3, batch=1)
        cuts = [0, 2, 6, 8, 13, 16]
        (before, first, second, third, after) = ([x[:, a:b] for x in (q, k, v)] for a, b in pairwise(cuts))
        packed = [torch.cat(parts, dim=1) for parts in zip(first, second, third, strict=True)]
        _, cache = attention(*before, window=window, cache=empty_cache(0, batch=1))
        o, cache = attention(*packed, window=window, cache=cache, segments=Segments.from_lengths(lengths))
        assert cache is not None
        assert cache.length_B.tolist() == [5]
        steps = []
        for t in range(3):
            step, cache = attention(*(x[:, t : t + 1] for x in after), window=window, cache=cache)
            steps.append(step)
        documents = [
            [torch.cat(pair, dim=1) for pair in zip(before, first, strict=True)],
            second,
            [torch.cat(pair, dim=1) for pair in zip(third, after, strict=True)],
        ]
        want = [by_hand(*document, window) for document in documents]
    torch.testing.assert_close(o, torch.cat([want[0][:, 2:], want[1], want[2][:, :5]], dim=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(steps, dim=1), want[2][:, 5:], rtol=0, atol=1e-12)


def test_a_windowed_cache_stops_growing() -> None:
    with torch.no_grad():
        q, k, v = draw(40)
        _, cache = in_pieces(q, k, v, [1] * 40, 4, 0)
    assert cache.k_BSGK.shape[1] == cache.v_BSJV.shape[1] == 4


def test_a_cache_in_half_precision_is_read_in_the_queries_dtype() -> None:
    q, k, v = (x.detach().float() for x in draw(6))
    cache = KVCache(*(x.to(torch.bfloat16) for x in empty_cache(0)[:2]), torch.zeros(2, dtype=torch.long))
    o, cache = attention(q[:, :5], k[:, :5], v[:, :5], cache=cache)
    step, cache = attention(q[:, 5:], k[:, 5:], v[:, 5:], cache=cache)
    assert cache is not None
    assert cache.k_BSGK.dtype == torch.bfloat16
    want, _ = attention(q, k, v)
    torch.testing.assert_close(torch.cat([o, step], dim=1), want, rtol=0, atol=3e-2)
    assert step.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for backends that cannot run")
@pytest.mark.parametrize(("backend", "reason"), [("flex", "backward"), ("flash_attn", "flash-attn")])
def test_a_backend_that_cannot_run_says_why(backend: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"'{backend}' backend of attention cannot run here: .*{reason}"):
        attention(*draw(4), backend=backend)


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, "flex"),
        ({"window": 2048}, "flex"),
        ({"window": 3072}, "sdpa"),
        ({"length": 2048}, "sdpa"),
        ({"length": 2048, "window": 512}, "flex"),
        ({"window": None}, "sdpa"),
        ({"length": 4100}, "sdpa"),
        ({"grad": False}, "sdpa"),
        ({"packed": True}, "sdpa"),
        ({"dtype": torch.float32}, "sdpa"),
        ({"widths": (64, 80)}, "sdpa"),
        ({"device": "cpu"}, "sdpa"),
    ],
)
def test_flex_is_taken_where_most_of_a_long_training_sequence_is_out_of_reach(
    change: dict[str, Any], chosen: str
) -> None:
    facts = EXAMPLES["attention"] | {"device": "cuda", "length": 4096, "window": 1024} | change
    assert choose("attention", "auto", facts).name == chosen
