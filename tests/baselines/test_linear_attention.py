"""Linear attention: its count and state, and its recurrence against flash-linear-attention's."""

from __future__ import annotations

import pytest
import torch

from baselines import linear_attention
from baselines.linear_attention import LinearAttentionConfig
from rodimus_lab.errors import UserError
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import model_config


@pytest.mark.parametrize("feature_map", ["elu", "relu", "identity"])
@torch.no_grad()
def test_the_recurrence_is_flash_linear_attentions(fla_reference, recurrence, feature_map):
    mixer = LinearAttentionConfig(head_width=16, feature_map=feature_map).build(32)
    mixer.init_weights(Initializer(std=0.1))
    call = recurrence(linear_attention, mixer, torch.randn(2, 70, 32))
    want, _ = fla_reference("linear_attn/naive.py", "naive_recurrent_linear_attn")(call.q, call.k, call.v)
    torch.testing.assert_close(call.o, want, rtol=1e-5, atol=1e-5)
    if feature_map != "identity":
        assert call.q.min() >= 0
        assert call.k.min() >= 0


def test_the_state_is_table_4s():
    for d_model in (256, 512, 2048):
        assert LinearAttentionConfig().state_bytes(d_model, 1, 99, torch.bfloat16) == 2 * 256 * d_model


def test_a_layer_is_as_large_as_attentions():
    ours, attentions = (model_config(name, size="125m").num_params() for name in ("linear_attention", "transformer++"))
    assert ours - attentions == 12 * 256  # the head norms


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="3 heads do not divide keys of width 100"):
        LinearAttentionConfig(head_width=32).build(100)
