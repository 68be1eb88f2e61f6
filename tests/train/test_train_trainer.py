import gc
import json
import signal
from dataclasses import replace
from weakref import ref

import pytest
import torch
from train_fakes import (
    BATCH,
    SEQ_LEN,
    VOCAB,
    MemoryLoader,
    checkpoint_folder,
    memory_feed,
    options,
    run_folder,
    tiny_recipe,
)

from rodimus_lab.convert import open_checkpoint
from rodimus_lab.errors import UserError
from rodimus_lab.nn.feedforward import FeedForward
from rodimus_lab.nn.model import IGNORE
from rodimus_lab.records import RunDir, load_records
from rodimus_lab.scoring import perplexity
from rodimus_lab.train import Interrupted, train
from rodimus_lab.train.distributed import World
from rodimus_lab.train.sentinel import NonFiniteError
from rodimus_lab.train.signals import StopSignal
from rodimus_lab.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))


def lines(root, recipe):
    return RunDir(root / "runs", recipe.experiment, recipe.id).read_metrics()


def test_overfits_a_rule_and_records_it(tmp_path):
    recipe = tiny_recipe(150, dropout=0.0, eval_every=50, lr=2e-2)
    record = train(recipe, options(tmp_path), open_feed=memory_feed)
    metrics = record["metrics"]
    assert metrics["valid_ppl"] < 1.5 < 20 < lines(tmp_path, recipe)[0]["loss"] ** 3
    assert metrics["steps"] == 150
    assert metrics["tokens"] == 150 * BATCH * SEQ_LEN
    assert metrics["params"] == recipe.model.num_params()
    assert metrics["tokens_per_second"] > 0
    assert metrics["mfu"] is None
    assert metrics["peak_memory_bytes"] is None
    assert metrics["test_word_ppl"] > metrics["test_ppl"]
    (read,) = load_records(tmp_path / "runs")
    assert read.metrics == metrics
    assert read.env["micro_batch_size"] == BATCH
    assert read.env["data"] == {"fingerprints": {"train": "memory"}}
    assert read.env["no_weight_decay"] == [
        *(f"blocks.*.{name}" for name in ("mixers.0.in_proj.bias", "mixers.0.out_proj.bias", "norms.0.weight")),
        "final_norm.weight",
    ]


def test_metrics_hold_steps_and_evaluations(tmp_path):
    recipe = tiny_recipe(12, eval_every=5)
    record = train(recipe, options(tmp_path), open_feed=memory_feed)
    read = lines(tmp_path, recipe)
    steps = [line for line in read if "loss" in line]
    tests = [line for line in read if "test_ppl" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in tests] == [5, 10, 12]
    assert steps[-1]["lr"] == recipe.schedule.min_lr
    assert record["metrics"]["train_loss"] == steps[-1]["loss"]
    assert record["metrics"]["test_ppl"] == tests[-1]["test_ppl"]
    assert record["metrics"]["best_test_ppl"] == min(line["test_ppl"] for line in tests)


def test_the_final_weights_give_the_recorded_perplexity(tmp_path):
    recipe = tiny_recipe()
    record = train(recipe, options(tmp_path), open_feed=memory_feed)
    checkpoint = open_checkpoint(checkpoint_folder(tmp_path, recipe))
    assert checkpoint.recipe == recipe
    score = perplexity(checkpoint.build(), memory_feed(recipe, ALONE).evaluation["test"](4), words=170)
    assert score["tokens"] == 21 * SEQ_LEN
    assert score["ppl"] == pytest.approx(record["metrics"]["test_ppl"], rel=1e-6)
    assert score["word_ppl"] == pytest.approx(record["metrics"]["test_word_ppl"], rel=1e-6)


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    recipe = tiny_recipe()
    record = train(recipe, options(tmp_path), open_feed=memory_feed)

    def no_data(recipe, world):
        raise AssertionError("the data of a finished run was opened")

    assert train(recipe, options(tmp_path), open_feed=no_data) == record
    assert "is finished" in capsys.readouterr().out


