"""StreamingLLM: equal to a cache kept by hand as its authors keep theirs, and to Transformer++ while it fits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baselines.streaming_llm import StreamingLLM, StreamingLLMConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.mixer import Initializer, state_nbytes
from rodimus_lab.nn.norm import Norm
from rodimus_lab.nn.rotary import rotary_table, rotate
from rodimus_lab.nn.zoo import build_model
from rodimus_lab.ops import Segments, attention

SINKS, WINDOW, D = 3, 5, 32


def drawn(**fields: object) -> StreamingLLM:
    config = StreamingLLMConfig(heads=HeadSharing.of("gqa", 4, 2), sinks=SINKS, window=WINDOW, **fields)
    mixer = config.build(D).double()
    mixer.init_weights(Initializer(std=0.3))
    return mixer


def by_hand(mixer: StreamingLLM, x_TD: Tensor) -> Tensor:
    """One token at a time over a list of unturned keys: append, evict, turn each by its place in the list."""
    cache: list[tuple[Tensor, Tensor]] = []
    outputs = []
    for x_D in x_TD:
        q, k, v = (z.unflatten(-1, (-1, mixer.head_width)) for z in mixer.qkv_proj(x_D).split(mixer.widths))
        cache.append((k, v))
        if len(cache) > SINKS + WINDOW:
            del cache[SINKS]
        keys, values = (torch.stack(z).repeat_interleave(2, dim=1) for z in zip(*cache, strict=True))
        if mixer.config.rotary_base is not None:
            places = torch.arange(len(cache))[None]
            table = rotary_table(places, mixer.head_width, mixer.config.rotary_base, keys.dtype)
            keys = rotate(keys[None], table)[0]
            q = rotate(q.expand(1, len(cache), -1, -1), table)[0, -1]
        weights = (torch.einsum("hk,shk->hs", q, keys) * mixer.head_width**-0.5).softmax(-1)
        outputs.append(mixer.out_proj(torch.einsum("hs,shk->hk", weights, values).flatten()))
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("rotary_base", [10000.0, None])
def test_it_is_the_authors_cache(rotary_base: float | None) -> None:
    mixer, x = drawn(rotary_base=rotary_base), torch.randn(2, 40, D, dtype=torch.float64)
    want = torch.stack([by_hand(mixer, row) for row in x])
    torch.testing.assert_close(mixer(x)[0], want)
    for pieces in ([1] * 40, [2, 11, 1, 1, 20, 5], [40]):
        state, outputs = mixer.init_state(2), []
        for piece in x.split(pieces, dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), want)
        assert state_nbytes(state) == mixer.config.state_bytes(D, 2, 40, torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("context", [2, 6, 8, 40])
def test_steps_in_place(context: int) -> None:
    """Also while the cache is short, for a text that is."""
    mixer, norm, x = drawn(), Norm(D).double(), torch.randn(2, context, D, dtype=torch.float64)
    want, _ = mixer(norm(x))
    state, base = mixer.init_state(2, context=context), torch.randn(2, D, dtype=torch.float64)
    for t in range(context):
        torch.testing.assert_close(mixer.step(x[:, t], norm, base, state), base + want[:, t])


@torch.no_grad()
def test_each_document_has_its_own_sinks() -> None:
    mixer, x = drawn(), torch.randn(1, 50, D, dtype=torch.float64)
    y, _ = mixer(x, None, Segments.from_lengths([20, 2, 28]))
    torch.testing.assert_close(y[0], torch.cat([by_hand(mixer, part) for part in x[0].split([20, 2, 28])]))


@torch.no_grad()
def test_transformer_pp_is_read_with_sinks() -> None:
    """Its weights fit, and while the text does, the logits are its own."""
    theirs = build_model("transformer++", size="smoke", vocab_size=50).eval()
    ours = build_model("streaming_llm", size="smoke", vocab_size=50).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 50, (1, 160))
    want, got = theirs(ids)[0], ours(ids)[0]
    torch.testing.assert_close(got[:, :128], want[:, :128], rtol=0, atol=1e-5)
    assert not torch.allclose(got[:, 128:], want[:, 128:], rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", ["sdpa", "naive"])
def test_sinks_without_queries_of_their_own(backend: str) -> None:
    q, k, v = (torch.randn(1, 30, 2, 4, dtype=torch.float64) for _ in range(3))
    o, _ = attention(q, k, v, window=WINDOW, sinks=SINKS, backend=backend)
    t, s = torch.arange(30)[:, None], torch.arange(30)
    unseen = (s > t) | ((t - s >= WINDOW) & (s >= SINKS))
    scores = (torch.einsum("thk,shk->hts", q[0], k[0]) / 2).masked_fill(unseen, -torch.inf)
    torch.testing.assert_close(o[0], torch.einsum("hts,shk->thk", scores.softmax(-1), v[0]))
