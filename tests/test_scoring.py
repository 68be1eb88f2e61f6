import math

import pytest
import torch

from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.model import IGNORE, LanguageModelConfig
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.triton_facts import dot_precision
from rodimus_lab.scoring import perplexity, set_matmul_precision, summarize, token_log_likelihoods
from rodimus_lab.train.throughput import peak_flops


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    block = BlockConfig(hops=((AttentionConfig(heads=HeadSharing.of("mha", 2)),),))
    return LanguageModelConfig(vocab_size=32, d_model=16, pattern=(block,), repeats=2, dropout=0.5).build()


@pytest.mark.parametrize(("precision", "ours"), [("fp32", "tf32x3"), ("tf32", "tf32"), ("bf16", "tf32")])
def test_a_precision_holds_for_torchs_products_and_the_kernels(precision, ours):
    before = torch.get_float32_matmul_precision()
    try:
        for other in ("fp32", "tf32"):  # Whatever an earlier run of the process had.
            set_matmul_precision(torch.device("cuda"), other)
            set_matmul_precision(torch.device("cuda"), precision)
            assert torch.get_float32_matmul_precision() == ("highest" if precision == "fp32" else "high")
            assert (dot_precision(torch.float32), dot_precision(torch.bfloat16)) == (ours, "tf32")
            set_matmul_precision(torch.device("cpu"), "fp32")
            assert dot_precision(torch.float32) == ours
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_peak_is_that_of_the_precision():
    found = [peak_flops("NVIDIA H200", precision) for precision in ("bf16", "tf32", "fp32")]
    assert found == [989e12, 494.5e12, None]
    assert peak_flops("a laptop's", "bf16") is None


def by_hand(model, ids):
    """log p of every token but the first, from the logits of one row."""
    was = model.training
    model.eval()
    with torch.no_grad():
        log_p = model(ids[None])[0][0].double().log_softmax(-1)
    model.train(was)
    return log_p[:-1].gather(-1, ids[1:, None])[:, 0]


def test_token_log_likelihoods(model):
    ids = torch.randint(32, (3, 9))
    model.train()
    log_p = token_log_likelihoods(model, ids)
    assert model.training
    assert not log_p.requires_grad
    assert torch.equal(log_p[:, 0], torch.zeros(3))
    for row in range(3):
        torch.testing.assert_close(log_p[row, 1:].double(), by_hand(model, ids[row]), rtol=1e-5, atol=1e-6)


def test_padding_and_neighbours_do_not_change_a_score(model):
    first, second = torch.randint(32, (5,)), torch.randint(32, (7,))
    padded = torch.cat([torch.zeros(7, dtype=torch.long), first])
    packed = torch.cat([first, second])
    segments = Segments(torch.tensor([[-1] * 7 + [0] * 5, [0] * 5 + [1] * 7]))
    log_p = token_log_likelihoods(model, torch.stack([padded, packed]), segments)
    expected = torch.zeros(2, 12, dtype=torch.float64)
    expected[0, 8:] = by_hand(model, first)
    expected[1, 1:5] = by_hand(model, first)
    expected[1, 6:] = by_hand(model, second)
    torch.testing.assert_close(log_p.double(), expected, rtol=1e-5, atol=1e-6)


def test_perplexity_is_that_of_the_counted_tokens(model):
    ids = torch.randint(32, (5, 9))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[4, 3:] = IGNORE
    batches = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    score = perplexity(model, batches, words=11)
    nll = -sum(float(by_hand(model, row).sum()) for row in ids[:4]) - float(by_hand(model, ids[4])[:3].sum())
    assert score["tokens"] == 4 * 8 + 3
    assert score["nll"] == pytest.approx(nll, rel=1e-6)
    assert score["ppl"] == pytest.approx(math.exp(nll / 35), rel=1e-6)
    assert score["word_ppl"] == pytest.approx(math.exp(nll / 11), rel=1e-6)
    assert "word_ppl" not in perplexity(model, batches)


def test_a_perplexity_past_all_numbers_is_infinite():
    assert summarize(1e6, 10)["ppl"] == math.inf


def test_nothing_to_score():
    with pytest.raises(ValueError, match="no token was counted"):
        summarize(0.0, 0)
