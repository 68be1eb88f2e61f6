"""Packed documents: their boundaries reach the mixers, in training and in scoring; recipes of before keep their ids."""

from __future__ import annotations

import pytest
import torch
from train_fakes import VOCAB, tiny_model, tiny_recipe

from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.ops import Segments
from rodimus_lab.recipe import DataConfig
from rodimus_lab.scoring import negative_log_likelihood
from rodimus_lab.train.distributed import World
from rodimus_lab.train.optimizer import build_optimizer, decay_groups
from rodimus_lab.train.step import Stepper

END = 7
LENGTHS = (5, 1, 4, 6)


@pytest.fixture
def model() -> LanguageModel:
    return tiny_model(mixing=True).build().double()


@pytest.fixture
def row() -> torch.Tensor:
    """16 tokens in four documents, each closed by END."""
    ids = torch.randint(8, VOCAB, (sum(LENGTHS),))
    ids[torch.tensor(LENGTHS).cumsum(0) - 1] = END
    return ids[None]


def by_document(model: LanguageModel, row: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss with each document given to the model by itself: the definition."""
    parts = zip(row[0].split(LENGTHS), targets[0].split(LENGTHS), strict=True)
    return sum(model.loss(ids[None], wanted[None], reduction="sum") for ids, wanted in parts)


def test_documents_begin_after_their_ends(row):
    assert Segments.after_ends(row, END).ids_BT[0].tolist() == [0] * 5 + [1] + [2] * 4 + [3] * 6


def test_a_step_has_the_gradient_of_the_documents_one_by_one(model, row):
    recipe = tiny_recipe(dropout=0.0, mixing=True)
    targets = torch.roll(row, -1)
    by_document(model, row, targets).div(row.numel()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    def gradients(end_token: int | None) -> dict[str, torch.Tensor]:
        optimizer = build_optimizer(model, decay_groups(model), recipe.optimizer)
        world = World(0, 1, torch.device("cpu"))
        Stepper(model, optimizer, recipe, world, 1, end_token=end_token).backward(row, targets)
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    packed, joined = gradients(END), gradients(None)
    assert all(torch.allclose(packed[name], expected[name], atol=1e-12) for name in expected)
    assert not all(torch.allclose(joined[name], expected[name], atol=1e-6) for name in expected)


def test_scoring_reads_documents_by_themselves(model, row):
    targets = torch.roll(row, -1)
    total = negative_log_likelihood(model, [(row, targets)], torch.device("cpu"), END)
    assert total[0].item() == pytest.approx(by_document(model, row, targets).item())
    assert total[1] == row.numel()


def test_only_packed_recipes_say_so():
    joined = DataConfig(corpus="a", tokenizer="b", seq_len=4)
    packed = joined.replace(packed=True)
    assert "packed" not in joined.to_dict()
    assert DataConfig.from_dict(packed.to_dict()) == packed
    assert DataConfig.from_dict(joined.to_dict()) == joined
    assert joined.digest() != packed.digest()
