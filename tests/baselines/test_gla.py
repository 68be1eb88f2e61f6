"""GLA: its recurrence against flash-linear-attention's, its two counts, its gate."""

from __future__ import annotations

import pytest
import torch

from baselines import linear_attention
from baselines.gla import GLAConfig
from rodimus_lab.errors import UserError
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import model_config


@torch.no_grad()
def test_the_recurrence_is_flash_linear_attentions(fla_reference, recurrence):
    mixer, x = GLAConfig(rank=5).build(32), torch.randn(2, 130, 32)
    mixer.init_weights(Initializer(std=0.1))
    torch.nn.init.normal_(mixer.decay_proj.bias)
    call = recurrence(linear_attention, mixer, x)
    assert call.log_alpha.dtype == torch.float32
    logits = x @ mixer.in_proj.weight[-5:].T @ mixer.decay_proj.weight.T + mixer.decay_proj.bias
    torch.testing.assert_close(call.log_alpha.flatten(-2), logits.sigmoid().pow(1 / 16).log())
    want, _ = fla_reference("gla/naive.py", "naive_recurrent_gla")(call.q, call.k, call.v, call.log_alpha)
    torch.testing.assert_close(call.o, want, rtol=1e-5, atol=1e-5)


def test_the_counts():
    assert model_config("gla").num_params() == 46_265_600
    assert model_config("gla-table1").num_params() == 44_711_420


def test_the_state_is_table_4s():
    """256 x d where a quarter of the keys, which are half as wide as the model, is 256 wide."""
    assert GLAConfig().state_bytes(2048, 1, 99, torch.bfloat16) == 2 * 256 * 2048


@torch.no_grad()
def test_without_a_weight_the_head_norm_is_a_weight_of_ones():
    x = torch.randn(2, 9, 32)
    with_weight, without = (GLAConfig(norm_weight=flag).build(32) for flag in (True, False))
    with_weight.init_weights(Initializer())
    without.load_state_dict({n: p for n, p in with_weight.state_dict().items() if not n.startswith("norm.")})
    torch.testing.assert_close(without(x)[0], with_weight(x)[0])


@torch.no_grad()
def test_the_first_weights():
    mixer = GLAConfig().build(256)
    mixer.init_weights(Initializer(out_scale=0.5))
    for layer, std in (
        (mixer.in_proj, 0.02),
        (mixer.gate_proj, 0.02),
        (mixer.decay_proj, 0.02),
        (mixer.out_proj, 0.01),
    ):
        assert abs(layer.weight.std() / std - 1) < 0.03
    assert not mixer.decay_proj.bias.any()


def test_heads_without_a_width_are_refused():
    with pytest.raises(UserError, match="keys of width 0 and values of width 64 hold nothing"):
        GLAConfig(expand_k=0.01).build(64)
    with pytest.raises(UserError, match="keys of width 32 and values of width 0 hold nothing"):
        GLAConfig(expand_v=0.01).num_params(64)
