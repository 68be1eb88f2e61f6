"""lm-eval's requests over our models, against the slow and obvious computation: one text, one token at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rodimus_lab.data.tokenizers import Tokenizer, train_bpe
from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import model_config

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")

from evals.lmeval.adapter import RodimusLabLM

WORDS = "the cat sat on a mat, and then it ran; so the dog did not sit there for long.\n"
PAIRS = [
    ("the cat sat on", " a mat"),
    ("the cat sat on ", "a mat"),
    ("the cat", " sat on a mat, and then it ran"),
    ("the dog", " ran"),
    ("", "the dog did not sit"),
    (" ", "the dog"),
    ("the cat sat on a mat, and then it ran; so the dog did not sit", " there"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("tiny", train_bpe([WORDS] * 50, 300))


@pytest.fixture(scope="module", params=["rodimus+", "mamba", "transformer++"])
def model(request, tokenizer):
    torch.manual_seed(0)
    model = model_config(request.param, size="smoke", vocab_size=tokenizer.vocab_size + 3).build().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # Far from uniform, so that greedy tokens and log-likelihoods differ.
    return model


def adapter(model, tokenizer, **options):
    return RodimusLabLM(model, tokenizer, **options)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@torch.no_grad()
def next_logits(model, ids):
    logits_BTV, _ = model(torch.tensor([ids]))
    return logits_BTV[0, -1].double()


def slow_score(model, context, continuation):
    """log p of `continuation` after `context` and whether each token is the argmax, from one forward pass a token."""
    total, greedy = 0.0, True
    for position, token in enumerate(continuation):
        logits_V = next_logits(model, context + continuation[:position])
        total += logits_V.log_softmax(0)[token].item()
        greedy &= logits_V.argmax().item() == token
    return total, greedy


def slow_pair(tokenizer, context, continuation):
    """A trailing space of the context goes to the continuation, and an empty context is the end-of-document token."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole, start = tokenizer.encode(stripped + continuation), tokenizer.encode(stripped)
    return start or [tokenizer.eos_id], whole[len(start) :]


def test_loglikelihood(model, tokenizer):
    given = adapter(model, tokenizer).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (log_p, greedy), pair in zip(given, PAIRS, strict=True):
        slow, slow_greedy = slow_score(model, *slow_pair(tokenizer, *pair))
        assert log_p == pytest.approx(slow, abs=2e-4)
        assert greedy == slow_greedy


def test_greedy_continuations_are_told(model, tokenizer):
    """What the model itself goes on with is greedy, and with one token changed it is not."""
    context = tokenizer.encode("the cat")
    drawn = []
    for _ in range(3):
        drawn.append(next_logits(model, context + drawn).argmax().item())
    other = [*drawn[:-1], (drawn[-1] + 1) % tokenizer.vocab_size]
    answers = adapter(model, tokenizer)._loglikelihood_tokens([((), context, drawn), ((), context, other)], True)
    assert [greedy for _, greedy in answers] == [True, False]


def test_a_long_context_loses_its_first_tokens(model, tokenizer):
    ids = tokenizer.encode(WORDS)
    ((log_p, _),) = adapter(model, tokenizer, max_length=6)._loglikelihood_tokens([((), ids[:-2], ids[-2:])], True)
    assert log_p == pytest.approx(slow_score(model, ids[-7:-2], ids[-2:])[0], abs=2e-4)


def test_an_empty_continuation_is_certain(model, tokenizer):
    assert adapter(model, tokenizer)._loglikelihood_tokens([((), [1, 2], [])], True) == [(0.0, True)]


def test_rolling(model, tokenizer):
    texts = [WORDS, WORDS[:20], "the", ""]
    given = adapter(model, tokenizer).loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    slow = [slow_score(model, [tokenizer.eos_id], tokenizer.encode(text))[0] for text in texts]
    assert given == pytest.approx(slow, abs=1e-3)
    assert slow[-1] == 0.0


def test_rolling_in_windows(model, tokenizer):
    """Every token once, each window going on from one token of the window before it, the last one as full as may be."""
    ids, most = [tokenizer.eos_id, *tokenizer.encode(WORDS)], 8
    slow = 0.0
    for start in range(1, len(ids), most):
        predicted = ids[start : start + most]
        first = start + len(predicted) - most - 1 if start > 1 else 0
        context = ids[max(first, 0) : start]
        slow += slow_score(model, context[-(most - len(predicted) + 1) :], predicted)[0]
    (given,) = adapter(model, tokenizer, max_length=most).loglikelihood_rolling(requests((WORDS,)), disable_tqdm=True)
    assert given == pytest.approx(slow, abs=1e-3)


def slow_text(model, tokenizer, prompt, count, until):
    ids, drawn = tokenizer.encode(prompt), []
    for _ in range(count):
        token = next_logits(model, ids + drawn).argmax().item()
        if token == tokenizer.eos_id:
            break
        drawn.append(token)
    text = tokenizer.decode(drawn)
    return text[: min([place for stop in until if (place := text.find(stop)) >= 0], default=len(text))]


PROMPTS = ["the cat", "the dog", "the cat sat on a mat", "so the dog did not sit there", "a mat", "then it"]


