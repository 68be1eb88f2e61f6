"""RWKV-4: its first weights, and the logits of transformers' RWKV."""

from __future__ import annotations

import math

import pytest
import torch

from baselines.rwkv4 import RWKV4, RWKV4ChannelConfig, RWKV4Config
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import model_config


def test_first_weights_are_the_authors() -> None:
    d, layers = 96, 6
    for layer in (0, 3, 5):
        mixer = RWKV4Config(layer=layer, layers=layers).build(d)
        channel = RWKV4ChannelConfig(layer=layer, layers=layers).build(d)
        for module in (mixer, channel):
            module.init_weights(Initializer())
        for h in (0, 1, 50, 95):
            ratio, fading = layer / 5, 1 - layer / 6
            assert mixer.decay[h].item() == pytest.approx(-5 + 8 * (h / 95) ** (0.7 + 1.3 * ratio), abs=1e-5)
            assert mixer.bonus[h].item() == pytest.approx(math.log(0.3) + (-0.5, 0.0, 0.5)[(h + 1) % 3])
            assert mixer.mix_k[h].item() == pytest.approx((h / 96) ** fading)
            assert mixer.mix_v[h].item() == pytest.approx((h / 96) ** fading + 0.3 * ratio)
            assert mixer.mix_r[h].item() == pytest.approx((h / 96) ** (fading / 2))
            assert channel.mix_k[h].item() == channel.mix_r[h].item() == mixer.mix_k[h].item()
        torch.testing.assert_close(mixer.value.weight @ mixer.value.weight.T, torch.eye(d))
        torch.testing.assert_close(channel.key.weight.T @ channel.key.weight, 4 * torch.eye(d))
        for linear in (mixer.key, mixer.receptance, mixer.output, channel.receptance, channel.value):
            assert not linear.weight.any()


def test_plain_first_weights() -> None:
    mixer = RWKV4Config(init="plain").build(128)
    mixer.init_weights(Initializer(out_scale=0.5))
    for linear, std in ((mixer.key, 0.02), (mixer.receptance, 0.02), (mixer.output, 0.01)):
        assert abs(linear.weight.std().item() / std - 1) < 0.05


@torch.no_grad()
def test_logits_are_those_of_transformers() -> None:
    """It normalises embeddings once more, which is folded into ours."""
    transformers = pytest.importorskip("transformers")
    d, vocab = 48, 61
    theirs = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(
            vocab_size=vocab,
            hidden_size=d,
            attention_hidden_size=d,
            num_hidden_layers=2,
            context_length=64,
            rescale_every=0,
            tie_word_embeddings=False,
        )
    ).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = model_config("rwkv4", size="smoke", vocab_size=vocab, d_model=d, tie_embeddings=False).build().eval()
    ours.embedding.weight.copy_(theirs.rwkv.blocks[0].pre_ln(theirs.rwkv.embeddings.weight))
    assert ours.head is not None
    ours.head.weight.copy_(theirs.head.weight)
    ours.final_norm.load_state_dict(theirs.rwkv.ln_out.state_dict())
    for block, layer in zip(ours.blocks, theirs.rwkv.blocks, strict=True):
        block.norms[0].load_state_dict(layer.ln1.state_dict())
        block.norms[1].load_state_dict(layer.ln2.state_dict())
        for mixer, source in ((block.mixers[0], layer.attention), (block.mixers[1], layer.feed_forward)):
            for name in ("key", "value", "receptance", "output"):
                if hasattr(source, name):
                    getattr(mixer, name).weight.copy_(getattr(source, name).weight)
            mixer.mix_k.copy_(source.time_mix_key.flatten())
            mixer.mix_r.copy_(source.time_mix_receptance.flatten())
            if isinstance(mixer, RWKV4):
                mixer.mix_v.copy_(source.time_mix_value.flatten())
                mixer.decay.copy_(source.time_decay)
                mixer.bonus.copy_(source.time_first)
    ids = torch.randint(0, vocab, (2, 37))
    want = theirs(ids).logits
    assert want.std() > 0.1
    torch.testing.assert_close(ours(ids)[0], want, rtol=0, atol=1e-4)
