"""Decoding in place: the same tokens as the general path draws, in memory that never grows; on CUDA in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from rodimus_lab.decoder import Decoder
from rodimus_lab.errors import UserError
from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.mixer import Initializer, TokenMixerConfig, state_nbytes
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.nn.norm import Norm
from rodimus_lab.nn.rodimus import RodimusConfig, TemperatureGate, ValueDecay, ValueGate
from rodimus_lab.nn.zoo import MODELS, Size, build_model
from rodimus_lab.ops import Segments
from rodimus_lab.registry import load_plugins
from rodimus_lab.sampling import Sampling

load_plugins()
GREEDY = Sampling(temperature=0)
VOCAB = 97
TINY = Size("tiny", num_layers=2, d_model=64, num_heads=4, vocab_size=VOCAB, context=24)  # Rodimus+ sees 12 tokens.
RODIMUS = RodimusConfig(n=4, beta_hat=ValueGate(rank=3))
MIXERS: dict[str, TokenMixerConfig] = {
    "paper": RODIMUS,
    "no_tau": RODIMUS.replace(tau=None),
    "fixed_tau": RODIMUS.replace(tau=TemperatureGate(fixed=0.5)),
    "no_beta_hat": RODIMUS.replace(beta_hat=None),
    "beta": RODIMUS.replace(beta=ValueDecay(rank=3)),
    "no_key_norm": RODIMUS.replace(key_norm=False),
    "no_feedthrough": RODIMUS.replace(feedthrough=False),
    "no_conv": RODIMUS.replace(conv_width=0),
    "conv_1": RODIMUS.replace(conv_width=1),
    "conv_2": RODIMUS.replace(conv_width=2),
    "ska_window": AttentionConfig(heads=HeadSharing.of("ska", 4), window=4),
    "ska_official_window": AttentionConfig(heads=HeadSharing.of("ska", 2), window=4, window_convention="official"),
    "gqa_bias": AttentionConfig(heads=HeadSharing.of("gqa", 4, 2), bias=True),
    "odd_no_rotary": AttentionConfig(heads=HeadSharing(num_heads=8, num_key_heads=2, num_value_heads=4), head_width=3,
                                     rotary_base=None),
}  # fmt: skip


def tiny(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LanguageModel:
    """With weights that repeat no token for ever: large, and a head of their own."""
    model = build_model(name, size=TINY, tie_embeddings=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(device, dtype)


def drawn_prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(VOCAB, (length,)).tolist() for length in lengths]


@torch.no_grad()
def by_the_general_path(model: LanguageModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy, a functional state a token."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    present = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    x, state = model(ids, model.init_state(len(prompts)), Segments.from_mask(present))
    tokens = []
    for _ in range(count):
        token_B = x[:, -1].argmax(-1)
        tokens.append(token_B.tolist())
        x, state = model(token_B.unsqueeze(1), state)
    return tokens


def decoded(decoder: Decoder, prompts: list[list[int]], count: int) -> list[list[int]]:
    decoder.prefill(prompts)
    return list(decoder.tokens(count))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_same_tokens_as_the_general_path(name: str) -> None:
    """In float32, with prompts shorter and longer than the window, which then goes round; then again from anew."""
    model = tiny(name)
    prompts = drawn_prompts(5, 30, 1)
    decoder = Decoder(model, 3, context=60, sampling=GREEDY)
    want = by_the_general_path(model, prompts, 30)
    assert len({token for step in want for token in step}) > 5
    assert decoded(decoder, prompts, 30) == want
    assert decoded(decoder, prompts, 30) == want


@pytest.mark.parametrize("config", MIXERS.values(), ids=MIXERS)
@torch.no_grad()
def test_a_step_is_the_forward_of_one_token(config: TokenMixerConfig) -> None:
    D, T = 16, 9
    mixer = config.build(D).double()
    mixer.init_weights(Initializer(std=0.3))
    for norm in (Norm(D).double(), Norm(D, "layer").double()):
        x_BTD, base_BTD = torch.randn(2, T, D).double(), torch.randn(2, T, D).double()
        want, _ = mixer(norm(x_BTD))
        state = mixer.init_state(2, context=T, dtype=torch.float64)
        places = [leaf.data_ptr() for leaf in tree_leaves(state)]
        for t in range(T):
            y_BD = mixer.step(x_BTD[:, t], norm, base_BTD[:, t], state)
            torch.testing.assert_close(y_BD, base_BTD[:, t] + want[:, t], rtol=1e-10, atol=1e-10)
        assert places == [leaf.data_ptr() for leaf in tree_leaves(state)]


@pytest.mark.parametrize("name", ["rodimus", "rodimus+"])
def test_the_state_stays_where_and_as_large_as_it_is(name: str) -> None:
    model = tiny(name)
    decoder = Decoder(model, 2, context=10_000, sampling=GREEDY)
    places, size = [leaf.data_ptr() for leaf in tree_leaves(decoder.state)], decoder.state_bytes
    assert size == model.config.state_bytes(2, 20, torch.float32)
    for _ in decoder.tokens(300):
        assert decoder.state_bytes == state_nbytes(decoder.state) == size
    assert places == [leaf.data_ptr() for leaf in tree_leaves(decoder.state)]
    assert decoder.state.length_B.tolist() == [299, 299]


def test_rows_stop_at_their_tokens() -> None:
    model, prompts = tiny("rodimus+"), drawn_prompts(4, 9)
    free = decoded(Decoder(model, 2, 80, GREEDY), prompts, 40)
    ends = [free[4][0], free[11][1]]
    stopped = decoded(Decoder(model, 2, 80, GREEDY, stop=ends), prompts, 40)
    last = [next(t for t, step in enumerate(free) if step[row] in ends) for row in range(2)]
    assert len(stopped) == max(last) + 1 <= 12
    for row in range(2):
        column = [step[row] for step in stopped]
        assert column[: last[row] + 1] == [step[row] for step in free[: last[row] + 1]]
        assert set(column[last[row] :]) == {free[last[row]][row]}


def test_a_seed_draws_the_same_again() -> None:
    model, prompts = tiny("rodimus"), drawn_prompts(4, 9)
    decoder = Decoder(model, 2, 40, Sampling(seed=3, top_k=20, top_p=0.9))
    first = decoded(decoder, prompts, 20)
    assert decoded(decoder, prompts, 20) == first
    assert decoded(Decoder(model, 2, 40, Sampling(seed=4, top_k=20, top_p=0.9)), prompts, 20) != first


@pytest.mark.parametrize("name", ["rodimus+", "transformer++"])
def test_a_decoder_made_in_inference_mode_goes_on_outside_of_it(name: str) -> None:
    model, prompts = tiny(name), drawn_prompts(4, 9)
    with torch.inference_mode():
        decoder = Decoder(model, 2, 40, GREEDY)
        first = decoded(decoder, prompts, 20)
    assert decoded(decoder, prompts, 20) == first
    with torch.inference_mode():
        assert decoded(decoder, prompts, 20) == first


def test_what_does_not_fit_is_refused() -> None:
    decoder = Decoder(tiny("transformer++"), 1, context=6, sampling=GREEDY)
    with pytest.raises(UserError, match="a prompt of 7 tokens is longer than the decoder's context of 6"):
        decoder.prefill(drawn_prompts(7))
    with pytest.raises(UserError, match="2 prompts do not fit a decoder of 1 rows"):
        decoder.prefill(drawn_prompts(1, 2))
    with pytest.raises(UserError, match="a prompt is empty"):
        decoder.prefill([[]])
    for rows, context in ((0, 6), (1, 0), (-1, 6)):
        with pytest.raises(UserError, match=f"a decoder of {rows} rows and {context} tokens has no room"):
            Decoder(decoder.model, rows, context)
    decoder.prefill(drawn_prompts(4))
    with pytest.raises(UserError, match="4 more tokens do not fit"):
        decoder.tokens(4)
    assert len(list(decoder.tokens(3))) == 3
    with pytest.raises(UserError, match="context of 6 tokens is used up"):
        decoder.step()


def test_a_state_without_room_is_named() -> None:
    model = tiny("transformer++")
    with pytest.raises(UserError, match="has no slot"):
        model.step(torch.zeros(1, dtype=torch.long), model.init_state(1))


def run_on(device: str, name: str, dtype: torch.dtype, batch: int, **options: Any) -> tuple[list[torch.Tensor], Any]:
    """Logits of 40 steps on tokens given in advance, and the state after them."""
    torch.manual_seed(0)
    model = tiny(name, dtype, device)
    torch.manual_seed(1)
    prompts = drawn_prompts(*range(1, batch + 1))
    forced = torch.randint(VOCAB, (40, batch)).to(device)
    decoder = Decoder(model, batch, batch + 60, GREEDY, **options)
    decoder.prefill(prompts)
    logits = []
    for token_B in forced:
        decoder.token_B.copy_(token_B)
        decoder.step()
        assert decoder.logits_BV is not None
        logits.append(decoder.logits_BV.double().cpu())
    return logits, decoder.state


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = [("rodimus+", dtype, batch) for dtype in DTYPES for batch in (1, 3, 64)]
CASES += [(name, torch.float32, 2) for name in ("rodimus", "transformer++", "llama3", "transformer")]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype", "batch"), CASES)
def test_the_graph_draws_what_the_definition_says(name: str, dtype: torch.dtype, batch: int) -> None:
    """Against float64 on the CPU; the graph against the same kernels without it, bit by bit."""
    graph, state = run_on("cuda", name, dtype, batch)
    eager, eager_state = run_on("cuda", name, dtype, batch, capture=False)
    assert all(torch.equal(a, b) for a, b in zip(graph, eager, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), tree_leaves(eager_state), strict=True))
    want, _ = run_on("cpu", name, torch.float64, batch)
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for got, expected in zip(graph, want, strict=True):
        assert (got - expected).norm() / expected.norm() < tolerance


@pytest.mark.gpu
def test_a_captured_stream() -> None:
    """Stopping, seeds and the order of tokens, a step ahead of the host."""
    model, prompts = tiny("rodimus+", device="cuda"), drawn_prompts(4, 9)
    free = decoded(Decoder(model, 2, 80, GREEDY), prompts, 40)
    assert free == decoded(Decoder(model, 2, 80, GREEDY, capture=False), prompts, 40)
    assert free == by_the_general_path(model.cpu(), prompts, 40)
    model.cuda()
    ends = [free[4][0], free[11][1]]
    assert len(decoded(Decoder(model, 2, 80, GREEDY, stop=ends), prompts, 40)) <= 12
    for sampling in (Sampling(seed=3), Sampling(seed=3, top_k=20), Sampling(seed=3, top_p=0.9)):
        decoder = Decoder(model, 2, 80, sampling)
        first = decoded(decoder, prompts, 40)
        assert decoded(decoder, prompts, 40) == first
        assert decoded(Decoder(model, 2, 80, sampling, capture=False), prompts, 40) == first
        assert decoded(Decoder(model, 2, 80, sampling.replace(seed=4)), prompts, 40) != first
    free_runs = [decoded(Decoder(model, 2, 80), prompts, 40) for _ in range(2)]
    assert free_runs[0] != free_runs[1]


@pytest.mark.gpu
def test_the_allocator_gives_nothing_more_over_many_tokens() -> None:
    decoder = Decoder(tiny("rodimus", torch.bfloat16, "cuda"), 1, 10_000, GREEDY)
    decoder.prefill(drawn_prompts(5))
    list(decoder.tokens(10))
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(5000):
        decoder.step()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
