import json

import pytest
import tokenizers as backends
from hypothesis import given, settings
from hypothesis import strategies as st

from rodimus_lab.data import Tokenizer, load_tokenizer, padded_vocab_size, prepare
from rodimus_lab.data.encoding import Chunk, Encoder, token_dtype
from rodimus_lab.errors import UserError

# Spaces of every sort, contractions, marks, letters, numbers and emoji: what the splitting of GPT-2 turns on.
TRICKY = st.text(
    st.sampled_from(" \t\n\r\x1c\x85\u00a0\u2028\u200b's'tre,.!1²½éeÀ\u0301雨☂\ufe0f<|endoftext|>Z"), max_size=60
)


def whole(tokenizer, texts):
    ids = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_id)]
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    return b"".join(token.to_bytes(width, "little") for token in ids)


def word_level(entries):
    vocabulary = {f"w{i}": i + 2 for i in range(entries - 2)} | {"<unk>": 0, "<|endoftext|>": 1}
    backend = backends.Tokenizer(backends.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = backends.pre_tokenizers.Whitespace()
    return backend


@settings(deadline=None)
@given(text=st.text(max_size=80))
def test_decoding_undoes_encoding(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@settings(deadline=None, max_examples=300)
@given(texts=st.lists(TRICKY, min_size=1, max_size=3))
def test_encoding_in_pieces_equals_encoding_in_whole(tokenizer, texts):
    assert tokenizer.cuts_at_spaces
    assert Encoder(tokenizer)(Chunk(0, texts, 0)).ids == whole(tokenizer, texts)


@settings(deadline=None, max_examples=300)
@given(texts=st.lists(TRICKY, min_size=1, max_size=3))
def test_genuine_tokenizers_encode_in_pieces_as_in_whole(genuine_tokenizers, texts):
    for tokenizer, encoder in genuine_tokenizers:
        assert encoder(Chunk(0, texts, 0)).ids == whole(tokenizer, texts)


@pytest.fixture(scope="session")
def genuine_tokenizers(genuine_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RODIMUS_LAB_DATA", str(genuine_folder))
        loaded = [load_tokenizer(name) for name in ("gpt2", "gpt-neox")]
    assert all(tokenizer.cuts_at_spaces for tokenizer in loaded)
    return [(tokenizer, Encoder(tokenizer)) for tokenizer in loaded]


def test_the_paper_s_vocabularies(genuine_tokenizers):
    (gpt2, _), (gpt_neox, _) = genuine_tokenizers
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert (gpt_neox.vocab_size, gpt_neox.eos_id) == (50277, 0)
    assert gpt2.encode("Hello world, it's") == [15496, 995, 11, 340, 338]
    assert gpt_neox.vocab_size == padded_vocab_size("gpt-neox")


def test_padded_vocab_size_follows_table_5():
    assert padded_vocab_size("gpt2") == 50265
    assert padded_vocab_size("gpt-neox") == 50277


@pytest.mark.parametrize("added", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"content": "New York"}])
def test_a_tokenizer_whose_added_tokens_span_words_is_not_cut_at_spaces(tokenizer, added):
    backend = backends.Tokenizer.from_str(tokenizer.to_json())
    backend.add_tokens([backends.AddedToken(**({"content": "@@"} | added))])
    assert not Tokenizer("other", backend).cuts_at_spaces


def test_a_tokenizer_that_splits_otherwise_is_not_cut_at_spaces():
    tokenizer = Tokenizer("words", word_level(100))
    assert not tokenizer.cuts_at_spaces
    texts = ["w1 w2  w3", "w4"]
    assert Encoder(tokenizer)(Chunk(0, texts, 0)).ids == whole(tokenizer, texts)


def test_a_special_token_spelled_out_is_plain_text(tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode("one<|endoftext|>two")
    assert tokenizer.decode(tokenizer.encode("one<|endoftext|>two")) == "one<|endoftext|>two"


def test_a_batch_is_its_texts(tokenizer):
    texts = ["The cat", "", "sat on\n\nthe mat"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_written_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.to_file(tmp_path / "mine.json")
    again = load_tokenizer(str(tmp_path / "mine.json"))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.name.startswith("mine-")
    assert padded_vocab_size(str(tmp_path / "mine.json")) == tokenizer.vocab_size == 300


def test_ids_beyond_sixteen_bits_take_thirty_two(tmp_path, write_jsonl):
    tokenizer = Tokenizer("words", word_level(70_000))
    write_jsonl(tmp_path / "in" / "train.jsonl", ["w1 w69000", "w65534 nonsense"])
    prepared = prepare(str(tmp_path / "in"), tokenizer, workers=1, progress=False)
    assert prepared.manifest.dtype == "uint32"
    assert prepared.shards("train")[0].tolist() == [3, 69002, 1, 65536, 0, 1]
    assert [token_dtype(size) for size in (65536, 65537)] == ["uint16", "uint32"]


def test_pydoc_4096_has_4096_entries_and_is_kept():
    first = load_tokenizer("pydoc-4096")
    assert first.vocab_size == padded_vocab_size("pydoc-4096") == 4096
    assert first.decode(first.encode("def f(x): pass")) == "def f(x): pass"
    assert load_tokenizer("pydoc-4096").fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("name", "told"), [("gpt3", "did you mean 'gpt2'"), ("no/such/tokenizer.json", "no tokenizer at 'no/such")]
)
def test_an_unknown_tokenizer_is_an_error(name, told):
    with pytest.raises(UserError, match=told):
        load_tokenizer(name)


@pytest.mark.parametrize("content", ["", "{", json.dumps({"model": 1})])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(UserError, match=r"broken\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "broken.json"))


def test_a_tokenizer_without_an_end_of_document_token_is_an_error(tmp_path):
    backends.Tokenizer(backends.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "bare.json"))
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(str(tmp_path / "bare.json"))