def test_another_recipe_in_the_folder_is_an_error(tmp_path):
    recipe = tiny_recipe()
    path = run_folder(tmp_path, recipe) / "recipe.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(recipe.to_dict() | {"seed": 7}))
    with pytest.raises(UserError, match="another recipe"):
        train(recipe, options(tmp_path), open_feed=memory_feed)


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    """The training rule is not the one of the validation data, which becomes ever less likely."""
    recipe = tiny_recipe(40, eval_every=2, patience=2)

    class Misleading(MemoryLoader):
        def __next__(self):
            inputs_BT, targets_BT = super().__next__()
            return inputs_BT, torch.where(targets_BT == IGNORE, IGNORE, (targets_BT + 1) % VOCAB)

    def feed(recipe, world):
        return replace(memory_feed(recipe, world), train=Misleading(recipe.seed, BATCH, world, {}))

    record = train(recipe, options(tmp_path), open_feed=feed)
    tests = [line for line in lines(tmp_path, recipe) if "valid_ppl" in line]
    values = [line["valid_ppl"] for line in tests]
    assert record["metrics"]["steps"] == tests[-1]["step"] < 40
    assert min(values) == values[-3] == record["metrics"]["best_valid_ppl"]
    assert record["metrics"]["valid_ppl"] == values[-1]
    assert record["metrics"]["test_ppl_at_best_valid"] == tests[-3]["test_ppl"]


def test_a_session_may_stop_early_and_go_on(tmp_path):
    recipe = tiny_recipe()
    with pytest.raises(Interrupted, match="after step 3 of 12") as stop:
        train(recipe, options(tmp_path, stop_at_step=3), open_feed=memory_feed)
    assert stop.value.exit_code == 0
    train(recipe, options(tmp_path), open_feed=memory_feed)
    train(recipe, options(tmp_path / "whole"), open_feed=memory_feed)
    parts, whole = (run_folder(root, recipe) / "metrics.jsonl" for root in (tmp_path, tmp_path / "whole"))
    assert parts.read_bytes() == whole.read_bytes()


def test_resume_false_starts_afresh(tmp_path):
    recipe = tiny_recipe()
    with pytest.raises(Interrupted):
        train(recipe, options(tmp_path, stop_at_step=3), open_feed=memory_feed)
    seen = []

    def feed(recipe, world):
        made = memory_feed(recipe, world)
        seen.append(made.train)
        return made

    with pytest.raises(Interrupted):
        train(recipe, options(tmp_path, stop_at_step=2, resume=False), open_feed=feed)
    assert seen[0].number == 2


def test_changed_data_cannot_be_resumed_on(tmp_path):
    recipe = tiny_recipe()
    with pytest.raises(Interrupted):
        train(recipe, options(tmp_path, stop_at_step=3), open_feed=memory_feed)

    def changed(recipe, world):
        return replace(memory_feed(recipe, world), facts={"fingerprints": {"train": "other"}})

    with pytest.raises(UserError, match="is not what its checkpoint was trained on"):
        train(recipe, options(tmp_path), open_feed=changed)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda module, y_BTD: y_BTD / 0, "the output of blocks.1.mixers.0"),
        (
            lambda module, y_BTD: y_BTD + (module.in_proj.bias.sum() * 0).sqrt(),
            "the gradient of blocks.1.mixers.0.in_proj.bias",
        ),
    ],
    ids=["forward", "backward"],
)
def test_a_value_that_is_not_finite_stops_the_run_and_is_located(tmp_path, monkeypatch, spoil, named):
    """The seventh batch spoils the second block. What is not finite is looked for at every fourth step only."""
    recipe = tiny_recipe(2000, eval_every=2000)
    loaders, original = [], FeedForward.forward

    def feed(recipe, world):
        made = memory_feed(recipe, world)
        loaders.append(made.train)
        return made

    def forward(self, x_BTD, state=None, segments=None):
        y_BTD, state = original(self, x_BTD, state, segments)
        calls.append(self)
        second = len(set(map(id, calls))) == 2 and self is not calls[0]
        return (spoil(self, y_BTD) if second and loaders[0].number == 7 else y_BTD), state

    calls: list[FeedForward] = []
    monkeypatch.setattr(FeedForward, "forward", forward)
    with pytest.raises(NonFiniteError, match=f"at step 7 {named} is not finite; the checkpoint of step 4 is kept"):
        train(recipe, options(tmp_path), open_feed=feed)
    assert [path.name for path in checkpoint_folder(tmp_path, recipe).glob("step-*")] == ["step-00000004"]
    assert [line["step"] for line in lines(tmp_path, recipe)] == [4]
    assert not (run_folder(tmp_path, recipe) / "record.json").exists()


