"""`rodimus-lab convert`, `generate` and `chat` on checkpoint directories."""

from __future__ import annotations

import io
import json
import os

import convert_official as official
import pytest
import torch
from safetensors.torch import load_file

from rodimus_lab.convert import CHAT_TEMPLATE, Chat, ChatTokenizer, open_checkpoint, open_directory, tensors
from rodimus_lab.data import train_bpe
from rodimus_lab.errors import UserError

SPECIAL = ["<|startoftext|>", "[CLS]", "[gMASK]", "<role>", "</role>"]
CONVERSATION = [
    {"role": "HUMAN", "content": "Hi"},
    {"role": "ASSISTANT", "content": "Hello."},
    {"role": "OBSERVATION", "content": "it rains"},
    {"role": "HUMAN", "content": "So?"},
]


@pytest.fixture(scope="module")
def tokenizer():
    backend = train_bpe(["plain words only"] * 3, 270)
    backend.add_special_tokens(SPECIAL)
    return backend


@pytest.fixture
def theirs(tmp_path, tokenizer):
    values = official.config(vocab_size=tokenizer.get_vocab_size(with_added_tokens=True))
    weights = official.tensors(values)
    generator = torch.Generator().manual_seed(2)
    for name in ("model.embeddings.weight", "lm_head.weight"):
        weights[name] = torch.randn(values["vocab_size"], official.D, generator=generator)
    return official.write(tmp_path / "theirs", values, weights, tokenizer)


def refused(result, *names):
    assert result.code == 2, result
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for name in names:
        assert str(name) in result.err
    return True


def test_convert_there_and_back(cli, theirs, tmp_path):
    result = cli("convert", "--from", "official", theirs, tmp_path / "ours")
    assert (result.code, result.err) == (0, "")
    assert "official" in result.out
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert cli("convert", "--to", "official", tmp_path / "ours", tmp_path / "again").code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "again" / "tokenizer.json").read_text() == (theirs / "tokenizer.json").read_text()


