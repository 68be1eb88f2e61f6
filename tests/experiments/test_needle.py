"""The recipe `needle`: its form is NeedleBench's, and at the smoke budget a model learns to find what it never saw."""

from __future__ import annotations

import re

import pytest
import torch

from evals.needlebench import Source, Spec
from evals.needlebench.prompts import Prompts
from evals.needlebench.source import Needle
from evals.needlebench.spec import Cell
from experiments.needle import SHORT_VALUES, needle
from rodimus_lab.data import prepare
from rodimus_lab.data.loader import rng
from rodimus_lab.data.needle import NeedleConfig, NeedleDocuments
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import load_records
from rodimus_lab.scoring import recall
from rodimus_lab.train.feed import asked


def full(answers_only: bool | None = None) -> Recipe:
    (recipe,) = needle(budget="short", answers_only=answers_only)
    return recipe


def test_a_recipe_is_read_back_as_it_was() -> None:
    for recipe in (full(), *needle(budget="smoke")):
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert recipe.to_dict()["data"]["task"] == "needle"
    assert full() != full(answers_only=True)


def test_the_prompt_is_that_of_single_needle_retrieval(places) -> None:
    """A document, up to its answer, is the prompt that NeedleBench's code makes of the same needle."""
    prepared = prepare("pydoc", "pydoc-4096", progress=False)
    data = full().data
    assert isinstance(data, NeedleConfig)
    as_asked = tuple(relation for relation in data.relations if relation.needle == relation.answer)
    data = data.replace(corpus="pydoc", tokenizer="pydoc-4096", shortest=400, relations=as_asked)
    documents = NeedleDocuments(data, prepared)
    ids, at = documents.document(rng(0, 0), "train", 700)
    prompt = documents.tokenizer.decode(ids[:at])
    answer = documents.tokenizer.decode(ids[at:])
    gap = prompt.rpartition("in the format '")[2].removesuffix("'\n\n")
    question = prompt.rpartition("Now, the question is: ")[2].partition(" Before answering")[0]
    assert f"\n{answer}\n" in prompt
    value = answer.removeprefix(gap.partition("________")[0]).strip()
    hidden = Needle("en", answer, f"{question} Please answer in the format '{gap}'", value, "")
    before, _, rest = prompt.partition(f"\n{answer}\n")
    haystack = before.partition("by the user is ")[2] + rest.partition("\n\nNow, the question is: ")[0]
    length = len(documents.tokenizer.encode(haystack)) + len(documents.tokenizer.encode(f"\n{answer}\n"))
    spec = Spec(lengths=(length,), buffer=0, repeats=1, length_tokenizer="model")
    example = Prompts(spec, Source({"en": [haystack]}, [hidden]), documents.tokenizer).examples(
        Cell("single_retrieval", "en", length, 1, 0)
    )[0]
    start, end = example.prompt.split(f"\n{answer}\n")
    assert prompt.startswith(start)
    assert prompt.endswith(end[len(haystack) :])


def test_no_needle_is_one_of_needlebench() -> None:
    """Beside what is drawn, none of its sentences' words but the small ones stands in ours."""
    data = full().data
    assert isinstance(data, NeedleConfig)
    assert isinstance(data.keys, int)
    assert isinstance(data.values, int)
    theirs = {"first", "band", "perform", "ruler", "star", "system", "legendary", "item", "hidden", "island", "moon"}
    for relation in data.relations:
        said = relation.needle + relation.answer + relation.question.partition("question is: ")[2]
        assert not theirs & set(re.findall(r"[a-z]+", re.sub(r"\{.*?\}", "", said).lower()))
    assert len({relation.question for relation in data.relations}) == len(data.relations) > 90


def test_the_sentence_differs_from_the_answer_in_every_way() -> None:
    data = full().data
    assert isinstance(data, NeedleConfig)
    the_same = [relation.needle == relation.answer for relation in data.relations]
    skipped = [relation.answer.replace(" the {value}", "________") in relation.question for relation in data.relations]
    partly = ["{word1} {value}" in relation.needle for relation in data.relations]
    for chosen in (the_same, skipped, partly):
        assert 0.2 < sum(chosen) / len(chosen) < 0.6
    assert not any(map(all, zip(the_same, partly, strict=True)))
    for relation in data.relations:
        gap = relation.question.rpartition("'")[0].rpartition("'")[2].removesuffix("________.")
        assert relation.answer.startswith(gap), "the answer is not of the form that is asked for"


def test_held_out_answers_are_counted_whole() -> None:
    """Of four rows with two-token answers: right, half right, wrong, and one that asks nothing."""

    class Reciting(torch.nn.Module):
        """Its logits are its own inputs: the likeliest next token is the current one."""

        def logits_at(self, ids_BT, positions_BP):
            return 50 * torch.nn.functional.one_hot(ids_BT.gather(1, positions_BP), 9).float()

    inputs_BT = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    targets_BT = torch.tensor([[-100, 2, 3], [-100, 2, 4], [-100, 8, 4], [-100, -100, -100]])
    counts = recall(Reciting(), [asked(inputs_BT, targets_BT)], torch.device("cpu"))  # type: ignore[arg-type]
    nats, tokens, right, rows, whole = counts.tolist()
    assert (tokens, right, rows, whole) == (6, 3, 3, 1)
    assert nats == pytest.approx(150, rel=1e-3)


@pytest.mark.slow
def test_the_model_learns_to_find_held_out_needles(cli, places) -> None:
    result = cli("needle", "--budget", "smoke", "--device", "cpu")
    assert result.code == 0, result.err
    (record,) = load_records(experiment="needle")
    assert record.metrics["test_accuracy"] > 3 / len(SHORT_VALUES)
    assert record.metrics["test_ppl"] < len(SHORT_VALUES)
    assert "needle.md" in result.out
    assert isinstance(Recipe.from_dict(record.recipe).model, LanguageModelConfig)


def test_bad_options(cli, places) -> None:
    result = cli("needle", "--model", "bert")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "no model named 'bert'" in result.err
    assert "--steps" in cli("needle", "--steps", "0").err
