"""Mixtures of corpora in stages: what is drawn, the same over ranks, resumed, and the recipe of Appendix E.3."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from experiments.pretrain import TOKENS, pretrain
from rodimus_lab.config import ConfigError
from rodimus_lab.convert import open_checkpoint
from rodimus_lab.data import TokenBlocks, Tokenizer, prepare, train_bpe
from rodimus_lab.data.mixture import MixtureConfig, MixtureLoader, StageConfig, mixed
from rodimus_lab.errors import UserError
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import load_records

WORDS = {"tale": "cat", "code": "def", "made": "sum"}
STEPS = 40


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three corpora, each of one word that the others do not have, and a tokenizer of them all."""
    monkeypatch.setenv("RODIMUS_LAB_CACHE", str(tmp_path / "cache"))
    found = {}
    for name, word in WORDS.items():
        found[name] = tmp_path / name
        found[name].mkdir()
        for split, count in (("train", 600), ("valid", 40), ("test", 40)):
            (found[name] / f"{split}.txt").write_text(f"{word} " * count)
    text = " ".join(f" {word}" for word in WORDS.values())
    Tokenizer("three", train_bpe([text] * 20, 280)).to_file(tmp_path / "tokenizer.json")
    return found


def config(folders):
    tale, code, made = map(str, folders.values())
    return MixtureConfig(
        tokenizer=str(folders["tale"].parent / "tokenizer.json"),
        seq_len=8,
        stages=(
            StageConfig(name="first", share=0.5, weights={tale: 0.8, code: 0.2}),
            StageConfig(name="second", share=0.3, weights={tale: 0.4, code: 0.6}),
            StageConfig(name="third", share=0.2, weights={made: 1.0}),
        ),
    )


def loader(folders, *, seed=0, rank=0, size=1, batch=12):
    data = config(folders)
    blocks = {
        name: TokenBlocks(prepare(name, data.tokenizer, progress=False), "train", data.seq_len) for name in data.corpora
    }
    return MixtureLoader(data, blocks, batch, STEPS, seed, rank, size)


def test_each_stage_draws_by_its_weights(folders):
    mixture = loader(folders, batch=60)
    assert mixture.data.first_steps(STEPS) == [0, 20, 32]
    drawn = [Counter(name for step in steps for name in mixture.draw(step)) for steps in (range(20), range(20, 32))]
    tale, code, made = map(str, folders.values())
    assert drawn[0][tale] / 1200 == pytest.approx(0.8, abs=0.04)
    assert drawn[1][code] / 720 == pytest.approx(0.6, abs=0.06)
    assert {name for step in range(32, 50) for name in mixture.draw(step)} == {made}
    assert [mixture.stage(step).name for step in (0, 19, 20, 31, 32, 99)] == [
        "first", "first", "second", "second", "third", "third"
    ]  # fmt: skip


def test_rows_are_of_the_corpora_that_were_drawn(folders):
    mixture = loader(folders)
    tokenizer = prepare(str(folders["tale"]), mixture.data.tokenizer, progress=False).tokenizer()
    for step in range(3):
        names = mixture.draw(step)
        inputs, targets = next(mixture)
        assert inputs.shape == targets.shape == (12, 8)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        for name, row in zip(names, inputs, strict=True):
            words = {word for word in WORDS.values() if word in tokenizer.decode(row.tolist())}
            assert words == {WORDS[name.rpartition("/")[2]]}


def test_ranks_share_a_batch(folders):
    alone, ranks = loader(folders), [loader(folders, rank=rank, size=3) for rank in range(3)]
    for _ in range(4):
        whole = next(alone)
        for one, parts in zip(whole, zip(*map(next, ranks), strict=True), strict=True):
            assert torch.equal(one, torch.cat(parts))
    assert alone.state_dict() == ranks[2].state_dict()


