"""MQAR data: every example obeys the task, and the distribution is that of a slow, obvious definition of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rodimus_lab.config import ConfigError
from rodimus_lab.data.mqar import (
    BASED,
    IGNORE,
    PAPER_PAIRS,
    SEEDS,
    ZOOLOGY_PAIRS,
    MqarConfig,
    MqarSegment,
    draw,
    generate,
    seed_of_test,
    single,
)
from rodimus_lab.errors import UserError

SIZES = st.integers(1, 6).flatmap(
    lambda pairs: st.tuples(st.just(pairs), st.integers(2 * pairs, 2 * pairs + 12).map(lambda half: 2 * half))
)


def one_by_one(seq_len: int, num_pairs: int, vocab_size: int, power_a: float, random: np.random.Generator):
    """The definition, an example at a time, one draw after another."""
    keys = random.choice(np.arange(1, vocab_size // 2), num_pairs, replace=False)
    values = random.choice(np.arange(vocab_size // 2, vocab_size), num_pairs, replace=False)
    inputs, labels = [0] * seq_len, [IGNORE] * seq_len
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        inputs[2 * index : 2 * index + 2] = [key, value]
    free = list(range((seq_len - 2 * num_pairs) // 2))
    for key, value in zip(keys, values, strict=True):
        weights = np.array([(place + 1.0) ** (power_a - 1) for place in free])
        place = free.pop(random.choice(len(free), p=weights / weights.sum()))
        inputs[2 * num_pairs + 2 * place] = key
        labels[2 * num_pairs + 2 * place] = value
    return inputs, labels


def places_in_turn(inputs: np.ndarray, num_pairs: int) -> tuple[int, ...]:
    """Where each pair is asked for, pair by pair."""
    asked = list(inputs[2 * num_pairs :])
    return tuple(asked.index(key) // 2 for key in inputs[: 2 * num_pairs : 2])


def far_from(counts: Mapping, expected: Mapping) -> float:
    """Pearson's chi-square in standard deviations from its mean."""
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    chi = sum((counts.get(key, 0) - total * p) ** 2 / (total * p) for key, p in expected.items())
    freedom = len(expected) - 1
    return (chi - freedom) / (2 * freedom) ** 0.5


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 2**31), st.booleans(), st.sampled_from([0.01, 0.5, 1.0]))
def test_every_example_obeys_the_task(sizes, seed, random_non_queries, power_a):
    pairs, seq_len = sizes
    vocab = seq_len + 2
    inputs, labels = generate(5, seq_len, pairs, vocab, power_a, random_non_queries, seed)
    assert inputs.dtype == labels.dtype == np.int64
    assert inputs.shape == labels.shape == (5, seq_len)
    for tokens, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        recalled = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(recalled) == len(set(recalled.values())) == pairs
        assert all(0 < key < vocab // 2 <= value < vocab for key, value in recalled.items())
        asked = [place for place, label in enumerate(wanted) if label != IGNORE]
        assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)
        assert sorted(tokens[place] for place in asked) == sorted(recalled)
        assert all(recalled[tokens[place]] == wanted[place] for place in asked)
        fillers = [token for place, token in enumerate(tokens[2 * pairs :], 2 * pairs) if place not in asked]
        assert all(0 <= token < vocab for token in fillers)
        assert random_non_queries or not any(fillers)


@pytest.mark.parametrize("power_a", [0.01, 1.0, 2.0])
def test_places_are_drawn_in_turn_by_the_power_law(power_a):
    """Against the exact probability of every ordered choice of 3 places out of 6, and the definition with them."""
    pairs, seq_len, vocab, free = 3, 18, 32, 6
    weights = [(place + 1) ** (power_a - 1) for place in range(free)]
    exact = {}
    for choice in permutations(range(free), pairs):
        exact[choice], left = 1.0, sum(weights)
        for place in choice:
            exact[choice] *= weights[place] / left
            left -= weights[place]
    inputs, _ = generate(40_000, seq_len, pairs, vocab, power_a, seed=3)
    assert far_from(Counter(places_in_turn(row, pairs) for row in inputs), exact) < 5
    random = np.random.default_rng(5)
    slow = [one_by_one(seq_len, pairs, vocab, power_a, random)[0] for _ in range(4_000)]
    assert far_from(Counter(places_in_turn(np.array(row), pairs) for row in slow), exact) < 5
    even = dict.fromkeys(exact, 1 / len(exact))
    differs = far_from(Counter(places_in_turn(row, pairs) for row in inputs), even) > 5
    assert differs == (power_a != 1.0)


def test_keys_and_values_are_any_distinct_ones():
    inputs, _ = generate(40_000, 8, 2, 12, seed=1)
    for column, tokens in ((0, range(1, 6)), (1, range(6, 12))):
        choices = list(permutations(tokens, 2))
        counts = Counter(map(tuple, inputs[:, [column, column + 2]].tolist()))
        assert far_from(counts, dict.fromkeys(choices, 1 / len(choices))) < 5


def test_a_filler_may_be_any_token():
    inputs, labels = generate(4_000, 16, 1, 20, random_non_queries=True, seed=1)
    fillers = inputs[:, 2:][labels[:, 2:] == IGNORE]
    assert far_from(Counter(fillers.tolist()), dict.fromkeys(range(20), 1 / 20)) < 5


