"""Mamba2: its definition in float64, its count, its first weights, and the logits of transformers' Mamba2."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.mamba2 import Mamba2, Mamba2Config
from rodimus_lab import accounting
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import SIZES, build_model, model_config
from rodimus_lab.train.optimizer import decay_groups

SMALL = Mamba2Config(state=5, head_width=8)


def drawn(config: Mamba2Config = Mamba2Config(), d_model: int = 256) -> Mamba2:  # noqa: B008
    mixer = config.build(d_model)
    mixer.init_weights(Initializer(std=0.02, out_scale=0.25))
    return mixer


def by_hand(mixer: Mamba2, u_TD: Tensor) -> Tensor:
    """y_TD of one sequence: token by token, head by head, as the formulas say."""
    config = mixer.config
    n, p, heads = config.state, config.head_width, mixer.A_log.numel()
    m, w = heads * p, config.conv_width
    z, xbc, dt = (u_TD @ mixer.in_proj.weight.T).split([m, m + 2 * n, heads], dim=-1)
    steps, A = torch.log1p((dt + mixer.dt_bias).exp()), -mixer.A_log.exp()
    S, outputs = u_TD.new_zeros(heads, n, p), []
    for t in range(len(u_TD)):
        taps = sum(mixer.conv_weight[:, w - 1 - j] * xbc[t - j] for j in range(min(w, t + 1))) + mixer.conv_bias
        x, B, C = (taps * taps.sigmoid()).split([m, n, n])
        o = []
        for h in range(heads):
            x_h = x[h * p : (h + 1) * p]
            S[h] = (steps[t, h] * A[h]).exp() * S[h] + torch.outer(B, steps[t, h] * x_h)
            o.append(C @ S[h] + mixer.D[h] * x_h)
        gated = torch.cat(o) * z[t] * z[t].sigmoid()
        normed = gated / (gated.square().mean() + config.norm_eps).sqrt() * mixer.norm.weight
        outputs.append(mixer.out_proj.weight @ normed)
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("length", [70, 140])  # by either form of the duality
def test_it_is_its_definition(length: int) -> None:
    mixer = drawn(SMALL, 12).double()
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    u = torch.randn(2, length, 12, dtype=torch.float64)
    want = torch.stack([by_hand(mixer, row) for row in u])
    torch.testing.assert_close(mixer(u)[0], want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixer.float()(u.float())[0], want.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_it_takes_the_path_of_one_gate_a_head(recurrence) -> None:
    """With the queries and keys that all heads share taken once, and no scale."""
    call = recurrence(importlib.import_module("rodimus_lab.ops.ssd"), drawn(), torch.randn(1, 129, 256))
    assert call.log_alpha.shape == (1, 129, 8, 1)
    assert call.q.stride(2) == call.k.stride(2) == 0
    assert call.log_alpha.dtype == torch.float32
    assert call.scale == 1.0


def test_the_counts() -> None:
    """Table 1's, and those of the shape that Tables 19 and 20 are computed with."""
    assert model_config("mamba2", size="wikitext103").num_params() == 46_377_536
    for size in SIZES.values():
        ours, counted = model_config("mamba2", size=size), accounting.Mamba2.of(size)
        assert ours.num_params() == counted.num_params()
        assert ours.flops_per_token(99) == counted.flops_per_token(99)
        assert accounting.real_memory(ours, 3, 99).remembered == counted.memory(3).remembered


def test_the_state_is_table_4s() -> None:
    """128 x 2d, beside the inputs of the convolution."""
    conv = 3 * (2 * 2048 + 2 * 128)
    assert Mamba2Config().state_bytes(2048, 1, 99, torch.bfloat16) == 2 * (128 * 2 * 2048 + conv)


def test_first_weights_are_the_authors() -> None:
    mixer = drawn()
    # Uniform within fan_in^-1/2, as torch draws a linear layer; the way out a quarter of that here.
    for weight, bound in (
        (mixer.in_proj.weight, 256**-0.5),
        (mixer.out_proj.weight, 0.25 * 512**-0.5),
        (mixer.conv_weight, 0.5),
        (mixer.conv_bias, 0.5),
    ):
        assert 0.98 * bound < weight.abs().max() <= bound
        assert abs(weight.std().item() / (bound / 3**0.5) - 1) < 0.1
    assert (mixer.D == 1).all()
    assert (mixer.norm.weight == 1).all()
    many = drawn(Mamba2Config(head_width=1), 1024)
    steps, A = F.softplus(many.dt_bias), many.A_log.exp()
    assert 0.001 <= steps.min() < 0.0011
    assert 0.09 < steps.max() <= 0.1001
    assert abs(steps.log().mean().item() - torch.tensor([0.001, 0.1]).log().mean().item()) < 0.1
    assert 1 <= A.min() < 1.1
    assert 15.9 < A.max() <= 16.0001
    assert abs(A.mean().item() - 8.5) < 0.3


def test_first_weights_of_flash_linear_attention() -> None:
    mixer = drawn(Mamba2Config(init="fla"))
    for weight in (mixer.in_proj.weight, mixer.conv_weight):
        assert abs(weight.std().item() / 0.02 - 1) < 0.05
    assert not mixer.conv_bias.any()
    bound = 0.25 * 512**-0.5
    assert 0.98 * bound < mixer.out_proj.weight.abs().max() <= bound


def test_the_way_out_is_divided_by_the_root_of_the_number_of_blocks() -> None:
    model = build_model("mamba2", size="smoke", vocab_size=50)
    assert len(model.blocks) == 4
    largest = max(block.mixers[0].out_proj.weight.abs().max().item() for block in model.blocks)
    assert largest == pytest.approx(256**-0.5 / 2, rel=1e-3)


def test_what_is_not_decayed() -> None:
    spared = decay_groups(build_model("mamba2", size="mqar")).no_decay
    for name in ("A_log", "D", "dt_bias", "conv_bias", "norm.weight"):
        assert f"blocks.0.mixers.0.{name}" in spared
    assert "blocks.0.mixers.0.conv_weight" not in spared


@torch.no_grad()
def test_logits_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs_config = transformers.Mamba2Config(
        vocab_size=61, hidden_size=64, num_hidden_layers=3, num_heads=2, n_groups=1, chunk_size=16, use_cache=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.Mamba2ForCausalLM(theirs_config).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = model_config("mamba2", size="mqar", vocab_size=61, repeats=3).build().eval()
    ours.embedding.weight.copy_(theirs.backbone.embeddings.weight)
    ours.final_norm.weight.copy_(theirs.backbone.norm_f.weight)
    for block, layer in zip(ours.blocks, theirs.backbone.layers, strict=True):
        mixer, norm, source = block.mixers[0], block.norms[0], dict(layer.mixer.named_parameters())
        norm.weight.copy_(layer.norm.weight)
        mixer.conv_weight.copy_(source.pop("conv1d.weight").squeeze(1))
        mixer.conv_bias.copy_(source.pop("conv1d.bias"))
        assert source.keys() == {name for name, _ in mixer.named_parameters()} - {"conv_weight", "conv_bias"}
        for name, weight in source.items():
            mixer.get_parameter(name).copy_(weight)
    ids = torch.randint(0, 61, (2, 37))
    want = theirs(ids).logits
    assert want.std() > 0.1
    torch.testing.assert_close(ours(ids)[0], want, rtol=0, atol=1e-4)
    logits, state = ours(ids[:, :20], ours.init_state(2))
    steps = [logits]
    for t in range(20, 37):
        logits, state = ours(ids[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), want, rtol=0, atol=1e-4)
