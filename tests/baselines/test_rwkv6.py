"""RWKV-6: its definition in float64, flash-linear-attention's recurrence, its count and its first weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import rwkv6
from baselines.rwkv6 import RWKV6, RWKV6Channel, RWKV6ChannelConfig, RWKV6Config, wkv
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import build_model, model_config
from rodimus_lab.ops import Segments
from rodimus_lab.train.optimizer import decay_groups

SMALL = RWKV6Config(head_width=8, mix_rank=3, decay_rank=5, layer=1, layers=3)


def stirred(config: Any, d_model: int, amount: float) -> Any:
    """With every weight moved off its start, so that none is idle."""
    mixer = config.build(d_model)
    mixer.init_weights(Initializer())
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return mixer


def wkv_by_hand(
    r: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, bonus: Tensor, S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the memory is read before it decays, the token itself with the bonus."""
    S = torch.zeros(*k[:, 0].shape, v.shape[-1], dtype=v.dtype) if S is None else S
    outputs = []
    for t in range(k.shape[1]):
        new = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((r[:, t].unsqueeze(-1) * (S + bonus.unsqueeze(-1) * new)).sum(-2))
        S = log_alpha[:, t].exp().unsqueeze(-1) * S + new
    return torch.stack(outputs, dim=1), S


def mixer_by_hand(mixer: RWKV6, x: Tensor) -> Tensor:
    """The formulas of the module's docstring."""
    heads, rank = mixer.shape.heads, mixer.config.mix_rank
    delta = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1) - x
    low = torch.tanh((x + mixer.mix_x * delta) @ mixer.mix_down.T).split(rank, dim=-1)
    parts = zip(mixer.mix_JD, low, mixer.mix_up_JRD, strict=True)
    x_w, x_k, x_v, x_r, x_g = (x + (mu + low_j @ up) * delta for mu, low_j, up in parts)
    x_decay = mixer.decay + torch.tanh(x_w @ mixer.decay_down.T) @ mixer.decay_up.T
    r, k, v = x_r @ mixer.receptance.weight.T, x_k @ mixer.key.weight.T, x_v @ mixer.value.weight.T
    split = [part.unflatten(-1, (heads, -1)) for part in (r, k, v, -x_decay.exp())]
    o, _ = wkv_by_hand(*split, mixer.bonus_HK)
    o = o - o.mean(-1, keepdim=True)
    o = o / (o.square().mean(-1, keepdim=True) + mixer.config.norm_eps).sqrt()
    g = F.silu(x_g @ mixer.gate.weight.T)
    return ((o.flatten(-2) * mixer.norm_weight + mixer.norm_bias) * g) @ mixer.output.weight.T