def test_it_goes_on_where_it_was(folders):
    first, second = loader(folders), loader(folders)
    for _ in range(25):
        next(first)
    second.load_state_dict(first.state_dict())
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(next(first), next(second), strict=True))
    state = first.state_dict()
    with pytest.raises(UserError, match="resume with"):
        loader(folders, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="the corpora none, and now they are"):
        first.load_state_dict({"step": 3})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": {"a": 0.5, "b": 0.4}}, "make 0.9, not 1"),
        ({"weights": {}}, "weights"),
        ({"weights": {"a": 1.5, "b": -0.5}}, "weights"),
        ({"share": 0.5}, "shares make 0.5, not 1"),
    ],
)
def test_parts_that_are_no_whole(change, said):
    stage = {"name": "only", "share": 1.0, "weights": {"a": 1.0}} | change
    with pytest.raises(ConfigError, match=said):
        MixtureConfig.from_dict({"task": "mixture", "tokenizer": "gpt2", "seq_len": 8, "stages": [stage]})


def test_a_recipe_on_disk_draws_the_same(folders):
    """Canonical JSON sorts the corpora."""
    mixture = loader(folders)
    stages = [stage | {"weights": dict(sorted(stage["weights"].items()))} for stage in mixture.data.to_dict()["stages"]]
    again = MixtureConfig.from_dict(mixture.data.to_dict() | {"stages": stages})
    blocks = {name: each.blocks for name, each in mixture._loaders.items()}
    assert MixtureLoader(again, blocks, 12, STEPS, 0).draw(3) == mixture.draw(3)
    assert again.corpora == mixture.data.corpora


def test_a_corpus_in_two_roles():
    assert mixed([("a", 0.5), ("b", 0.2), ("a", 0.3), ("c", 0.0)]) == {"a": 0.8, "b": 0.2}


class TestRecipe:
    def test_the_papers_stages(self):
        (recipe,) = pretrain(budget="paper", language="web", code="stack", synthetic="made")
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        tokens = recipe.budget.steps * recipe.budget.batch_size * recipe.data.seq_len
        assert tokens == pytest.approx(sum(TOKENS.values()), rel=1e-6)
        initial, coding, annealing = recipe.data.stages
        assert [stage.share for stage in recipe.data.stages] == [0.75, 0.1875, 0.0625]
        assert initial.weights == {"web": 0.8, "stack": 0.2}
        assert coding.weights == {"web": 0.4, "stack": 0.6}
        assert annealing.weights["made"] > 0.5
        assert 1.4e9 < recipe.model.num_params() < 1.5e9  # 1.6 B with the authors' vocabulary, which is not public.

    def test_what_is_refused(self, cli):
        for arguments, said in (
            (("--budget", "paper"), "give --language and --code and --synthetic"),
            (("--budget", "paper", "--language", "a", "--code", "b"), "give --synthetic"),
            (("--budget", "smoke", "--coding-code", "1.5"), "--coding-code"),
            (("--budget", "smoke", "--steps", "8"), "--steps: input should be greater than or equal to 9"),
            (("--budget", "smoke", "--size", "9b"), "--size: '9b' is no size; choose among"),
        ):
            result = cli("pretrain", *arguments)
            assert result.code == 2
            assert said in result.err
            assert result.err.count("\n") == 1

    def test_a_smoke_run(self, cli, places, folders):
        """Trained from end to end, evaluated on all its corpora, and a model with a tokenizer afterwards."""
        parts = [word for name, folder in zip(("language", "code", "synthetic"), folders.values(), strict=True)
                 for word in (f"--{name}", folder)]  # fmt: skip
        tokenizer = str(places / "tokenizer.json")
        command = ("pretrain", "--budget", "smoke", "--model", "rodimus", "--steps", 9, "--device", "cpu", *parts)
        result = cli(*command, "--tokenizer", tokenizer)
        assert result.code == 0, result.err
        (record,) = load_records(experiment="pretrain")
        assert record.env["data"]["stages"] == {"initial": 0, "coding": 7, "annealing": 8}
        assert record.metrics["valid_ppl"] > 1
        assert open_checkpoint(record.id).tokenizer().encode("cat")