def test_generate_until(model, tokenizer):
    free = slow_text(model, tokenizer, PROMPTS[0], 12, [])
    stop = free[len(free) // 2]
    asked = [(prompt, {"until": until, "max_gen_toks": 12}) for prompt in PROMPTS for until in ([], [stop, "\n"])]
    given = adapter(model, tokenizer).generate_until(requests(*asked), disable_tqdm=True)
    assert given == [slow_text(model, tokenizer, prompt, 12, how["until"]) for prompt, how in asked]
    assert given[0] == free
    assert len(given[1]) < len(free)


def test_generation_ends_with_the_document(model, tokenizer, monkeypatch):
    """The token that the model goes on with is declared to be the end of the document."""
    token = next_logits(model, tokenizer.encode("the cat")).argmax().item()
    monkeypatch.setattr(tokenizer, "eos_id", token)
    assert adapter(model, tokenizer).generate_until(requests(("the cat", {"max_gen_toks": 5})), disable_tqdm=True) == [
        ""
    ]


def test_a_score_does_not_depend_on_the_batch_size(model, tokenizer):
    pairs = PAIRS * 3
    texts = [(WORDS[: 5 * number],) for number in range(1, 9)] * 2
    asked = [(prompt, {"until": ["\n"], "max_gen_toks": 6}) for prompt in PROMPTS * 2]
    results = []
    for batch_size in (1, 2, 5, 64):
        lm = adapter(model, tokenizer, batch_size=batch_size)
        scores = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
        rolling = lm.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
        results.append(
            ([p for p, _ in scores] + rolling, [g for _, g in scores], lm.generate_until(requests(*asked), True))
        )
    for values, greedy, generated in results[1:]:
        assert values == pytest.approx(results[0][0], abs=2e-4)
        assert greedy == results[0][1]
        assert generated == results[0][2]


def test_no_batch_is_padded(model, tokenizer, monkeypatch):
    """Every forward pass holds rows of one length, none of them longer than its request."""
    shapes = []
    hidden = type(model).hidden

    def watched(self, ids_BT, state=None, segments=None):
        assert segments is None
        shapes.append(tuple(ids_BT.shape))
        return hidden(self, ids_BT, state, segments)

    monkeypatch.setattr(type(model), "hidden", watched)
    lm = adapter(model, tokenizer)
    lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    pairs = [slow_pair(tokenizer, *pair) for pair in PAIRS]
    assert sum(rows * length for rows, length in shapes) == sum(len(c) + len(d) - 1 for c, d in pairs)
    shapes.clear()
    lm.generate_until(requests(*((prompt, {"max_gen_toks": 2}) for prompt in PROMPTS)), disable_tqdm=True)
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert sum(rows * length for rows, length in prefills) == sum(len(tokenizer.encode(p)) for p in PROMPTS)


def test_learned_positions_bound_the_length(tokenizer):
    config = model_config("rodimus", size="smoke", vocab_size=tokenizer.vocab_size).replace(max_positions=24)
    assert adapter(config.build(), tokenizer).max_length == 24


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"dtype": "float8"}, ["'float8'", "float32 or bfloat16"]),
        ({"batch_size": "many"}, ["'many'", "from 1 up"]),
        ({"batch_size": 0}, ["0", "from 1 up"]),
        ({"tokenizer": None}, ["its tokenizer"]),
    ],
)
def test_bad_options(model, tokenizer, options, names):
    with pytest.raises(UserError) as error:
        RodimusLabLM(model, **({"tokenizer": tokenizer} | options))
    assert all(name in str(error.value) for name in names)


def test_bad_requests(model, tokenizer):
    lm = adapter(model, tokenizer, max_length=4)
    with pytest.raises(UserError, match="a continuation of 5 tokens does not fit max_length 4"):
        lm._loglikelihood_tokens([((), [1], [1, 2, 3, 4, 5])], True)
    with pytest.raises(UserError, match="4 new tokens leave no room in max_length 4"):
        lm.generate_until(requests(("the", {"max_gen_toks": 4})), disable_tqdm=True)
    with pytest.raises(UserError, match="generation takes no num_beams"):
        lm.generate_until(requests(("the", {"num_beams": 4})), disable_tqdm=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_diverged(tokenizer, value):
    model = model_config("rodimus", size="smoke", vocab_size=tokenizer.vocab_size).build()
    with torch.no_grad():
        model.embedding.weight.fill_(value)
    lm = adapter(model, tokenizer)
    with pytest.raises(UserError, match="the model gives log-likelihoods that are not finite"):
        lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    with pytest.raises(UserError, match="the model gives log-likelihoods that are not finite"):
        lm.loglikelihood_rolling(requests((WORDS,)), disable_tqdm=True)


def test_lm_evals_options_give_way_to_model_args(monkeypatch):
    """What `create_from_arg_*` hands on, in both of lm-eval's forms."""
    seen = []
    monkeypatch.setattr(RodimusLabLM, "__init__", lambda self, **given: seen.append(given))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    RodimusLabLM.create_from_arg_string("pretrained=a", options)
    RodimusLabLM.create_from_arg_obj({"pretrained": "a", "batch_size": 4, "device": "cuda"}, options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    RodimusLabLM.create_from_arg_string("pretrained=a,max_length=9", options)
    assert seen == [
        {"pretrained": "a", "batch_size": 1, "device": "cpu"},
        {"pretrained": "a", "batch_size": 4, "device": "cuda"},
        {"pretrained": "a", "batch_size": 1, "device": "cuda:0", "max_length": 9},
    ]
