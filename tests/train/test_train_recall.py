"""Training on questions and answers: only they are scored, the data stays whole, and runs resume."""

from __future__ import annotations

import json

import pytest
import torch
from ranks import start_ranks
from train_fakes import options, run_folder

from rodimus_lab.data.mqar import IGNORE, MqarConfig, MqarSegment, draw, generate, single
from rodimus_lab.errors import UserError
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.recipe import BudgetConfig, OptimizerConfig, Recipe, ScheduleConfig
from rodimus_lab.records import RunDir
from rodimus_lab.scoring import recall
from rodimus_lab.train import Interrupted, train
from rodimus_lab.train.distributed import World
from rodimus_lab.train.evaluation import evaluate, note_evaluation
from rodimus_lab.train.feed import open_feed
from rodimus_lab.train.optimizer import build_optimizer, decay_groups
from rodimus_lab.train.recall import QuestionLoader, question_sets
from rodimus_lab.train.schedule import learning_rate
from rodimus_lab.train.step import Stepper

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def segment(num_examples: int, seq_len: int, num_pairs: int) -> MqarSegment:
    return MqarSegment(num_examples=num_examples, seq_len=seq_len, num_pairs=num_pairs)


MIXTURE = MqarConfig(
    train=(segment(30, 16, 2), segment(9, 32, 8)), test=segment(21, 48, 4), vocab_size=64, random_non_queries=True
)


def recipe_of(data: MqarConfig = MIXTURE, *, steps: int = 12, lr: float = 1e-2, d_model: int = 16) -> Recipe:
    block = BlockConfig(hops=((FeedForwardConfig(width=32),),))
    return Recipe(
        experiment="testing",
        label="recalling",
        model=LanguageModelConfig(vocab_size=data.vocab_size, d_model=d_model, pattern=(block,), repeats=1),
        data=data,
        optimizer=OptimizerConfig(lr=lr, clip_norm=None),
        schedule=ScheduleConfig(kind="cosine_by_epoch", warmup_steps=0, min_lr=0),
        budget=BudgetConfig(name="smoke", steps=steps, batch_size=8, eval_every=6),
        precision="fp32",
    )


def stepper_of(recipe: Recipe, rows: int) -> Stepper:
    torch.manual_seed(0)
    model = recipe.model.build()
    return Stepper(model, build_optimizer(model, decay_groups(model), recipe.optimizer), recipe, ALONE, rows)


def test_an_epoch_takes_every_example_once_and_no_batch_mixes_segments():
    sets = question_sets(MIXTURE, CPU)
    loader = QuestionLoader(sets.train, sets.segments, 8, 3, ALONE)
    assert loader.batches_per_epoch == 4 + 2
    drawn = draw(MIXTURE, MIXTURE.train)
    wanted = sorted(tuple(row) for examples in drawn for row in examples.answers_NP.tolist())
    orders = []
    for _ in range(2):
        seen = []
        for _ in range(loader.batches_per_epoch):
            inputs, answers, positions = next(loader)
            assert inputs.dtype == answers.dtype == positions.dtype == torch.int64
            assert (inputs.shape, answers.shape, positions.shape) == ((8, 32), (8, 8), (8, 8))
            counted = [tuple(row[row != IGNORE].tolist()) for row in answers]
            assert len({len(row) for row in counted if row}) == 1
            seen += [row for row in counted if row]
        assert sorted(seen) == wanted
        orders.append(seen)
    assert orders[0] != orders[1]


def test_ranks_share_a_batch():
    sets = question_sets(MIXTURE, CPU)
    whole = QuestionLoader(sets.train, sets.segments, 8, 3, ALONE)
    parts = [QuestionLoader(sets.train, sets.segments, 8, 3, World(rank, 2, CPU)) for rank in (0, 1)]
    for _ in range(7):
        together = [torch.cat(tensors) for tensors in zip(*map(next, parts), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(next(whole), together, strict=True))


def test_the_loader_goes_on_where_it_was():
    sets = question_sets(MIXTURE, CPU)
    first = QuestionLoader(sets.train, sets.segments, 8, 3, ALONE)
    for _ in range(8):
        next(first)
    second = QuestionLoader(sets.train, sets.segments, 8, 3, ALONE)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(next(first), next(second), strict=True))
    with pytest.raises(UserError, match="not of this run's data order"):
        QuestionLoader(sets.train, sets.segments, 8, 4, ALONE).load_state_dict(first.state_dict())


def test_a_batch_is_the_data_with_labels():
    data = single(32, 4, num_train=40, num_test=5)
    inputs, labels = (torch.from_numpy(array) for array in generate(40, 32, 4, seed=data.seed))
    sets = question_sets(data, CPU)
    got, answers, positions = sets.train.take(torch.arange(40))
    assert torch.equal(got, inputs)
    assert torch.equal(torch.full_like(labels, IGNORE).scatter(1, positions, answers), labels)


