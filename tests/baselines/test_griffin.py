"""Hawk and Griffin: how they are built, their first weights, and RecurrentGemma's logits with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from baselines.hawk import Hawk, HawkConfig, _BoundedRoot
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import SIZES, build_model, model_config
from rodimus_lab.train.optimizer import decay_groups

GROUP = ["hawk", "hawk", "attention"]


@pytest.mark.parametrize(
    ("size", "kinds"),
    [("wikitext103", GROUP * 2), ("350m", GROUP * 8), ("smoke", GROUP[1:]), ("mqar", GROUP[1:])],
)
def test_two_recurrent_blocks_before_each_of_attention(size: str, kinds: list[str]) -> None:
    config = model_config("griffin", size=size)
    assert [block.sublayers[0].kind for block in config.blocks] == kinds
    assert all(block.sublayers[1].kind == "gated_gelu" for block in config.blocks)


def test_a_number_of_layers_that_three_does_not_divide() -> None:
    config = model_config("griffin", size=SIZES["smoke"]._replace(num_layers=5))
    assert [block.sublayers[0].kind for block in config.blocks] == GROUP[1:] + GROUP


def test_first_weights_are_the_authors() -> None:
    """As google-deepmind/recurrentgemma draws them: variances, the ring of decays."""
    mixer = HawkConfig(gate_blocks=4).build(384)
    blocks = 10
    mixer.init_weights(Initializer(out_scale=(2 * blocks) ** -0.5))
    m = 512
    assert mixer.out_proj.weight.shape == (384, m)
    for weight, variance in (
        (mixer.in_proj.weight, 1 / 384),
        (mixer.out_proj.weight, 2 / blocks / m),
        (mixer.conv_weight, 0.01 / 4),
        (mixer.gate_weight, 1 / (m // 4)),
    ):
        assert abs(weight.var().item() / variance - 1) < 0.1
    decay = torch.exp(-F.softplus(mixer.decay))
    assert 0.9 <= decay.min() < 0.91
    assert 0.99 < decay.max() <= 0.9991
    assert abs(decay.square().mean().item() - (0.9**2 + 0.999**2) / 2) < 0.01
    for bias in (mixer.in_proj.bias, mixer.out_proj.bias, mixer.conv_bias, mixer.gate_bias):
        assert not bias.any()


def test_what_is_not_decayed() -> None:
    spared = decay_groups(build_model("hawk", size="mqar")).no_decay
    assert {f"blocks.0.mixers.0.{name}" for name in ("decay", "gate_bias", "conv_bias")} <= set(spared)


def test_the_root_has_a_bounded_derivative() -> None:
    x = torch.tensor([0.0, 1e-12, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    y = _BoundedRoot.apply(x)
    torch.testing.assert_close(y, x.sqrt())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([1000, 1000, 1, 0.5], dtype=torch.float64))


def copy_hawk(ours: Hawk, theirs: Any) -> None:
    ours.in_proj.weight.copy_(torch.cat([theirs.linear_x.weight, theirs.linear_y.weight]))
    ours.in_proj.bias.copy_(torch.cat([theirs.linear_x.bias, theirs.linear_y.bias]))
    ours.conv_weight.copy_(theirs.conv_1d.weight.squeeze(1))
    ours.conv_bias.copy_(theirs.conv_1d.bias)
    unit = theirs.rg_lru
    ours.gate_weight.copy_(torch.cat([unit.recurrent_gate_weight, unit.input_gate_weight], dim=-1))
    ours.gate_bias.copy_(torch.cat([unit.recurrent_gate_bias, unit.input_gate_bias], dim=-1))
    ours.decay.copy_(unit.recurrent_param)
    ours.out_proj.weight.copy_(theirs.linear_out.weight)
    ours.out_proj.bias.copy_(theirs.linear_out.bias)


@torch.no_grad()
def test_logits_are_those_of_recurrent_gemma() -> None:
    """It scales embeddings, caps logits, counts norms from 1, turns half of a head and has a bias after attention,
    which Griffin's paper does not say; all of that is taken out or folded into the weights."""
    transformers = pytest.importorskip("transformers")
    d, heads, window, vocab = 48, 4, 6, 61
    theirs_config = transformers.RecurrentGemmaConfig(
        vocab_size=vocab,
        hidden_size=d,
        lru_width=64,
        intermediate_size=6 * d,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=d // heads,
        attention_window_size=window,
        sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        attn_implementation="eager",
        pad_token_id=None,
    )
    theirs = transformers.RecurrentGemmaForCausalLM(theirs_config).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    config = model_config(
        "griffin",
        size="wikitext103",
        vocab_size=vocab,
        d_model=d,
        repeats=1,
        tie_embeddings=False,
        attention={"heads": {"num_heads": heads, "num_key_heads": 1, "num_value_heads": 1}, "window": window},
        hawk={"gate_blocks": heads},
    )
    config = config.replace(pattern=tuple(block.replace(norm_eps=1e-6) for block in config.pattern))
    ours = config.build().eval()
    ours.embedding.weight.copy_(theirs.model.embed_tokens.weight * theirs.model.normalizer.float())
    assert ours.head is not None
    ours.head.weight.copy_(theirs.lm_head.weight)
    ours.final_norm.weight.copy_(1 + theirs.model.final_norm.weight)
    for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        block.norms[0].weight.copy_(1 + layer.temporal_pre_norm.weight)
        block.norms[1].weight.copy_(1 + layer.channel_pre_norm.weight)
        mixer, mlp, source = block.mixers[0], block.mixers[1], layer.mlp_block
        if isinstance(mixer, Hawk):
            copy_hawk(mixer, layer.temporal_block)
        else:
            attention = layer.temporal_block
            attention.o_proj.bias.zero_()
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            mixer.qkv_proj.weight.copy_(torch.cat([projection.weight for projection in projections]))
            mixer.out_proj.weight.copy_(attention.o_proj.weight)
        mlp.in_proj.weight.copy_(torch.cat([source.gate_proj.weight, source.up_proj.weight]))
        mlp.in_proj.bias.copy_(torch.cat([source.gate_proj.bias, source.up_proj.bias]))
        mlp.out_proj.weight.copy_(source.down_proj.weight)
        mlp.out_proj.bias.copy_(source.down_proj.bias)
    ids = torch.randint(0, vocab, (2, 21))
    want = theirs(ids, use_cache=False).logits
    cap = theirs_config.logits_soft_cap
    assert want.std() > 0.1
    torch.testing.assert_close(cap * torch.tanh(ours(ids)[0] / cap), want, rtol=0, atol=1e-4)


def test_the_bounded_root_has_a_second_derivative():
    x = torch.tensor([0.3, 1.0, 1e-8], dtype=torch.float64, requires_grad=True)
    (once,) = torch.autograd.grad(_BoundedRoot.apply(x).sum(), x, create_graph=True)
    torch.testing.assert_close(once, torch.tensor([0.5 / 0.3**0.5, 0.5, 1000.0], dtype=torch.float64))
    (twice,) = torch.autograd.grad(once.sum(), x)
    torch.testing.assert_close(twice, torch.tensor([-0.25 / 0.3**1.5, -0.25, 0.0], dtype=torch.float64))