def test_what_was_converted_is_transformers_too(cli, theirs, tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rodimus_lab.hf  # noqa: F401

    cli("convert", theirs, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    here = open_directory(theirs).build()
    ids = torch.randint(1, 200, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, here(ids)[0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|startoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert (tokenizer.cls_token, tokenizer.padding_side) == ("[CLS]", "left")
    text = tokenizer.apply_chat_template(CONVERSATION, system="Be brief.", tokenize=False)
    assert text == Chat(CONVERSATION, "Be brief.").prompt
    own = ChatTokenizer(open_directory(tmp_path / "ours").tokenizer())
    assert tokenizer(text)["input_ids"] == own.encode(text)
    compat = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", official_cache_compat=True)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        torch.testing.assert_close(compat(ids).logits, model(ids).logits)
        assert compat.generate(ids, **options).shape == (1, 33)
        cached = [m(ids[:, :20], use_cache=True).past_key_values for m in (model, compat)]
        steps = [m(ids[:, 20:21], past_key_values=c).logits for m, c in zip((model, compat), cached, strict=True)]
    assert (steps[0] - steps[1]).abs().max() > 1e-3


def test_a_run_is_transformers_too(cli, smoke_run, tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rodimus_lab.hf  # noqa: F401

    result = cli("convert", smoke_run.id, tmp_path / "exported")
    assert (result.code, result.err) == (0, "")
    assert "from the layout run" in result.out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    run = open_checkpoint(smoke_run.id)
    text = "The built-in function"
    assert tokenizer(text)["input_ids"] == run.tokenizer().encode(text)
    ids = torch.randint(1, 200, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, run.build()(ids)[0])
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    said = {cli("generate", name, "--prompt", text, *GREEDY) for name in (smoke_run.id, tmp_path / "saved")}
    assert len(said) == 1
    assert cli("convert", smoke_run.id, tmp_path / "theirs", "--to", "official").code == 0
    assert cli("generate", tmp_path / "theirs", "--prompt", text, *GREEDY) in said


def test_shards(theirs, tmp_path, monkeypatch):
    from rodimus_lab.convert import write_native

    monkeypatch.setattr(tensors.write_sharded, "__kwdefaults__", {"limit": 20_000})
    checkpoint = open_directory(theirs)
    write_native(checkpoint, tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    again = open_directory(tmp_path / "ours")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in checkpoint.tensors.items())


def test_the_chat_format():
    assert Chat(CONVERSATION, "Be brief.").prompt == (
        "<role>SYSTEM</role>Be brief.<role>HUMAN</role>Hi<role>ASSISTANT</role>Hello."
        "<role>OBSERVATION</role>it rains<role>HUMAN</role>So?<role>ASSISTANT</role>"
    )
    assert Chat([{"role": "HUMAN", "content": "a"}]).prompt == "<role>HUMAN</role>a<role>ASSISTANT</role>"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user", "content": "a"}, "unknown role 'user'"),
        ({"role": "SYSTEM", "content": "a"}, "unknown role 'SYSTEM'"),
        ({"role": "HUMAN"}, "other keys"),
        ({"role": "HUMAN", "content": 3}, "is int"),
    ],
)
def test_a_bad_message(message, named):
    with pytest.raises(UserError, match=named):
        Chat([message])
    assert "unknown role" in CHAT_TEMPLATE


GREEDY = ("--temperature", 0, "--max-new-tokens", 12)


@pytest.mark.parametrize("converted", [False, True])
def test_generate(cli, theirs, tmp_path, converted):
    folder = theirs
    if converted:
        folder = tmp_path / "ours"
        cli("convert", theirs, folder)
    result = cli("generate", folder, "--prompt", "plain words", *GREEDY)
    assert (result.code, result.err) == (0, "")
    checkpoint = open_directory(theirs)
    model, tokenizer = checkpoint.build(), checkpoint.tokenizer()
    ids = tokenizer.encode("plain words")
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
            if ids[-1] == tokenizer.eos_id:
                break
    assert result.out == tokenizer.decode(ids).rstrip("\ufffd") + "\n"
    assert len(result.out) > len("plain words") + 3


def test_chat_says_its_history_again(cli, theirs, monkeypatch):
    from rodimus_lab import checkpoint_commands as module

    prompts = []
    tokenizer = open_directory(theirs).tokenizer()
    encoder = ChatTokenizer(tokenizer)

    def fake(model, prompt, *_, **options):
        prompts.append(prompt[0])
        assert options["stop"] == [tokenizer.eos_id]
        return iter([[token] for token in [*tokenizer.encode(f"reply {len(prompts)}"), tokenizer.eos_id]])

    monkeypatch.setattr(module, "stream", fake)
    result = cli("chat", theirs, "--system", "Be brief.", "--message", "one", "--message", "two")
    assert result.out == "reply 1\nreply 2\n"
    messages = [
        {"role": "HUMAN", "content": "one"},
        {"role": "ASSISTANT", "content": "reply 1"},
        {"role": "HUMAN", "content": "two"},
    ]
    assert prompts == [encoder.encode(Chat(messages[:count], "Be brief.").prompt) for count in (1, 3)]
    marker = encoder.encode("<role>")
    assert len(marker) == 1
    assert prompts[1].count(marker[0]) == 5


def test_chat_reads_lines(cli, theirs, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n  \ntwo\n"))
    result = cli("chat", theirs, *GREEDY)
    assert (result.code, result.err) == (0, "")
    said = cli("chat", theirs, "--message", "one", "--message", "two", *GREEDY)
    assert said == result
    assert result.out.count("\n") >= 2
    compat = cli("chat", theirs, "--message", "one", "--message", "two", *GREEDY, "--official-cache-compat")
    assert compat.code == 0
    assert compat.out != result.out


@pytest.mark.parametrize("command", ["convert", "generate", "chat"])
def test_a_bad_directory(cli, places, theirs, tmp_path, command):
    def run(folder):
        more = {"convert": [tmp_path / "ours"], "generate": ["--prompt", "a"], "chat": ["--message", "a"]}[command]
        result = cli(command, folder, *more)
        assert not (tmp_path / "ours").exists()
        return result

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(run(empty), "config.json")
    config = theirs / "config.json"
    good = config.read_text()
    for text, named in (("{", "not JSON"), ("[]", "no JSON object"), ('{"model_type": "bert"}', "'bert'")):
        config.write_text(text)
        refused(run(theirs), config, named)
    config.write_text(json.dumps(json.loads(good) | {"d_model": 48}))
    refused(run(theirs), "'model.embeddings.weight'", "x 32, not the", "x 48")
    config.write_text(good)
    if command != "convert":
        (theirs / "tokenizer.json").rename(theirs / "elsewhere.json")
        refused(run(theirs), "no tokenizer.json")
    weights = theirs / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(run(theirs), weights, "damaged")
    weights.rename(theirs / "pytorch_model.bin")
    refused(run(theirs), "pytorch_model.bin is a pickle, which is not read")
    (theirs / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../b.safetensors"}}')
    refused(run(theirs), "points out of its folder")


@pytest.mark.parametrize("text", [b"{}", b"\xff\xfe\x00", b"{"])
def test_a_bad_tokenizer_leaves_nothing(cli, places, theirs, tmp_path, text):
    """It is looked at before the weights are written, so that the same command works once it is mended."""
    tokenizer = theirs / "tokenizer.json"
    good = tokenizer.read_bytes()
    tokenizer.write_bytes(text)
    refused(cli("convert", theirs, tmp_path / "ours"), f"{tokenizer} is not a tokenizer.json")
    assert not (tmp_path / "ours").exists()
    tokenizer.write_bytes(good)
    assert cli("convert", theirs, tmp_path / "ours").code == 0


def test_a_write_that_fails_leaves_nothing(cli, places, theirs, tmp_path, monkeypatch):
    def full(path, _):
        raise UserError(f"cannot write {path}")

    with monkeypatch.context() as patch:
        patch.setattr("rodimus_lab.convert.directory.write_atomic", full)
        refused(cli("convert", theirs, tmp_path / "ours"), "cannot write")
    assert not (tmp_path / "ours").exists()
    (tmp_path / "file").touch()
    refused(cli("convert", theirs, tmp_path / "file" / "ours"), tmp_path / "file")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_all_files_have_the_mode_that_the_umask_leaves(cli, places, theirs, tmp_path, mask):
    before = os.umask(mask)
    try:
        assert cli("convert", theirs, tmp_path / "ours").code == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "ours").iterdir()}
    assert modes == {0o666 & ~mask}


def test_other_bad_input(cli, places, theirs, tmp_path):
    refused(cli("convert", "--from", "fla", theirs, tmp_path / "ours"), "has the layout official, not fla")
    refused(cli("convert", "--from", "gguf", theirs, tmp_path / "ours"), "--from", "'gguf'")
    refused(cli("convert", theirs, theirs), "is there already")
    refused(cli("generate", theirs, "--prompt", ""), "a prompt is empty")
    refused(cli("chat", theirs, "--message", "a\udcffb"), "not valid UTF-8")
    assert not (tmp_path / "ours").exists()


def test_a_run_has_no_official_cache(cli, smoke_run):
    refused(cli("generate", smoke_run.id, "--prompt", "a", "--official-cache-compat"), "official_cache_compat")
