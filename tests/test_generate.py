"""Generation: the full forward pass, one token at a time; sampling; text that comes in pieces."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

from rodimus_lab import build_model, decoder
from rodimus_lab.config import ConfigError
from rodimus_lab.data import Tokenizer, train_bpe
from rodimus_lab.errors import UserError
from rodimus_lab.generate import Sampling, sample, stream, stream_text
from rodimus_lab.weights import find_model

GREEDY = Sampling(temperature=0)
MODELS = ["rodimus", "rodimus+", "transformer++"]
VOCAB = 97


@pytest.fixture(params=MODELS)
def model(request):
    return tiny(request.param)


def tiny(name):
    """In float64, with weights that repeat no token for ever: large, and a head of their own. Rodimus+ has a window."""
    model = build_model(name, size="smoke", vocab_size=VOCAB, d_model=32, tie_embeddings=False).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def greedy(model, prompts, count):
    return list(stream(model, prompts, count, GREEDY))


def drawn_prompt(length, seed=0):
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("length", [1, 7, 130])
def test_greedy_steps_are_those_of_the_full_forward(model, length):
    prompt = drawn_prompt(length)
    new = [step[0] for step in greedy(model, [prompt], 12)]
    assert len(set(new)) > 1
    with torch.no_grad():
        logits_BTV, _ = model(torch.tensor([prompt + new]))
    assert logits_BTV[0, length - 1 : -1].argmax(-1).tolist() == new


def test_unequal_prompts_are_each_as_alone(model):
    prompts = [drawn_prompt(length, seed=length) for length in (9, 1, 140, 30)]
    together = greedy(model, prompts, 10)
    for row, prompt in enumerate(prompts):
        assert [step[row] for step in together] == [step[0] for step in greedy(model, [prompt], 10)]


@pytest.mark.parametrize("lengths", [(23,), (16,), (23, 5, 9)])
def test_a_prompt_longer_than_a_chunk(model, lengths, monkeypatch):
    """Among unequal prompts the shorter ones have chunks of nothing but padding."""
    prompts = [drawn_prompt(length, seed=length) for length in lengths]
    whole = greedy(model, prompts, 8)
    monkeypatch.setattr(decoder, "PREFILL_CHUNK", 8)
    assert greedy(model, prompts, 8) == whole


def test_gradients_are_as_before_between_two_tokens():
    steps = stream(tiny("rodimus"), [[1]], 3, GREEDY)
    next(steps)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert (torch.ones(1, requires_grad=True) * 2).requires_grad


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ([], "there is no prompt"),
        ([[]], "a prompt is empty"),
        ([[1], []], "a prompt is empty"),
        ([[VOCAB]], "outside"),
        ([[1, -1]], "outside"),
    ],
)
def test_a_bad_prompt_is_refused_at_once(prompts, named):
    with pytest.raises(UserError, match=named):
        stream(tiny("rodimus"), prompts, 3)


def test_less_than_no_new_token_is_refused_at_once():
    with pytest.raises(UserError, match="there cannot be -2 new tokens; give max_new_tokens of 0 or more"):
        stream(tiny("rodimus"), [[1, 2, 3]], -2)
    assert list(stream(tiny("rodimus"), [[1, 2, 3]], 0)) == []


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ConfigError, match=r"Sampling\.seed"):
        Sampling(seed=seed)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_the_outermost_seeds(seed):
    assert len(list(stream(tiny("rodimus"), [[1]], 2, Sampling(seed=seed)))) == 2


def test_a_model_in_training_mode_generates_without_dropout(model):
    model = model.config.replace(dropout=0.5).build().double()
    prompt = drawn_prompt(9)
    new = greedy(model.train(), [prompt], 6)
    assert all(module.training for module in model.modules())
    assert new == greedy(model.eval(), [prompt], 6)


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"temperature": math.nan}, {"topk": 1}]
)
def test_bad_sampling_is_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Sampling(**values)


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])


def shares(sampling, draws=20_000, logits=None):
    logits_V = PROBABILITIES.log() if logits is None else logits
    drawn = sample(logits_V.expand(draws, -1), sampling, torch.Generator().manual_seed(1))
    return torch.bincount(drawn, minlength=len(logits_V)) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        (Sampling(temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        (Sampling(temperature=1e-300), [0, 1, 0, 0, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(top_k=100), PROBABILITIES),
        (Sampling(top_p=0.3), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.5), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(top_p=0.9), [0, 0.4 / 0.95, 0.1 / 0.95, 0.25 / 0.95, 0.2 / 0.95]),
        (Sampling(top_p=1.0), PROBABILITIES),
        (Sampling(top_k=3, top_p=0.7), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_cut_distribution(sampling, expected):
    expected = torch.as_tensor(expected)
    found = shares(sampling)
    assert found[expected == 0].sum() == 0
    assert (found - expected).abs().max() < 0.015  # Four standard deviations of 20,000 draws.


def test_top_k_among_equals_takes_no_more_than_k():
    assert (shares(Sampling(top_k=2), 1000, torch.zeros(6)) > 0).sum() == 2


def test_a_seed_draws_the_same_again():
    model = tiny("rodimus+")

    def draw(seed):
        return list(stream(model, [[3], [5, 8]], 15, Sampling(seed=seed, top_p=0.95)))

    assert draw(1) == draw(1) != draw(2)
    torch.manual_seed(0)
    free = [list(stream(model, [[3]], 15)) for _ in range(2)]
    assert free[0] != free[1]


def test_an_endless_stream_may_be_left():
    assert len(list(islice(stream(tiny("rodimus"), [[1]], 10**9, GREEDY), 5))) == 5


@pytest.fixture(scope="module")
def tokenizer():
    """So small that every character outside ASCII takes several tokens."""
    return Tokenizer("tiny", train_bpe(["plain words only"] * 3, 270))


@pytest.mark.parametrize("text", ["plain words", "déjà vu — 雨が降る", "☂️🧑‍🚀", "\n\n tabs\t", "é"])
def test_text_comes_in_whole_characters(tokenizer, text):
    prompt = tokenizer.encode("wörds ")
    tokens = tokenizer.encode(text)
    pieces = list(stream_text(tokenizer, prompt, tokens))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece and piece for piece in pieces)
    assert len(pieces) <= len(text)


def test_text_comes_as_soon_as_it_can(tokenizer):
    given = []

    def tokens():
        for token in tokenizer.encode("aé雨b"):
            given.append(token)
            yield token

    seen = {}
    for piece in stream_text(tokenizer, [], tokens()):
        seen[piece] = len(given)
    assert seen == {"a": 1, "é": 3, "雨": 6, "b": 7}


def test_text_cut_off_within_a_character(tokenizer):
    tokens = tokenizer.encode("ab雨")
    for missing in (1, 2):
        assert "".join(stream_text(tokenizer, [], tokens[:-missing])) == "ab"


def test_bytes_that_are_no_character_are_marked_once_something_follows(tokenizer):
    tokens = [*tokenizer.encode("a雨")[:-1], *tokenizer.encode("b")]
    assert "".join(stream_text(tokenizer, [], tokens)) == tokenizer.decode(tokens)


def test_text_ends_with_its_document(tokenizer):
    tokens = [*tokenizer.encode("ab"), tokenizer.eos_id, *tokenizer.encode("more")]
    assert "".join(stream_text(tokenizer, [], tokens)) == "ab"


def test_generate_from_the_command_line(cli, smoke_run):
    options = ["--prompt", "Return the naïve 雨", "--max-new-tokens", 25, "--seed", 3]
    first, again = (cli("generate", smoke_run.id, *options) for _ in range(2))
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("Return the naïve 雨")
    assert len(first.out) > len("Return the naïve 雨") + 20
    assert first.out.endswith("\n")
    assert first == again
    folder = find_model(smoke_run.id, smoke_run.root / "checkpoints")
    assert cli("generate", folder, *options) == first


def test_the_command_line_gives_all_of_the_text(cli, smoke_run, monkeypatch):
    """Every character in as many tokens as it has bytes."""
    from rodimus_lab import checkpoint_commands as module
    from rodimus_lab.data import load_tokenizer

    text = " — déjà vu: 雨☂️."
    tokenizer = load_tokenizer("pydoc-4096")
    tokens = [token for byte in text.encode() for token in byte_tokens(tokenizer)[byte]]
    monkeypatch.setattr(module, "stream", lambda *_, **__: iter([[token] for token in [*tokens, tokenizer.eos_id, 5]]))
    result = cli("generate", smoke_run.id, "--prompt", "It was")
    assert result.out == f"It was{text}\n"


def byte_tokens(tokenizer):
    """The token of every byte that is not a character by itself, and of every one that is."""
    alphabet = {}
    for token in range(tokenizer.vocab_size):
        name = tokenizer._backend.id_to_token(token)
        if len(name) == 1:
            alphabet[name] = token
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in names]
    names |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return {byte: [alphabet[name]] for byte, name in names.items()}


def test_the_command_line_ends_before_a_stop(cli, smoke_run, monkeypatch):
    from rodimus_lab import checkpoint_commands as module
    from rodimus_lab.data import load_tokenizer

    tokens = load_tokenizer("pydoc-4096").encode("one, two.\nthree")
    given = {}

    def fake(*_, **options):
        given.update(options)
        return iter([[token] for token in tokens])

    monkeypatch.setattr(module, "stream", fake)
    result = cli("generate", smoke_run.id, "--prompt", "It was ", "--stop", "\n", "--stop", "!")
    assert result.out == "It was one, two.\n"
    assert len(given["stop"]) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt", ""], "a prompt is empty"),
        (["--prompt", "a\udcffb"], "not valid UTF-8"),
        (["--prompt", "a", "--device", "tpu"], "--device"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--top-k", "0"], "--top-k"),
        (["--prompt", "a", "--top-p", "2"], "top_p"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "a", "--stop", "no single token"], "tokens of pydoc-4096, not one"),
        ([], "--prompt"),
    ],
)
def test_bad_options_of_generate(cli, smoke_run, options, named):
    result = cli("generate", smoke_run.id, *options)
    assert (result.code, result.out) == (2, "")
    assert named in result.err
    assert result.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_gpu(cli, smoke_run):
    result = cli("generate", smoke_run.id, "--prompt", "a", "--device", "cuda")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: no CUDA device is visible; install its driver or choose the device cpu\n"