@torch.no_grad()
def test_it_is_its_definition() -> None:
    mixer, x = stirred(SMALL, 24, 0.3).double(), torch.randn(2, 70, 24, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], mixer_by_hand(mixer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strongest", [-1e-3, -1.0, -1e4])
def test_the_memory_holds_any_decay(strongest: float) -> None:
    """Outputs, last state and all gradients, from a state that is not empty."""
    shape = (2, 37, 3, 5)
    r, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    log_alpha = strongest * torch.rand(shape, dtype=torch.float64) ** 3
    bonus, S = torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (r, k, v, log_alpha, bonus, S)]
    weights = [torch.randn(shape, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64)]

    def with_gradients(outputs: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(total, inputs)]

    want = with_gradients(wkv_by_hand(*leaves), leaves)
    torch.testing.assert_close(with_gradients(wkv(*leaves), leaves), want, rtol=1e-10, atol=1e-10)
    narrow = [x.detach().float().requires_grad_() for x in leaves]
    for a, b in zip(with_gradients(wkv(*narrow), narrow), want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_document_of_one_token_leaves_its_own_write() -> None:
    r, k, v = (torch.randn(1, 4, 2, 3) for _ in range(3))
    log_alpha, bonus = -torch.rand(1, 4, 2, 3), torch.randn(2, 3)
    o, S = wkv(r, k, v, log_alpha, bonus, torch.randn(1, 2, 3, 3), Segments.from_lengths([3, 1]))
    want, want_S = wkv_by_hand(r[:, 3:], k[:, 3:], v[:, 3:], log_alpha[:, 3:], bonus)
    torch.testing.assert_close((o[:, 3:], S), (want, want_S))


@torch.no_grad()
def test_the_recurrence_is_flash_linear_attentions(fla_reference, monkeypatch) -> None:
    calls = []

    def spy(*inputs: Any) -> Any:
        calls.append((inputs, wkv(*inputs)))
        return calls[-1][1]

    monkeypatch.setattr(rwkv6, "wkv", spy)
    stirred(RWKV6Config(), 128, 0.1)(0.3 * torch.randn(2, 130, 128))
    (((r, k, v, log_alpha, bonus, _, _), (o, S)),) = calls
    assert log_alpha.dtype == torch.float32
    naive = fla_reference("rwkv6/recurrent_naive.py", "naive_recurrent_rwkv6")
    inputs = [x.transpose(1, 2) for x in (r, k, v, log_alpha)]
    want, want_S = naive(*inputs, bonus, scale=1.0, output_final_state=True)
    assert want.std() > 0.1
    torch.testing.assert_close(o, want.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(S, want_S, rtol=1e-5, atol=1e-5)


def test_the_counts() -> None:
    """Hidden widths are the authors': 3.5 times the model's, down to a multiple of 32."""
    d, rank, decay_rank, hidden = 512, 32, 64, 1792
    time_mixing = 5 * d**2 + 2 * 5 * rank * d + 2 * decay_rank * d + (1 + 5) * d + 2 * d + 2 * d
    channel_mixing = 2 * hidden * d + d**2 + 2 * d
    layer = time_mixing + channel_mixing + 2 * 2 * d
    assert model_config("rwkv6").num_params() == 50265 * d + 6 * layer + 2 * d == 47_609_344
    widths = {d: RWKV6ChannelConfig().width(d) for d in (64, 96, 128, 512, 768, 2048)}
    assert widths == {64: 224, 96: 320, 128: 448, 512: 1792, 768: 2688, 2048: 7168}


def test_the_state_is_table_4s() -> None:
    """64 x d, beside the last input."""
    assert RWKV6Config().state_bytes(2048, 1, 99, torch.bfloat16) == 2 * (64 * 2048 + 2048)


def fresh(config: Any, d_model: int = 192) -> Any:
    mixer = config.build(d_model)
    mixer.init_weights(Initializer())
    return mixer


@torch.no_grad()
def test_first_weights_are_the_authors() -> None:
    d, layers = 192, 6
    for layer in (0, 3, 5):
        mixer: RWKV6 = fresh(RWKV6Config(layer=layer, layers=layers))
        channel: RWKV6Channel = fresh(RWKV6ChannelConfig(layer=layer, layers=layers))
        ratio, fading = layer / 5, 1 - layer / 6
        for h in (0, 1, 50, 191):
            mu, slow = 1 - (h / d) ** fading, 1 - (h / d) ** (fading / 2)
            assert mixer.mix_x[h].item() == pytest.approx(mu, abs=1e-6)
            for name, value in {"w": mu, "k": mu, "v": mu - 0.3 * ratio, "r": slow, "g": slow}.items():
                assert mixer.mix_JD["wkvrg".index(name), h].item() == pytest.approx(value, abs=1e-6)
            place = h / (d - 1)
            assert mixer.decay[h].item() == pytest.approx(-6 + 5 * place ** (0.7 + 1.3 * ratio), abs=1e-5)
            zigzag = (-0.1, 0.0, 0.1)[(h + 1) % 3]
            assert mixer.bonus_HK[h // 64, h % 64].item() == pytest.approx(ratio * (1 - place) + zigzag, abs=1e-6)
            # Channel mixing has the weight of the token itself, time mixing that of the one before.
            assert channel.mix_k[h].item() == channel.mix_r[h].item() == pytest.approx(1 - mu, abs=1e-6)
        for linear, gain in ((mixer.key, 0.1), (mixer.gate, 0.1), (mixer.value, 1.0), (mixer.receptance, 1.0)):
            torch.testing.assert_close(linear.weight @ linear.weight.T, gain**2 * torch.eye(d))
        torch.testing.assert_close(channel.key.weight.T @ channel.key.weight, torch.eye(d))
        for zero in (mixer.mix_down, mixer.decay_down, mixer.norm_bias, *[
            linear.weight for linear in (mixer.output, channel.receptance, channel.value)
        ]):  # fmt: skip
            assert not zero.any()
        for up in (mixer.mix_up_JRD, mixer.decay_up):
            assert 0.0099 < up.abs().max() <= 0.01
            assert abs(up.std().item() / (0.01 / 3**0.5) - 1) < 0.02
        torch.testing.assert_close(mixer.norm_weight, torch.full((d,), ((1 + layer) / 6) ** 0.7))
    assert mixer.config.norm_eps == 1e-5 * 8**2


def test_first_weights_of_flash_linear_attention() -> None:
    """Its linear weights are normal but the way out's; every mixture and decay exponent starts at 0."""
    mixer: RWKV6 = fresh(RWKV6Config(init="fla", layers=8))
    channel: RWKV6Channel = fresh(RWKV6ChannelConfig(init="fla", layers=8))
    linears = (mixer.key, mixer.value, mixer.receptance, mixer.gate, channel.key, channel.receptance, channel.value)
    low_rank = (mixer.mix_down, mixer.mix_up_JRD, mixer.decay_down, mixer.decay_up)
    for weight in (*[linear.weight for linear in linears], *low_rank):
        assert abs(weight.std().item() / 0.02 - 1) < 0.03
    bound = 192**-0.5 / 16**0.5
    assert 0.99 * bound < mixer.output.weight.abs().max() <= bound
    for zero in (mixer.mix_x, mixer.mix_JD, mixer.decay, mixer.bonus_HK, mixer.norm_bias):
        assert not zero.any()
    for one in (mixer.norm_weight, channel.mix_k, channel.mix_r):
        assert (one == 1).all()


def test_what_is_not_decayed() -> None:
    """As the authors' optimizer has it: what mixes, decays and is of low rank."""
    groups = decay_groups(build_model("rwkv6", size="mqar"))
    decayed = {name.split(".")[4] for name in groups.decay if name.startswith("blocks.0.mixers.0.")}
    assert decayed == {"key", "value", "receptance", "gate", "output"}