def test_the_loss_is_that_of_all_positions_with_labels():
    """The loss and the gradients of a step are those that the full rows with -100 labels have; fillers change none."""
    recipe = recipe_of(single(32, 4, num_train=20, num_test=5).replace(vocab_size=64))
    sets = question_sets(recipe.data, CPU)
    inputs, labels = (torch.from_numpy(array) for array in generate(20, 32, 4, 64, seed=recipe.data.seed))
    few, full = stepper_of(recipe, 3), stepper_of(recipe, 20)
    loss = few.backward(*sets.train.take(torch.arange(21)))  # The last is the empty one.
    assert torch.allclose(loss, full.backward(inputs, labels), atol=1e-6)
    for ours, theirs in zip(few.model.parameters(), full.model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_accuracy_is_of_the_answers():
    """By hand, on a model whose likeliest token is known: the logits of an untrained one."""
    recipe = recipe_of()
    feed, model = open_feed(recipe, ALONE), recipe.model.build()
    questions = question_sets(MIXTURE, CPU).test.take(torch.arange(21))
    with torch.no_grad():
        logits, _ = model(questions[0])
    right = sum(
        int(logits[row, place].argmax()) == answer
        for row in range(21)
        for place, answer in zip(questions[2][row].tolist(), questions[1][row].tolist(), strict=True)
    )
    metrics = evaluate(model, feed, ALONE, 8, "fp32")
    assert metrics["test_accuracy"] == right / (21 * 4)
    assert 3 < metrics["test_loss"] < 6
    answers = logits.gather(1, questions[2].unsqueeze(-1).expand(-1, -1, 64)).argmax(-1)
    assert recall(model, [(questions[0], answers, questions[2])], CPU)[1:].tolist() == [84, 84, 21, 21]


def test_the_best_accuracy_is_kept():
    metrics, _ = note_evaluation({}, {"test_accuracy": 0.5, "test_loss": 1.0})
    metrics, _ = note_evaluation(metrics, {"test_accuracy": 0.4, "test_loss": 1.1})
    assert (metrics["test_accuracy"], metrics["best_test_accuracy"]) == (0.4, 0.5)


def test_the_rate_moves_by_the_epoch_as_pytorch_has_it():
    epochs, every = 8, 6
    schedule = ScheduleConfig(kind="cosine_by_epoch", warmup_steps=0, min_lr=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs, eta_min=0.0)
    for epoch in range(epochs):
        for step in range(epoch * every + 1, (epoch + 1) * every + 1):
            ours = learning_rate(schedule, 1e-2, step, epochs * every, eval_every=every)
            assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_broken_run_ends_as_a_whole_one(tmp_path):
    recipe = recipe_of()
    whole = train(recipe, options(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        train(recipe, options(tmp_path / "parts", stop_at_step=7))
    parts = train(recipe, options(tmp_path / "parts"))
    lines = [RunDir(tmp_path / name / "runs", "testing", recipe.id).read_metrics() for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    evaluations = [line for line in lines[0] if "test_accuracy" in line]
    assert [line["step"] for line in evaluations] == [6, 12]
    for record in (whole, parts):
        assert record["metrics"]["test_accuracy"] == evaluations[-1]["test_accuracy"]
        assert record["corpus"] == "mqar-16x2+32x8"
    env = json.loads((run_folder(tmp_path / "whole", recipe) / "env.json").read_bytes())
    assert env["data"]["fingerprints"] == question_sets(MIXTURE, CPU).fingerprints


def test_two_ranks_read_accuracies_as_one(tmp_path):
    recipe = recipe_of(MIXTURE.replace(test=MIXTURE.train[0]))
    train(recipe, options(tmp_path / "one"))
    ranks = start_ranks(2, lambda rank: int(train(recipe, options(tmp_path / "two")) is None), tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    one, two = (RunDir(tmp_path / name / "runs", "testing", recipe.id).read_metrics() for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_a_run_ends_when_it_is_good_enough(tmp_path):
    data = MIXTURE.replace(enough=1e-9, test=MIXTURE.train[0])
    recipe = recipe_of(data, steps=600, lr=3e-2)
    record = train(recipe, options(tmp_path))
    steps = record["metrics"]["steps"]
    lines = RunDir(tmp_path / "runs", "testing", recipe.id).read_metrics()
    accuracies = [line["test_accuracy"] for line in lines if "test_accuracy" in line]
    assert steps < 600
    assert steps % 6 == 0
    assert accuracies[-1] > 0
    assert not any(accuracies[:-1])


def test_a_recipe_of_a_task_is_read_back(tmp_path):
    recipe = recipe_of()
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert Recipe.read(path) == recipe
    path.write_text(json.dumps(recipe.to_dict() | {"data": recipe.data.to_dict() | {"task": "sorting"}}))
    with pytest.raises(UserError, match="sorting"):
        Recipe.read(path)


def test_a_vocabulary_too_small_is_refused():
    recipe = recipe_of()
    small = recipe.replace(model=recipe.model.replace(vocab_size=32))
    with pytest.raises(UserError, match="the task has 64 tokens, but the model's vocabulary only 32"):
        open_feed(small, ALONE)


@pytest.mark.gpu
def test_whole_steps_captured_train_as_eager_ones(tmp_path):
    recipe = recipe_of(steps=18)
    for folder, capture in (("eager", False), ("captured", True)):
        train(recipe, options(tmp_path / folder, device="cuda", compile=False, capture=capture))
    lines = [RunDir(tmp_path / name / "runs", "testing", recipe.id).read_metrics() for name in ("eager", "captured")]
    for eager, captured in zip(*lines, strict=True):
        assert captured == pytest.approx(eager, rel=1e-4, abs=1e-6)
