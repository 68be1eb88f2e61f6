"""RetNet and gated RetNet against flash-linear-attention's references; positions; the authors' first weights."""

from __future__ import annotations

import pytest
import torch

from baselines import retnet
from baselines.retnet import RetentionConfig
from rodimus_lab.config import ConfigError
from rodimus_lab.nn.mixer import Initializer

SMALL = RetentionConfig(head_width=16)


def built(config: RetentionConfig, d_model: int = 32) -> torch.nn.Module:
    mixer = config.build(d_model)
    mixer.init_weights(Initializer())
    return mixer


@torch.no_grad()
def test_retention_is_flash_linear_attentions(fla_reference, recurrence):
    call = recurrence(retnet, built(SMALL, 64), torch.randn(2, 130, 64))
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    want = fla_reference("retention/naive.py", "naive_retention")(q, k, v).transpose(1, 2)
    torch.testing.assert_close(call.o, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gated_retention_is_flash_linear_attentions(fla_reference, recurrence):
    mixer, x = built(SMALL.replace(decay="gated", expand_v=2)), torch.randn(2, 130, 32)
    call = recurrence(retnet, mixer, x)
    logits = x @ mixer.decay_proj.weight.T
    torch.testing.assert_close(call.log_alpha.squeeze(-1), logits.sigmoid().pow(1 / 16).log())
    naive = fla_reference("simple_gla/naive.py", "naive_recurrent_simple_gla")
    want, _ = naive(call.q, call.k, call.v, call.log_alpha.squeeze(-1))
    torch.testing.assert_close(call.o, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_scores_depend_on_distances_only(recurrence):
    """The rotation of a query against a key is that of the tokens between them, also in a continued document."""
    mixer, x = built(SMALL), torch.randn(1, 1, 32).expand(1, 6, 32)
    call = recurrence(retnet, mixer, x)
    scores = torch.einsum("thk,shk->hts", call.q[0], call.k[0])
    torch.testing.assert_close(scores[:, 1:, 1:], scores[:, :-1, :-1])
    assert (scores[:, 1, 0] - scores[:, 0, 0]).abs().min() > 0


@pytest.mark.parametrize("decay", ["constant", "gated"])
def test_the_state_is_table_4s(decay):
    config = RetentionConfig(decay=decay)
    assert [config.state_bytes(d, 1, 99, torch.bfloat16) - 8 for d in (256, 2048)] == [2 * 256 * 256, 2 * 256 * 2048]


@torch.no_grad()
def test_the_first_weights():
    """The authors' are uniform, within gain * sqrt(6 / (rows + columns)) of each matrix by itself."""
    for decay, out_gain in (("constant", 1.0), ("gated", 0.5)):
        mixer = built(RetentionConfig(decay=decay, expand_v=2), 256)
        bounds = {"q": (6 / 512) ** 0.5 * 2**-2.5, "v": (6 / 768) ** 0.5 * 2**-2.5, "out": (6 / 768) ** 0.5 * out_gain}
        q, _, v, _ = mixer.qkvg_proj.weight.split(mixer.widths)
        for name, rows in {"q": q, "v": v, "out": mixer.out_proj.weight}.items():
            assert rows.abs().max() == pytest.approx(bounds[name], rel=1e-3)
            assert rows.std() == pytest.approx(bounds[name] / 3**0.5, rel=0.02)
    normal = built(RetentionConfig(init="fla"), 256)
    for layer in (normal.qkvg_proj, normal.out_proj):
        assert layer.weight.std() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(("head_width", "d_model", "width"), [(5, 15, 5), (256, 65, 65), (1, 4, 1)])
def test_keys_that_cannot_turn_are_refused(head_width, d_model, width):
    config = RetentionConfig(head_width=head_width)
    for ask in (config.build, config.shape):
        with pytest.raises(ConfigError, match=f"keys of an even width, not {width}; give another head_width"):
            ask(d_model)
