"""Documents with a needle: their exact layout and length, what is held out, what counts, and the loader's position."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from rodimus_lab.config import ConfigError
from rodimus_lab.data import prepare
from rodimus_lab.data.loader import rng
from rodimus_lab.data.needle import NeedleConfig, NeedleDocuments, NeedleLoader, Relation, needle_batches
from rodimus_lab.errors import UserError

RELATION = Relation(needle="The word of {key} is {value}.", question="\nWord of {key}?", answer=" It is {value}.")
DATA = NeedleConfig(
    corpus="pydoc",
    tokenizer="pydoc-4096",
    seq_len=120,
    shortest=40,
    before="Read: ",
    after="\nNow:",
    relations=(RELATION,),
    keys=("time", "size", "name", "path"),
    values=(("old", "new", "big"), ("line", "file", "list", "set", "text", "code")),
    eval_documents=5,
)


@pytest.fixture
def prepared(places):
    return prepare("pydoc", "pydoc-4096", progress=False)


@pytest.fixture
def documents(prepared):
    return NeedleDocuments(DATA, prepared)


def parts(documents: NeedleDocuments, ids: np.ndarray, answer: int) -> tuple[str, str]:
    """The prompt and the answer as text."""
    return documents.tokenizer.decode(ids[:answer]), documents.tokenizer.decode(ids[answer:])


@pytest.mark.parametrize("length", [40, 41, 77, 120])
def test_a_document_is_laid_out_word_for_word(documents, length) -> None:
    ids, at = documents.document(rng(0, length), "train", length)
    assert len(ids) == length
    assert ids[-1] == documents.tokenizer.eos_id
    prompt, answer = parts(documents, ids, at)
    value = answer.removeprefix(" It is ").removesuffix(".")
    assert value in DATA.all_values
    head, found, tail = prompt.partition("\nThe word of ")
    assert found
    assert head.startswith("Read: ")
    key = tail.split(" is ")[0]
    assert tail.startswith(f"{key} is {value}.\n")
    assert tail.endswith(f"\nNow:\nWord of {key}?")
    assert DATA.split_of(key, value) == "train"


def test_depths_are_spread_over_the_whole_haystack(documents) -> None:
    starts = []
    for index in range(200):
        ids, at = documents.document(rng(1, index), "train", 120)
        starts.append(parts(documents, ids, at)[0].partition("\nThe word of ")[0])
    tokens = [len(documents.tokenizer.encode(text)) for text in starts]
    assert min(tokens) < 15
    assert max(tokens) > 70


def test_no_answer_is_likelier_than_another_among_held_out_pairs() -> None:
    data = DATA.replace(hold_out="pair", keys=tuple(f"key {number}" for number in range(16)))
    for split, share in {"train": 12, "valid": 2, "test": 2}.items():
        counts = {value: sum(data.split_of(key, value) == split for key in data.keys) for value in data.all_values}
        assert set(counts.values()) == {share}
    orders = {tuple(data.split_of(key, value) for key in data.keys) for value in data.all_values}
    assert len(orders) > 1, "the same keys are held out of every value"


@pytest.mark.parametrize("hold_out", ["value", "pair"])
def test_what_is_held_out_is_never_hidden_in_training(prepared, hold_out) -> None:
    data = DATA.replace(hold_out=hold_out)
    documents = NeedleDocuments(data, prepared)
    seen = {}
    for split in ("train", "valid", "test"):
        found = set()
        for index in range(300):
            ids, at = documents.document(rng(2, index), split, 40)
            prompt, answer = parts(documents, ids, at)
            value = answer.removeprefix(" It is ").removesuffix(".")
            key = prompt.rpartition("Word of ")[2].removesuffix("?")
            found.add(value if hold_out == "value" else (key, value))
        seen[split] = found
    assert all(seen.values())
    assert not seen["train"] & (seen["valid"] | seen["test"])
    assert not seen["valid"] & seen["test"]


def test_rows_are_full_of_documents_and_count_answers_only(documents) -> None:
    tokenizer, eos = documents.tokenizer, documents.tokenizer.eos_id
    lengths = set()
    for index in range(30):
        inputs_T, targets_T = documents.row(rng(3, index))
        assert inputs_T.shape == targets_T.shape == (120,)
        counted = targets_T != -100
        assert np.array_equal(targets_T[:-1][counted[:-1]], inputs_T[1:][counted[:-1]])
        ends = np.flatnonzero(targets_T == eos)
        assert ends[-1] == 119
        lengths |= {int(b - a) for a, b in pairwise([-2, *ends])}
        for text in tokenizer.decode(targets_T[counted].tolist()).split(" It is ")[1:]:
            assert text.removesuffix(".") in DATA.all_values
    assert min(lengths) >= DATA.shortest - 1
    assert len(lengths) > 5


def test_all_tokens_may_count(prepared) -> None:
    whole = NeedleDocuments(DATA.replace(answers_only=False), prepared)
    inputs_T, targets_T = whole.row(rng(3, 0))
    assert np.array_equal(targets_T[:-1], inputs_T[1:])
    assert (whole.row(rng(3, 0), "test")[1] == -100).any()


def test_evaluation_is_one_document_a_row_the_same_over_all_ranks(documents) -> None:
    alone = torch.cat([torch.cat(pair, 1) for pair in needle_batches(documents, "test", 2)])
    assert alone.shape == (5, 240)
    assert ((alone[:, 120:] == documents.tokenizer.eos_id).sum(1) == 1).all()
    ranks = [torch.cat([torch.cat(pair, 1) for pair in needle_batches(documents, "test", 2, r, 2)]) for r in range(2)]
    assert [len(rows) for rows in ranks] == [3, 3]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1)[:5], alone)
    assert (ranks[1][2, 120:] == -100).all()


def test_the_loader_goes_on_where_it_was_and_shares_rows_among_ranks(documents) -> None:
    loader = NeedleLoader(documents, 4, seed=7)
    first, state, second = next(loader), loader.state_dict(), next(loader)
    resumed = NeedleLoader(documents, 4, seed=7)
    resumed.load_state_dict(state)
    assert all(map(torch.equal, next(resumed), second))
    assert not torch.equal(first[0], second[0])
    ranks = [NeedleLoader(documents, 4, 7, rank, 2) for rank in range(2)]
    for whole in (first, second):
        assert torch.equal(torch.cat([next(rank)[0] for rank in ranks]), whole[0])
    with pytest.raises(UserError, match="seed 7, and now it is 8"):
        NeedleLoader(documents, 4, 8).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shortest": 15}, "a document takes up to"),
        ({"keys": ("time",), "values": (("old",),)}, "no needle is left to the"),
        ({"seq_len": 10**6}, "has no .* tokens in a shard"),
    ],
)
def test_what_cannot_be_drawn_is_refused(prepared, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        NeedleDocuments(DATA.replace(**changes), prepared).row(rng(0, 0), "test")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DATA.replace(shortest=121), "more than the row's 120"),
        (lambda: Relation(needle="x", question="", answer="{value}"), "'needle' has no {value}"),
        (lambda: Relation(needle="{value}", question="{value}?", answer="{value}"), "gives the {value} away"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(make, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_values_of_the_corpus_own_words(prepared) -> None:
    documents = NeedleDocuments(DATA.replace(values=3, shortest=60), prepared)
    tokenizer = documents.tokenizer
    corpus = tokenizer.decode(np.concatenate(prepared.shards("train")).tolist())
    seen = {split: set() for split in ("train", "valid", "test")}
    for number in range(300):
        split = tuple(seen)[number % 3]
        ids, at = documents.document(rng(1, number), split, 80)
        seen[split].add(parts(documents, ids, at)[1].removeprefix(" It is ").removesuffix("."))
    values = set.union(*seen.values())
    words = [value.replace(" of the ", " ").replace(" of ", " ").split(" ") for value in values]
    assert {len(value) for value in words} == {1, 2, 3}
    assert {" of " in value for value in values} == {False, True}
    lengths = {word: len(tokenizer.encode(f" {word}")) for word in {word for value in words for word in value}}
    assert all(word[0].isupper() and f" {word}" in corpus for word in lengths)
    assert set(lengths.values()) == {1, 2, 3}, "parts of words are to be copied, too"
    assert not seen["train"] & (seen["valid"] | seen["test"])


def test_a_corpus_without_such_words_is_named(prepared, monkeypatch) -> None:
    monkeypatch.setattr(type(prepared.tokenizer()), "decode", lambda self, ids: "low")
    with pytest.raises(UserError, match="'pydoc' has no capitalised words; list the keys"):
        NeedleDocuments(DATA.replace(values=3), prepared)


def test_no_document_is_longer_than_the_longest_frame(prepared) -> None:
    relation = RELATION.replace(question="\n{word0} {word1} of {key}?")
    documents = NeedleDocuments(DATA.replace(relations=(relation,), keys=3, values=3, shortest=100), prepared)
    assert documents.longest_frame < 100
    for number in range(2000):  # Raises where a frame has no room.
        documents.document(rng(5, number), "train", documents.longest_frame)


def test_sentences_and_keys_of_drawn_words(prepared) -> None:
    """The same words in the sentence, the question and the answer, others in the next document."""
    relation = Relation(
        needle="By {key} the {word1} {word0} is {value}.", question="\nThe {word1} {word0}?", answer=" It is {value}."
    )
    documents = NeedleDocuments(DATA.replace(relations=(relation,), keys=2, values=1, shortest=55), prepared)
    seen = set()
    for number in range(40):
        ids, at = documents.document(rng(2, number), "train", 80)
        prompt, answer = parts(documents, ids, at)
        words = prompt.rpartition("\nThe ")[2].removesuffix("?")
        value = answer.removeprefix(" It is ")
        key, _, rest = prompt.partition("\nBy ")[2].partition(f" the {words} is ")
        assert rest.startswith(f"{value}\n")
        assert 1 <= len(key.replace(" of the ", " ").replace(" of ", " ").split(" ")) <= 2
        assert words.islower()
        seen.add(words)
    assert len(seen) > 20
    frequent = [documents._word(rng(4, number)) for number in range(300)]
    assert 0.2 < sum(word in documents._words[:10] for word in frequent) / 300 < 0.4


def test_pairs_want_keys_that_are_listed() -> None:
    with pytest.raises(ConfigError, match="keys that are listed"):
        DATA.replace(keys=2, hold_out="pair")
