"""What only a GPU can show. The same trainings as on the CPU, on the device."""

import pytest
import torch
from train_fakes import BATCH, checkpoint_folder, memory_feed, options, run_folder, tiny_recipe

from rodimus_lab.records import RunDir
from rodimus_lab.train import Interrupted, train
from rodimus_lab.train.distributed import World
from rodimus_lab.train.optimizer import build_optimizer, decay_groups
from rodimus_lab.train.sentinel import NonFiniteError
from rodimus_lab.train.step import Stepper, fit_rows, fit_rows_alone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def metrics(root, recipe):
    return RunDir(root / "runs", recipe.experiment, recipe.id).read_metrics()


@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_trains_as_the_cpu_does(tmp_path, compiled):
    recipe = tiny_recipe(dropout=0.0)
    train(recipe, options(tmp_path / "cpu"), open_feed=memory_feed)
    train(recipe, options(tmp_path / "cuda", device="cuda", compile=compiled), open_feed=memory_feed)
    for cpu, cuda in zip(metrics(tmp_path / "cpu", recipe), metrics(tmp_path / "cuda", recipe), strict=True):
        assert cuda == pytest.approx(cpu, rel=1e-3, abs=1e-5)


def test_cuda_resumes_with_its_random_state(tmp_path):
    recipe = tiny_recipe(dropout=0.2)
    settings = {"device": "cuda", "compile": False}
    train(recipe, options(tmp_path / "whole", **settings), open_feed=memory_feed)
    with pytest.raises(Interrupted):
        train(recipe, options(tmp_path / "parts", stop_at_step=6, **settings), open_feed=memory_feed)
    train(recipe, options(tmp_path / "parts", **settings), open_feed=memory_feed)
    for a, b in zip(metrics(tmp_path / "whole", recipe), metrics(tmp_path / "parts", recipe), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("rows", "recompute"), [(512, False), (128, False), (128, True)])
def test_captured_micro_batches_train_as_eager_ones(tmp_path, rows, recompute):
    """One micro-batch a step and several; the first steps of both are eager."""
    recipe = tiny_recipe(12, dropout=0.0)
    for folder, capture in (("eager", False), ("captured", True)):
        settings = {
            "device": "cuda",
            "compile": False,
            "capture": capture,
            "recompute": recompute,
            "micro_batch_size": max(1, BATCH * rows // 512),
        }
        train(recipe, options(tmp_path / folder, **settings), open_feed=memory_feed)
    for a, b in zip(metrics(tmp_path / "eager", recipe), metrics(tmp_path / "captured", recipe), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


def test_dropout_that_is_drawn_again_is_not_captured(tmp_path):
    recipe = tiny_recipe(4, dropout=0.2)
    settings = {"device": "cuda", "compile": False, "recompute": True}
    train(recipe, options(tmp_path, **settings), open_feed=memory_feed)
    assert len([line for line in metrics(tmp_path, recipe) if "loss" in line]) == 4


def test_a_run_that_blows_up_between_two_checks(tmp_path):
    """The first update spoils the weights; the first check is at the fourth step."""
    recipe = tiny_recipe(10_000, eval_every=10_000, lr=1e30)
    with pytest.raises(NonFiniteError, match=r"at step 2 .* no checkpoint was written yet"):
        train(recipe, options(tmp_path, device="cuda"), open_feed=memory_feed)
    assert not (run_folder(tmp_path, recipe) / "record.json").exists()
    assert not list(checkpoint_folder(tmp_path, recipe).glob("step-*"))


def test_micro_batches_shrink_until_they_fit():
    recipe = tiny_recipe()
    recipe = recipe.replace(model=recipe.model.replace(d_model=1024, repeats=8), data=recipe.data.replace(seq_len=2048))
    world = World(0, 1, torch.device("cuda", 0))
    model = recipe.model.build().cuda()
    stepper = Stepper(model, build_optimizer(model, decay_groups(model), recipe.optimizer), recipe, world, 512)
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        state = torch.cuda.get_rng_state()
        fit_rows(stepper)
        assert 1 <= stepper.rows < 512
        assert 512 % stepper.rows == 0
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(("replicas", "parts"), [(1, 1), (1, 2), (2, 1)])
def test_a_rank_of_several_finds_by_itself_what_fits(replicas, parts):
    recipe = tiny_recipe()
    recipe = recipe.replace(model=recipe.model.replace(d_model=1024, repeats=8), data=recipe.data.replace(seq_len=2048))
    model = recipe.model.build()
    world = World(1, 2, torch.device("cuda", 0), replicas, parts)
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rodimus_lab.train.step.SPARE", 0.0)
            rows = fit_rows_alone(model, recipe, world, 512)
            patch.setattr("rodimus_lab.train.step.SPARE", 1.0)
            assert fit_rows_alone(model, recipe, world, 512) == 1
        assert 1 <= rows < 512
        assert 512 % rows == 0
        assert all(p.grad is None for p in model.parameters())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