@pytest.mark.slow
def test_compiled_blocks_train_alike_and_share_their_graphs(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    recipe = tiny_recipe(6, dropout=0.0, eval_every=3)
    train(recipe, options(tmp_path / "compiled", compile=True), open_feed=memory_feed)
    train(recipe, options(tmp_path / "eager"), open_feed=memory_feed)
    # Of two blocks, one to train and one to evaluate; of the embedding, another for a batch that was filled up.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 + 3
    for compiled, eager in zip(lines(tmp_path / "compiled", recipe), lines(tmp_path / "eager", recipe), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-5)


def test_event_files_where_asked_for(tmp_path):
    pytest.importorskip("tensorboard")
    recipe = tiny_recipe(3)
    train(recipe, options(tmp_path, tensorboard=True), open_feed=memory_feed)
    assert list((checkpoint_folder(tmp_path, recipe) / "tensorboard").glob("events*"))


def test_plain_progress_lines(tmp_path, capsys):
    recipe = tiny_recipe(4)
    train(recipe, options(tmp_path, progress=True), open_feed=memory_feed)
    out = capsys.readouterr().out
    assert "5 tensors with weight decay 0.1, 7 without" in out
    assert "step 4/4  loss " in out
    assert "MFU" not in out, "of a CPU no peak is known"


def test_two_processes_cannot_train_one_run(tmp_path):
    recipe = tiny_recipe()

    def feed(inner, world):
        with pytest.raises(UserError, match="another process is training"):
            train(recipe, options(tmp_path), open_feed=memory_feed)
        return memory_feed(inner, world)

    train(recipe, options(tmp_path), open_feed=feed)


def test_a_run_that_another_process_finished_meanwhile_is_not_trained_again(tmp_path, monkeypatch):
    """Between the look at the record and the hold of the folder."""
    from rodimus_lab.train import trainer

    recipe, hold = tiny_recipe(), trainer.hold
    others = []

    def late(folder):
        monkeypatch.setattr(trainer, "hold", hold)
        others.append(train(recipe, options(tmp_path), open_feed=memory_feed))
        return hold(folder)

    def no_feed(recipe, world):
        raise AssertionError("it is finished")

    monkeypatch.setattr(trainer, "hold", late)
    assert train(recipe, options(tmp_path), open_feed=no_feed) == others[0]


def test_signal_handlers_are_given_back():
    former = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) is not former
    assert signal.getsignal(signal.SIGTERM) is former


@pytest.mark.parametrize(("name", "value"), [("micro_batch_size", 0), ("checkpoint_every", -1), ("keep_last", 0)])
def test_options_out_of_range(tmp_path, name, value):
    with pytest.raises(UserError, match=name):
        options(tmp_path, **{name: value})


def test_no_such_device(tmp_path):
    with pytest.raises(UserError, match="'tpu' is not a device"):
        train(tiny_recipe(), options(tmp_path, device="tpu"), open_feed=memory_feed)


@pytest.mark.parametrize(
    ("given", "told"),
    [({"questions": True}, "questions"), ({"answers": True}, "questions"), ({"end_token": 0}, "packed")],
)
def test_data_that_is_not_split_over_ranks_is_refused_before_they_meet(tmp_path, given, told):
    recipe = tiny_recipe()
    of_two = World(0, 2, torch.device("cpu"), parts=2)
    feed = replace(memory_feed(recipe, of_two), **given)
    with pytest.raises(UserError, match=f"{told}.* not split over ranks; leave out sequence_parallel"):
        Trainer(recipe, feed, options(tmp_path), None, of_two, tmp_path)


def test_a_run_has_the_memory_of_the_one_before(tmp_path, monkeypatch):
    """Of a model that refers to itself too, as sharded ones do."""
    weights, alive = [], []

    def feed(recipe, world):
        alive.extend(reference() is not None for reference in weights)
        return memory_feed(recipe, world)

    def finish(trainer):
        trainer.model.itself = [trainer.model]
        weights.append(ref(next(trainer.model.parameters())))
        return {}

    monkeypatch.setattr(Trainer, "_finish", finish)
    gc.disable()
    try:
        for steps in (3, 4):
            train(tiny_recipe(steps), options(tmp_path), open_feed=feed)
    finally:
        gc.enable()
    assert alive == [False]
