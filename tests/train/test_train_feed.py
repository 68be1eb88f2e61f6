import pytest
import torch
from train_fakes import tiny_recipe

from rodimus_lab.data import Tokenizer, load_tokenizer, train_bpe
from rodimus_lab.data.mixture import MixtureConfig, StageConfig
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import IGNORE
from rodimus_lab.recipe import DataConfig
from rodimus_lab.train.distributed import World
from rodimus_lab.train.evaluation import filled
from rodimus_lab.train.feed import open_feed

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Three small files, and a byte-level tokenizer of their words."""
    monkeypatch.setenv("RODIMUS_LAB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tale"
    folder.mkdir()
    sentence = "the cat sat on the mat and the dog sat on the log\n"
    for split, count in (("train", 120), ("valid", 9), ("test", 14)):
        (folder / f"{split}.txt").write_text("".join(f"{number} {sentence}" for number in range(count)))
    Tokenizer("tale", train_bpe([sentence] * 20, 280)).to_file(tmp_path / "tokenizer.json")
    data = DataConfig(corpus=str(folder), tokenizer=str(tmp_path / "tokenizer.json"), seq_len=16)
    made = tiny_recipe().replace(data=data)
    return made.replace(model=made.model.replace(vocab_size=300))


def targets_of(feed, split, rows):
    return [targets[targets != IGNORE] for _, targets in feed.evaluation[split](rows)]


def test_every_token_is_evaluated_once_over_the_ranks(recipe):
    alone = open_feed(recipe, World(0, 1, CPU))
    of_three = recipe.replace(budget=recipe.budget.replace(batch_size=6))
    ranks = [open_feed(of_three, World(rank, 3, CPU)) for rank in range(3)]
    assert set(alone.evaluation) == {"valid", "test"}
    for split in alone.evaluation:
        tokens = alone.facts["tokens"][split]
        whole = torch.cat(targets_of(alone, split, 4))
        parts = torch.cat([torch.cat(targets_of(feed, split, 2)) for feed in ranks])
        assert len(whole) == len(parts) == tokens - 1
        assert torch.equal(whole.sort().values, parts.sort().values)
        assert len({len(list(feed.evaluation[split](2))) for feed in ranks}) == 1


def test_words_and_facts(recipe):
    feed = open_feed(recipe, World(0, 1, CPU))
    assert feed.words == {"valid": 9 * 14, "test": 14 * 14}
    assert set(feed.facts["fingerprints"]) == {"train", "valid", "test"}
    assert feed.facts["tokenizer_fingerprint"] == load_tokenizer(recipe.data.tokenizer).fingerprint
    assert open_feed(recipe, World(0, 1, CPU)).facts == feed.facts
    assert open_feed(recipe.replace(seed=1), World(0, 1, CPU)).facts["order_hash"] != feed.facts["order_hash"]


def test_the_ranks_share_a_global_batch(recipe):
    inputs, targets = next(open_feed(recipe, World(0, 1, CPU)).train)
    halves = [next(open_feed(recipe, World(rank, 2, CPU)).train) for rank in range(2)]
    assert inputs.shape == (8, 16)
    assert torch.equal(torch.cat([half[0] for half in halves]), inputs)
    assert torch.equal(torch.cat([half[1] for half in halves]), targets)


def test_a_vocabulary_too_small_for_the_tokenizer(recipe):
    small = recipe.replace(model=recipe.model.replace(vocab_size=64))
    with pytest.raises(UserError, match=r"has \d+ tokens, but the model's vocabulary only 64"):
        open_feed(small, World(0, 1, CPU))


def test_filled_rows_count_nothing():
    (inputs, targets), (last_inputs, last_targets) = filled(
        [(torch.ones(3, 4).long(), torch.ones(3, 4).long()), (torch.ones(1, 4).long(), torch.ones(1, 4).long())], 3
    )
    assert inputs.shape == last_inputs.shape == targets.shape == last_targets.shape == (3, 4)
    assert (last_targets[1:] == IGNORE).all()
    assert (targets != IGNORE).all()


def test_packed_data_says_where_documents_end(recipe):
    packed = recipe.replace(data=recipe.data.replace(packed=True))
    assert open_feed(recipe, World(0, 1, CPU)).end_token is None
    assert open_feed(packed, World(0, 1, CPU)).end_token == load_tokenizer(recipe.data.tokenizer).eos_id


@pytest.mark.parametrize("mixture", [False, True])
def test_ranks_that_share_sequences_read_the_same_and_part_them(recipe, mixture):
    if mixture:
        stage = StageConfig(name="only", share=1.0, weights={recipe.data.corpus: 1.0})
        data = MixtureConfig(tokenizer=recipe.data.tokenizer, seq_len=16, stages=(stage,))
        recipe = recipe.replace(data=data)
    worlds = [World(rank, 4, CPU, parts=2) for rank in range(4)]
    batches = [next(open_feed(recipe, world).train) for world in worlds]
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[1], strict=True))
    assert not torch.equal(batches[0][0], batches[2][0])
    parts = [world.part_of(batch)[0] for world, batch in zip(worlds, batches, strict=True)]
    assert torch.equal(torch.cat(parts[:2], dim=1), batches[0][0])
    assert [part.shape for part in parts] == [(4, 8)] * 4
    scored = [list(open_feed(recipe, world).evaluation["test"](2)) for world in worlds]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(scored[0], scored[1], strict=True))
    assert not torch.equal(scored[0][0][0], scored[2][0][0])