def test_all_places_are_taken_where_they_just_suffice():
    inputs, labels = generate(100, 64, 16, 128)
    assert (labels[:, 32::2] != IGNORE).all()
    assert (np.sort(inputs[:, 32::2]) == np.sort(inputs[:, :32:2])).all()


def test_a_seed_is_the_data():
    """Whole blocks are alike however many examples follow them."""
    few, many = generate(4096, 16, 2, 64, seed=7), generate(9000, 16, 2, 64, seed=7)
    assert all((a == b[:4096]).all() for a, b in zip(few, many, strict=True))
    assert (generate(4096, 16, 2, 64, seed=8)[0] != few[0]).any()


def test_no_test_example_is_a_training_example():
    data = single(128, 8, num_train=20_000, num_test=3_000)
    (train,), (test,) = draw(data, data.train), draw(data, [data.test], test=True)
    seen = {row.tobytes() for row in train.inputs_NT}
    assert len(seen) == 20_000
    assert not seen & {row.tobytes() for row in test.inputs_NT}
    assert seed_of_test(0) == SEEDS > data.seed
    with pytest.raises(UserError, match="must be from 0"):
        seed_of_test(SEEDS)


def test_the_compact_form_is_the_same_data():
    data = single(32, 4, num_train=5_000, num_test=10)
    for segments, test, seed in ((data.train, False, data.seed), ([data.test], True, seed_of_test(data.seed))):
        (examples,) = draw(data, segments, test=test)
        inputs, labels = generate(len(examples.inputs_NT), 32, 4, seed=seed)
        assert (examples.inputs_NT == inputs).all()
        assert (np.take_along_axis(labels, examples.positions_NP.astype(np.int64), 1) == examples.answers_NP).all()
        assert (labels != IGNORE).sum() == examples.answers_NP.size


def test_presets():
    assert PAPER_PAIRS == {128: 8, 256: 16, 512: 32, 1024: 256}
    assert ZOOLOGY_PAIRS[512] == 64
    assert (BASED.num_train, BASED.seq_len, BASED.test.seq_len) == (180_000, 256, 1024)
    assert single(128, 8).corpus == "mqar-128x8"
    assert MqarConfig.from_dict(BASED.to_dict()) == BASED


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_examples": 0}, "0 examples"),
        ({"num_examples": -1}, "-1 examples"),
        ({"num_examples": 10**15}, "1,000,000,000,000,000 examples of 16 tokens take 256,000,000 GB"),
        ({"num_examples": 4.0}, "num_examples is 4.0; give a whole number"),
        ({"num_examples": "4"}, "num_examples is '4'"),
        ({"seq_len": -2}, "the length -2 is too short"),
        ({"seq_len": None}, "seq_len is None"),
        ({"num_pairs": 0}, "0 pairs"),
        ({"seq_len": 15}, "the length 15 is odd"),
        ({"num_pairs": 5}, "take 20 tokens, more than 16; give at most 4 pairs"),
        ({"num_pairs": 2.5}, "num_pairs is 2.5"),
        ({"vocab_size": 16}, "a vocabulary of 16 is too small"),
        ({"vocab_size": 2**31 + 1}, "a vocabulary of 2147483649 is too large"),
        ({"power_a": 0.0}, "must be above 0"),
        ({"power_a": float("nan")}, "must be above 0"),
        ({"power_a": float("inf")}, "at most 8"),
        ({"power_a": "x"}, "the power of the gaps is 'x'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": -1}, "the data seed is -1"),
        ({"seed": 2**32}, "the data seed is 4294967296"),
    ],
)
def test_what_cannot_be_is_refused(changes, named):
    with pytest.raises(UserError, match=named) as refusal:
        generate(**{"num_examples": 4, "seq_len": 16, "num_pairs": 2, "vocab_size": 64} | changes)
    assert "\n" not in str(refusal.value)


def test_sizes_may_be_numpys():
    ours = generate(np.int64(4), np.int8(64), np.int8(16), np.int32(66), seed=np.uint32(3))
    assert all((a == b).all() for a, b in zip(ours, generate(4, 64, 16, 66, seed=3), strict=True))


def test_a_config_of_what_cannot_be_is_refused():
    segment = MqarSegment(num_examples=4, seq_len=16, num_pairs=5)
    with pytest.raises(ConfigError, match="5 pairs and as many questions"):
        MqarConfig(train=(segment,), test=segment)
    segment = MqarSegment(num_examples=4, seq_len=16, num_pairs=2)
    assert MqarConfig(train=(segment,), test=segment, seed=SEEDS - 1).seed == SEEDS - 1
    with pytest.raises(ConfigError, match="leaves too few for 2 segments"):  # The second would be a test set's.
        MqarConfig(train=(segment, segment), test=segment, seed=SEEDS - 1)
    data = MqarConfig(train=(MqarSegment(num_examples=10**15, seq_len=16, num_pairs=2),), test=segment)
    with pytest.raises(UserError, match="more than this machine's"):
        draw(data, data.train)
