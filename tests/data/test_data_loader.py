import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rodimus_lab.data import IGNORED, BlockLoader, TokenBlocks, eval_batches
from rodimus_lab.errors import UserError

LENGTHS = (100, 1, 37, 250, 12)
TOKENS = np.arange(1, sum(LENGTHS) + 1)
SEQ_LEN = 7
BLOCKS = (len(TOKENS) - 1) // SEQ_LEN

laws = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def prepared(prepared_from):
    return prepared_from(TOKENS, LENGTHS)


@pytest.fixture
def blocks(prepared):
    return TokenBlocks(prepared, "train", SEQ_LEN)


def block_numbers(batch):
    """Which blocks a batch holds: the tokens are 1, 2, 3, ... so a block's first token tells."""
    inputs_BT, _ = batch
    return ((inputs_BT[:, 0] - 1) // SEQ_LEN).tolist()


def take(loader, count):
    return [next(loader) for _ in range(count)]


def equal(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_a_block_is_its_tokens_and_the_next_one_whatever_shards_they_span(blocks):
    assert len(blocks) == BLOCKS
    inputs_BT, targets_BT = blocks.batch(np.arange(BLOCKS))
    assert inputs_BT.dtype == targets_BT.dtype == torch.int64
    for i in range(BLOCKS):
        assert inputs_BT[i].tolist() == TOKENS[i * SEQ_LEN : (i + 1) * SEQ_LEN].tolist()
        assert targets_BT[i].tolist() == TOKENS[i * SEQ_LEN + 1 : (i + 1) * SEQ_LEN + 1].tolist()


@laws
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
)
def test_evaluation_covers_every_token_but_the_first_exactly_once(
    prepared_from, lengths, seq_len, batch_size, world_size
):
    tokens = np.arange(1, sum(lengths) + 1)
    if len(tokens) < 2:
        return
    prepared = prepared_from(tokens, lengths)
    ranks = [list(eval_batches(prepared, "train", seq_len, batch_size, rank, world_size)) for rank in range(world_size)]
    seen = []
    for inputs_BT, targets_BT in (batch for batches in ranks for batch in batches):
        assert inputs_BT.shape == targets_BT.shape
        assert inputs_BT.shape[1] == seq_len
        counted = targets_BT != IGNORED
        assert torch.equal(inputs_BT[counted] + 1, targets_BT[counted])
        seen += targets_BT[counted].tolist()
    assert sorted(seen) == list(range(2, len(tokens) + 1))
    assert len({tuple(inputs_BT.shape for inputs_BT, _ in batches) for batches in ranks}) == 1


@laws
@given(batch_size=st.integers(1, 2 * BLOCKS), seed=st.integers(0, 2**63), batches=st.integers(1, 12))
def test_each_epoch_takes_every_block_once_and_every_batch_is_full(blocks, batch_size, seed, batches):
    loader = BlockLoader(blocks, batch_size, seed)
    taken = []
    for batch in take(loader, batches):
        assert len(batch[0]) == batch_size
        taken += block_numbers(batch)
    for start in range(0, len(taken), BLOCKS):
        epoch = taken[start : start + BLOCKS]
        assert len(set(epoch)) == len(epoch)
    state = loader.state_dict()
    assert state["epoch"] * BLOCKS + state["position"] == len(taken)


@laws
@given(before=st.integers(0, 40), after=st.integers(1, 30), batch_size=st.integers(1, BLOCKS + 3))
def test_resuming_anywhere_gives_the_same_stream(blocks, before, after, batch_size):
    loader = BlockLoader(blocks, batch_size, seed=5)
    take(loader, before)
    resumed = BlockLoader(blocks, batch_size, seed=5)
    resumed.load_state_dict(loader.state_dict())
    assert equal(take(resumed, after), take(loader, after))
    assert resumed.state_dict() == loader.state_dict()


@laws
@given(world_size=st.integers(1, 6), share=st.integers(1, 9), steps=st.integers(1, 15))
def test_the_ranks_part_each_global_batch_between_them(blocks, world_size, share, steps):
    batch_size = world_size * share
    alone = BlockLoader(blocks, batch_size, seed=1)
    ranks = [BlockLoader(blocks, batch_size, 1, rank, world_size) for rank in range(world_size)]
    for _ in range(steps):
        parts = [next(rank) for rank in ranks]
        joined = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        assert equal([joined], [next(alone)])
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


def test_the_order_follows_from_seed_and_epoch(blocks):
    first, again, other = (BlockLoader(blocks, BLOCKS, seed) for seed in (0, 0, 1))
    epochs = [block_numbers(next(first)) for _ in range(2)]
    assert epochs == [block_numbers(next(again)) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != block_numbers(next(other))
    assert epochs[0] != sorted(epochs[0])


def test_the_order_hash_is_that_of_the_blocks_in_training_order(blocks):
    loader = BlockLoader(blocks, 4, seed=3, rank=1, world_size=2)
    before = loader.order_hash(20)
    take(loader, 9)
    assert loader.order_hash(20) == before == BlockLoader(blocks, 30, seed=3).order_hash(20)
    assert before != loader.order_hash(21)
    assert before != BlockLoader(blocks, 4, seed=4).order_hash(20)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 9}, "seed 9, and now it is 3"),
        ({"num_blocks": 5}, "num_blocks 5, and now it is 57"),
        ({"fingerprint": "other"}, "fingerprint other"),
        ({"position": BLOCKS}, "does not exist"),
        ({"epoch": -1}, "does not exist"),
    ],
)
def test_a_state_of_other_data_is_refused(blocks, change, told):
    loader = BlockLoader(blocks, 4, seed=3)
    with pytest.raises(UserError, match=told):
        loader.load_state_dict(loader.state_dict() | change)
    with pytest.raises(UserError, match="lacks 'seed'"):
        loader.load_state_dict({key: value for key, value in loader.state_dict().items() if key != "seed"})


def test_the_fingerprint_follows_the_tokens(prepared_from, blocks):
    changed = TOKENS.copy()
    changed[200] += 1
    other = TokenBlocks(prepared_from(changed, LENGTHS), "train", SEQ_LEN)
    assert other.fingerprint != blocks.fingerprint
    loader = BlockLoader(other, 4, seed=0)
    with pytest.raises(UserError, match="fingerprint"):
        loader.load_state_dict(BlockLoader(blocks, 4, seed=0).state_dict())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"batch_size": 5, "world_size": 2}, "batch of 5 does not divide over 2 ranks"),
        ({"batch_size": 0}, "batch of 0"),
        ({"seed": -1}, "must not be negative"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
    ],
)
def test_a_loader_out_of_range_is_an_error(blocks, arguments, told):
    with pytest.raises(UserError, match=told):
        BlockLoader(**({"blocks": blocks, "batch_size": 4, "seed": 0} | arguments))


def test_a_split_shorter_than_a_block_is_an_error(prepared):
    with pytest.raises(UserError, match="has 400 tokens, fewer than the 401"):
        TokenBlocks(prepared, "train", 400)
    assert len(TokenBlocks(prepared, "train", 399)) == 1
    assert len(TokenBlocks(prepared, "train", 400, keep_tail=True)) == 1
