"""Mamba: its count, its first weights, and the logits of transformers' Mamba with the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from baselines.mamba import Mamba, MambaConfig
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import build_model, model_config
from rodimus_lab.train.optimizer import decay_groups


def test_table_1s_count() -> None:
    assert model_config("mamba", size="wikitext103").num_params() == 46_078_976


def drawn(**fields: str) -> Mamba:
    mixer = MambaConfig(**fields).build(256)
    mixer.init_weights(Initializer(std=0.02, out_scale=0.25))
    return mixer


def test_first_weights_are_the_authors() -> None:
    mixer = drawn()
    steps = F.softplus(mixer.dt_proj.bias)
    assert 0.001 <= steps.min() < 0.0015
    assert 0.07 < steps.max() <= 0.1001
    assert abs(steps.log().mean().item() - torch.tensor([0.001, 0.1]).log().mean().item()) < 0.25
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert (mixer.D == 1).all()
    assert mixer.dt_proj.weight.abs().max() <= 16**-0.5
    # Uniform within fan_in^-1/2, as torch draws a linear layer; the way out a quarter of that here.
    for weight, bound in (
        (mixer.in_proj.weight, 256**-0.5),
        (mixer.x_proj.weight, 512**-0.5),
        (mixer.out_proj.weight, 0.25 * 512**-0.5),
        (mixer.conv_weight, 0.5),
        (mixer.conv_bias, 0.5),
    ):
        assert 0.98 * bound < weight.abs().max() <= bound
        assert abs(weight.std().item() / (bound / 3**0.5) - 1) < 0.1


def test_first_weights_of_flash_linear_attention() -> None:
    mixer = drawn(init="fla")
    for weight, std in ((mixer.in_proj.weight, 0.02), (mixer.x_proj.weight, 0.02), (mixer.out_proj.weight, 0.005)):
        assert abs(weight.std().item() / std - 1) < 0.05
    assert mixer.dt_proj.weight.abs().max() > 0.24


def test_what_is_not_decayed() -> None:
    spared = decay_groups(build_model("mamba", size="mqar")).no_decay
    for name in ("A_log", "D", "dt_proj.bias", "conv_bias"):
        assert f"blocks.0.mixers.0.{name}" in spared
    assert "blocks.0.mixers.0.conv_weight" not in spared


@torch.no_grad()
def test_logits_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs_config = transformers.MambaConfig(
        vocab_size=61, hidden_size=48, num_hidden_layers=3, tie_word_embeddings=True, use_cache=False
    )
    theirs = transformers.MambaForCausalLM(theirs_config).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = model_config("mamba", size="mqar", vocab_size=61, d_model=48, repeats=3).build().eval()
    ours.embedding.weight.copy_(theirs.backbone.embeddings.weight)
    ours.final_norm.weight.copy_(theirs.backbone.norm_f.weight)
    for block, layer in zip(ours.blocks, theirs.backbone.layers, strict=True):
        mixer, norm, source = block.mixers[0], block.norms[0], dict(layer.mixer.named_parameters())
        norm.weight.copy_(layer.norm.weight)
        mixer.conv_weight.copy_(source.pop("conv1d.weight").squeeze(1))
        mixer.conv_bias.copy_(source.pop("conv1d.bias"))
        for name, weight in source.items():
            mixer.get_parameter(name).copy_(weight)
    ids = torch.randint(0, 61, (2, 37))
    want = theirs(ids).logits
    assert want.std() > 0.1
    torch.testing.assert_close(ours(ids)[0], want, rtol=0, atol=1e-4)
    state, steps = ours.init_state(2), []
    for t in range(37):
        logits, state = ours(ids[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), want, rtol=0, atol=1e-4)
