from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from train_fakes import BATCH, VOCAB, memory_feed, tiny_recipe

from rodimus_lab.data.mqar import MqarConfig, MqarSegment
from rodimus_lab.nn.model import IGNORE
from rodimus_lab.train.distributed import World
from rodimus_lab.train.optimizer import build_optimizer, decay_groups
from rodimus_lab.train.step import Stepper, default_rows, fit_rows, fit_rows_alone

ALONE = World(0, 1, torch.device("cpu"))


def stepper(rows, **changes):
    recipe = tiny_recipe(dropout=0.0).replace(**changes)
    torch.manual_seed(0)
    model = recipe.model.build()
    return Stepper(model, build_optimizer(model, decay_groups(model), recipe.optimizer), recipe, ALONE, rows)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_do_not_show_in_the_weights(rows):
    whole, parts = stepper(BATCH), stepper(rows)
    for step in (1, 2, 3):
        batch = next(memory_feed(whole.recipe, ALONE).train)
        loss, norm = whole.step(step, *batch)
        loss_parts, norm_parts = parts.step(step, *batch)
        torch.testing.assert_close(loss, loss_parts, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norm, norm_parts, rtol=1e-5, atol=1e-6)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_one_step_against_a_float64_reference():
    """Loss after one step: gradient, clipping and AdamW by hand in float64."""
    trained = stepper(2)
    inputs, targets = next(memory_feed(trained.recipe, ALONE).train)
    reference = trained.recipe.model.build().double()
    reference.load_state_dict(trained.model.state_dict())
    decayed = decay_groups(reference).decay

    logits, _ = reference(inputs)
    counted = targets != IGNORE
    loss = -logits.log_softmax(-1)[counted].gather(-1, targets[counted][:, None]).mean()
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in reference.parameters()]).sum().sqrt()
    lr = trained.recipe.optimizer.lr / trained.recipe.schedule.warmup_steps
    with torch.no_grad():
        for name, p in reference.named_parameters():
            g = p.grad * min(1.0, 1.0 / float(norm))
            p.mul_(1 - lr * (0.1 if name in decayed else 0.0))
            p.sub_(lr * g / (g.abs() + 1e-8))
    after = reference.loss(inputs, targets)

    measured_loss, measured_norm = trained.step(1, inputs, targets)
    torch.testing.assert_close(measured_loss.double(), loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(measured_norm.double(), norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(trained.model.loss(inputs, targets).double(), after, rtol=1e-6, atol=0)
    assert after < loss


def test_gradients_are_clipped_to_the_norm():
    clipped = stepper(BATCH)
    limit = 1e-3
    clipped.recipe = clipped.recipe.replace(optimizer=clipped.recipe.optimizer.replace(clip_norm=limit))
    _, norm = clipped.step(1, *next(memory_feed(clipped.recipe, ALONE).train))
    assert norm > limit
    after = torch.nn.utils.get_total_norm([p.grad for p in clipped.model.parameters()])
    assert float(after) == pytest.approx(limit, rel=1e-3)


def test_nothing_is_updated_from_the_first_bad_step_on():
    broken = stepper(BATCH)
    feed = memory_feed(broken.recipe, ALONE)
    broken.step(1, *next(feed.train))
    good = broken.model.embedding.weight.detach().clone()
    with torch.no_grad():
        broken.model.embedding.weight[0, 0] = float("inf")
    broken.step(2, torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    with torch.no_grad():
        broken.model.embedding.weight.copy_(good)
    broken.step(3, *next(feed.train))
    assert torch.equal(broken.model.embedding.weight, good)
    assert broken.sentinel.first_bad_step() == 2


def test_autocast_computes_in_bfloat16_over_float32_weights():
    exact, rough = stepper(BATCH), stepper(BATCH, precision="bf16")
    batch = next(memory_feed(exact.recipe, ALONE).train)
    exact_loss, rough_loss = exact.step(1, *batch)[0], rough.step(1, *batch)[0]
    assert 0 < abs(float(exact_loss - rough_loss)) < 0.05
    assert all(p.dtype == torch.float32 for p in rough.model.parameters())


def test_a_batch_without_counted_tokens_has_no_loss():
    blank = torch.full((2, 4), IGNORE)
    loss, norm = stepper(2).step(1, torch.randint(VOCAB, (2, 4)), blank)
    assert loss == norm == 0


def test_default_rows_divide_the_batch():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert default_rows(256, 512, cuda) == 128
    assert default_rows(8, 16, cpu) == 8
    assert default_rows(96, 512, cpu) == 32
    assert default_rows(7, 1 << 20, cuda) == 1


@pytest.fixture
def room(monkeypatch):
    """A device with room for 4 rows, or for 2 beside gradients; the list has the micro-batches that were tried."""
    tried = []
    accumulate = Stepper._accumulate

    def within(self, scale, *batch):
        beside = any(parameter.grad is not None for parameter in self.model.parameters())
        tried.append((len(batch[0]), beside))
        if len(batch[0]) > (2 if beside else 4):
            raise torch.OutOfMemoryError
        return accumulate(self, scale, *batch)

    monkeypatch.setattr(Stepper, "_accumulate", within)
    monkeypatch.setattr("torch.random.fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=0))
    return tried


def test_micro_batches_fit_beside_the_gradients_of_those_before(room):
    fitted = stepper(BATCH)
    fit_rows(fitted)
    assert fitted.rows == 2
    assert room == [(8, False), (4, False), (4, True), (2, False), (2, True)]
    assert all(parameter.grad is None for parameter in fitted.model.parameters())


def test_a_rank_that_has_one_micro_batch_needs_no_more_room(room):
    recipe = tiny_recipe(dropout=0.0)
    assert fit_rows_alone(recipe.model.build(), recipe, World(1, 2, ALONE.device), BATCH // 2) == 4
    assert room == [(4, False)]


def test_what_fits_is_found_for_questions_too(room):
    recipe = tiny_recipe(dropout=0.0)
    shape = MqarSegment(num_examples=8, seq_len=16, num_pairs=2)
    recipe = recipe.replace(data=MqarConfig(train=(shape,), test=shape, vocab_size=VOCAB))
    inputs, targets = torch.randint(VOCAB, (2, 4, 16))
    asked = (inputs, targets[:, :2], torch.arange(2).expand(4, 2))
    assert fit_rows_alone(recipe.model.build(), recipe, World(1, 2, ALONE.device), 4, batch=asked) == 4
