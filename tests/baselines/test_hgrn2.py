"""HGRN2: its recurrence, and the lower bounds that its layers have in common."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from baselines import linear_attention
from baselines.hgrn2 import HGRN2, HGRN2Config
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.nn.zoo import MODELS, Size, model_config
from rodimus_lab.train.optimizer import decay_groups
from rodimus_lab.weights import read_tensors, write_tensors

L, D = 4, 32
SIZE = Size("tiny", num_layers=L, d_model=D, num_heads=2, vocab_size=50, context=16)
BOUNDS = "shared.HGRN2.weight"


def model() -> LanguageModel:
    """With bounds that are not those of the start."""
    built = MODELS["hgrn2"](SIZE).build()
    torch.nn.init.normal_(built.shared["HGRN2"].weight)
    return built


def layers(built: LanguageModel) -> list[HGRN2]:
    return [block.mixers[0] for block in built.blocks]


@torch.no_grad()
def test_the_recurrence_is_flash_linear_attentions(fla_reference, recurrence):
    """Gates by its formula, in logarithms; then the recurrence of GLA."""
    built, x = model(), torch.randn(2, 130, D)
    share = built.shared["HGRN2"].weight.softmax(0)
    for layer, mixer in enumerate(layers(built)):
        torch.nn.init.normal_(mixer.qfv_proj.weight, std=0.2)
        call = recurrence(linear_attention, mixer, x)
        q, f, v = (x @ mixer.qfv_proj.weight.T).chunk(3, dim=-1)
        bound = share[1 : layer + 1].sum(0)
        g = torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(f))
        for got, want in ((call.q, F.silu(q)), (call.k, -g.expm1()), (call.v, v), (call.log_alpha, g)):
            torch.testing.assert_close(got.flatten(-2), want, rtol=1e-5, atol=1e-5)
        want, _ = fla_reference("gla/naive.py", "naive_recurrent_gla")(call.q, call.k, call.v, call.log_alpha)
        torch.testing.assert_close(call.o, want, rtol=1e-5, atol=1e-5)


def test_the_counts_are_table_1s():
    assert model_config("hgrn2").num_params() == 46_195_712
    assert model_config("hgrn2", hgrn2={"lower_bounds": False}).num_params() == 46_195_712 - 6 * 512


def test_the_state_is_table_4s():
    assert HGRN2Config().state_bytes(2048, 1, 99, torch.bfloat16) == 2 * 128 * 2048


def test_the_bounds_are_one_parameter_of_the_model():
    built = model()
    assert [name for name, _ in built.named_parameters() if "bounds" in name or "shared" in name] == [BOUNDS]
    assert built.get_parameter(BOUNDS).shape == (L, D)
    assert BOUNDS in decay_groups(built).no_decay
    assert len(built.state_dict()) == len(list(built.parameters()))
    loss = built.loss(torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 9)))
    loss.backward()
    assert (built.get_parameter(BOUNDS).grad.abs().sum(-1) > 0).all()


def test_every_layer_reads_its_own_bound():
    built = model()
    ids = torch.randint(0, 50, (1, 7))
    with torch.no_grad():
        rising = torch.stack([mixer.bounds(mixer.layer_1) for mixer in layers(built)])
        before = built(ids)[0]
        built.get_parameter(BOUNDS).normal_()
        after = built(ids)[0]
    assert (rising[0] == 0).all()
    assert (rising.diff(dim=0) > 0).all()
    assert (rising < 1).all()
    assert not torch.equal(before, after)


def test_a_copy_has_bounds_of_its_own():
    built = model()
    twin = copy.deepcopy(built)
    for mixer in layers(twin):
        assert mixer.bounds is twin.shared["HGRN2"]
        assert mixer.bounds is not built.shared["HGRN2"]


def test_they_are_saved_once(tmp_path):
    built, other = model(), model()
    write_tensors(tmp_path / "model.safetensors", built.state_dict())
    other.load_state_dict(read_tensors(tmp_path / "model.safetensors"))
    ids = torch.randint(0, 50, (1, 7))
    torch.testing.assert_close(other(ids)[0], built(ids)[0], rtol=0, atol=0)


def test_a_strong_input_gives_finite_gradients():
    mixer = HGRN2Config().build(D)
    mixer.init_weights(Initializer())
    x = (1e4 * torch.randn(1, 9, D)).requires_grad_()
    mixer(x)[0].sum().backward()
    assert x.grad.isfinite().all()


def test_one_compiled_block_serves_all_layers():
    built, ids = model(), torch.randint(0, 50, (1, 7))
    want = built(ids)[0]
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in built.blocks:
        block.compile(backend=counter, dynamic=False)
    torch.testing.assert_close(built(ids)[0], want)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_first_weights():
    built = MODELS["hgrn2"](SIZE._replace(d_model=256)).build()
    assert not built.get_parameter(BOUNDS).any()
    assert built.blocks[1].mixers[0].qfv_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
