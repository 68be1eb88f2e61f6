"""transformers' classes: loading, caching, generating, for every model of the zoo."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from rodimus_lab.convert import CHAT_TEMPLATE, Chat, open_directory
from rodimus_lab.data import Tokenizer, train_bpe
from rodimus_lab.errors import UserError
from rodimus_lab.generate import Sampling, stream
from rodimus_lab.hf import RodimusLabConfig, RodimusLabForCausalLM, RodimusLabTokenizer, StateCache
from rodimus_lab.nn.zoo import MODELS, Size, model_config
from rodimus_lab.registry import load_plugins

load_plugins()
ZOO = list(MODELS)
FEW = ["rodimus", "rodimus+", "transformer++", "mamba", "rwkv6", "hgrn2"]
SIZE = Size("tiny", 1, 64, 2, 61, 24)


def tiny(name, *, tie=False, **options):
    """With weights large enough that what a token says depends on what came before."""
    config = RodimusLabConfig(
        model_config(name, size=SIZE, tie_embeddings=tie, **options), eos_token_id=0, pad_token_id=0, bos_token_id=0
    )
    torch.manual_seed(1)
    model = RodimusLabForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(*lengths, seed=0):
    """Rows padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, SIZE.vocab_size, (length,), generator=generator) for length in lengths]
    longest = max(lengths)
    ids = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows])
    return ids, torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()


@pytest.mark.parametrize("name", ZOO)
def test_saved_and_loaded_in_shards(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is RodimusLabForCausalLM
    assert not again.training
    ids, _ = tokens(9, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(open_directory(tmp_path).build()(ids)[0], model(ids, use_cache=False).logits)
    assert again.config.model_config() == model.config.model_config()
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == SIZE.vocab_size
    assert again.config.num_hidden_layers == len(model.lm.blocks)


@pytest.mark.parametrize("name", ZOO)
def test_prefill_and_decoding_are_the_full_forward_whatever_the_padding(name):
    model = tiny(name).double()
    ids, mask = tokens(31, 12, 1)
    with torch.no_grad():
        prefix, state = 29, None
        first = model(ids[:, :prefix], attention_mask=mask[:, :prefix], use_cache=True)
        assert isinstance(first.past_key_values, StateCache)
        parts, state = [first.logits], first.past_key_values
        for index in range(prefix, ids.shape[1]):
            step = model(ids[:, index : index + 1], attention_mask=mask[:, : index + 1], past_key_values=state)
            parts.append(step.logits)
        assert state.get_seq_length() == ids.shape[1]
        found = torch.cat(parts, 1)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = model(ids[row : row + 1, -length:]).logits[0]
            torch.testing.assert_close(found[row, -length:], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_is_each_row_alone(name, options):
    model = tiny(name).double()
    ids, mask = tokens(30, 7, 1)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    together = model.generate(ids, attention_mask=mask, **options)
    without_cache = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(together, without_cache)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model.generate(ids[row : row + 1, -length:], **options)
        assert torch.equal(together[row, -alone.shape[1] :], alone[0])
    assert len(set(together[0, ids.shape[1] :].tolist())) > 1


@pytest.mark.parametrize("name", FEW)
def test_greedy_generation_is_that_of_this_project(name):
    model = tiny(name).double()
    ids, _ = tokens(11)
    expected = [step[0] for step in stream(model.lm, ids.tolist(), 10, Sampling(temperature=0))]
    found = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert found[0, 11:].tolist() == expected


def test_sampling_follows_the_seed():
    model = tiny("rodimus+")
    ids, mask = tokens(5, 3)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = {"top_k": 20, "top_p": 0.9, "num_return_sequences": 2, "max_new_tokens": 12}
        drawn.append(model.generate(ids, attention_mask=mask, do_sample=True, **options))
    assert drawn[0].shape[0] == 4
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", FEW)
def test_a_conversation_goes_on_from_its_state(name):
    """What comes second may be padded, too."""
    model = tiny(name).double()
    (first, first_mask), (second, second_mask) = tokens(9, 4), tokens(2, 6, seed=1)
    with torch.no_grad():
        state = model(first, attention_mask=first_mask, use_cache=True).past_key_values
        found = model(second, attention_mask=torch.cat([first_mask, second_mask], 1), past_key_values=state).logits
        for row in range(2):
            words = torch.cat([x[row][m[row].bool()] for x, m in ((first, first_mask), (second, second_mask))])
            torch.testing.assert_close(found[row, -1], model(words[None]).logits[0, -1], rtol=0, atol=1e-9)


def test_the_state_of_a_recurrent_model_does_not_grow():
    from rodimus_lab.nn.mixer import state_nbytes

    model = tiny("rodimus")
    sizes = []
    for length in (3, 40):
        ids, _ = tokens(length)
        sizes.append(state_nbytes(model(ids, use_cache=True).past_key_values.state))
    assert sizes[0] == sizes[1] == model.config.model_config().state_bytes(1, 40, torch.float32)


def test_a_cache_selects_repeats_and_forgets():
    model = tiny("transformer++").double()
    ids, mask = tokens(8, 5)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.batch_size == 2
    after = model(torch.tensor([[5], [5]]), past_key_values=cache).logits
    ids_of_row = torch.cat([ids[1, 3:], torch.tensor([5])])
    torch.testing.assert_close(after[0, -1], model(ids_of_row[None]).logits[0, -1], rtol=0, atol=1e-9)
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = model(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(fresh, model(ids[:, -1:]).logits, rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="cannot go back"):
        cache.crop(1)


def test_hidden_states_for_auto_model(tmp_path):
    model = tiny("rodimus")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    ids, mask = tokens(6, 3)
    x = base(ids, attention_mask=mask).last_hidden_state
    assert x.shape == (2, 6, 64)
    torch.testing.assert_close(base.lm.logits(x), model(ids, attention_mask=mask).logits)


def test_loss_with_padding_on_either_side_and_packed():
    model = tiny("rodimus+").double()
    ids, mask = tokens(9, 5)
    alone = [
        model(ids[row : row + 1, -length:], labels=ids[row : row + 1, -length:]).loss
        for row, length in ((0, 9), (1, 5))
    ]
    expected = (alone[0] * 8 + alone[1] * 4) / 12
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=ids).loss, expected)
    right = torch.stack([ids[0], torch.cat([ids[1, -5:], torch.zeros(4, dtype=torch.long)])])
    right_mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    output = model(right, attention_mask=right_mask, labels=right)
    torch.testing.assert_close(output.loss, expected)
    assert output.past_key_values is None
    packed = torch.cat([ids[0], ids[1, -5:]])[None]
    labels = packed.clone()
    labels[0, 9] = -100
    positions = torch.cat([torch.arange(9), torch.arange(5)])[None]
    torch.testing.assert_close(model(packed, position_ids=positions, labels=labels).loss, expected)
    by_count = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=torch.tensor(6)).loss
    torch.testing.assert_close(by_count, expected * 2)
    model.train()
    fused = model(ids, attention_mask=mask, labels=ids)
    assert fused.logits is None
    torch.testing.assert_close(fused.loss, expected)
    model.config.fused_loss = False
    assert model(ids, attention_mask=mask, labels=ids).logits.shape == (2, 9, SIZE.vocab_size)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padding between tokens"),
        ({"attention_mask": torch.tensor([[1, 1]])}, r"shape \(1, 2\)"),
        ({"attention_mask": torch.tensor([[1, 1, 0]]), "use_cache": True}, "padding_side"),
        ({"past_key_values": object()}, "a object does not hold"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds"),
    ],
    ids=["padding inside", "mask of another shape", "padding to the right", "cache", "hidden states", "embeddings"],
)
def test_what_is_refused(options, named):
    with pytest.raises(UserError, match=named):
        tiny("rodimus")(torch.tensor([[1, 2, 3]]), **options)


def test_another_vocabulary_is_refused():
    model = tiny("rodimus")
    assert model.resize_token_embeddings(61) is model.lm.embedding
    with pytest.raises(UserError, match="61"):
        model.resize_token_embeddings(64)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda weights: weights.pop("lm.final_norm.weight"), "missing keys, lm.final_norm.weight"),
        (lambda weights: weights.update(more=torch.ones(1)), "unexpected keys, more"),
        (
            lambda weights: weights.update({"lm.final_norm.weight": torch.ones(3)}),
            "mismatched keys, lm.final_norm.weight",
        ),
    ],
    ids=["missing", "unexpected", "of another shape"],
)
def test_weights_that_do_not_fit_are_named(tmp_path, spoil, named):
    from safetensors.torch import load_file, save_file

    tiny("rodimus").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    spoil(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=named):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    tiny("rodimus").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["language_model"]["d_modle"] = 3
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="d_modle"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_bfloat16(tmp_path):
    model = tiny("rodimus+")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    ids, _ = tokens(9)
    assert again.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 12)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("tiny", train_bpe(["plain words only"] * 3, 270))


def test_tokenizer_and_pipeline(tokenizer, tmp_path):
    hf = RodimusLabTokenizer.of(tokenizer)
    model = tiny("rodimus", vocab_size=tokenizer.vocab_size)
    model.save_pretrained(tmp_path)
    hf.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is RodimusLabTokenizer
    assert again("déjà vu: words")["input_ids"] == tokenizer.encode("déjà vu: words")
    batch = again(["plain words", "p"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][1, 0] == 0
    assert again.eos_token_id == again.pad_token_id == tokenizer.eos_id
    say = pipeline("text-generation", model=str(tmp_path))
    texts = say(["plain words", "o"], max_new_tokens=5, do_sample=False, batch_size=2)
    single = say("o", max_new_tokens=5, do_sample=False)
    assert texts[1][0]["generated_text"] == single[0]["generated_text"]
    assert single[0]["generated_text"].startswith("o")


def test_generation_stops_at_a_string(tokenizer):
    """The stop, and nothing after it, is part of the text; a pipeline's `stop_sequence` is the same."""
    hf = RodimusLabTokenizer.of(tokenizer)
    model = tiny("rodimus", vocab_size=tokenizer.vocab_size)
    batch = hf("plain words", return_tensors="pt")
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    ids = model.generate(**batch, **options)[0].tolist()
    start = batch["input_ids"].shape[1]
    new = [hf.decode(token) for token in ids[start:]]
    stop = next(text for text in new[2:] if text.isascii() and text.isprintable())
    end = start + new.index(stop) + 1
    assert end < len(ids), new
    stopped = model.generate(**batch, stop_strings=[stop], tokenizer=hf, **options)
    assert stopped[0].tolist() == ids[:end]
    say = pipeline("text-generation", model=model, tokenizer=hf)
    (said,) = say("plain words", stop_sequence=stop, return_full_text=False, **options)
    assert said["generated_text"] == hf.decode(ids[start:end])
    with pytest.raises((TypeError, ValueError), match="stop_stringz"):
        model.generate(**batch, stop_stringz=["a"], **options)


def test_the_chat_format_by_either_names_of_its_roles(tokenizer):
    hf = RodimusLabTokenizer.of(tokenizer, chat_template=CHAT_TEMPLATE)
    official = [{"role": "HUMAN", "content": "Hi"}, {"role": "ASSISTANT", "content": "Hm."}]
    common = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm."}]
    first = {"role": "system", "content": "Be brief."}
    whole, marker = Chat(official).prompt, "<role>ASSISTANT</role>"
    for messages in (official, common):
        assert hf.apply_chat_template(messages, tokenize=False) == whole
        assert hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == whole
        open_ended = hf.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
        assert open_ended == whole.removesuffix(marker)
        assert hf.apply_chat_template(messages, continue_final_message=True, tokenize=False) == open_ended
        with_system = Chat(official, "Be brief.").prompt
        assert hf.apply_chat_template(messages, system="Be brief.", tokenize=False) == with_system
        assert hf.apply_chat_template([first, *messages], tokenize=False) == with_system
    assert hf.apply_chat_template(common)["input_ids"] == hf(whole)["input_ids"]
    assert hf.chat_template == CHAT_TEMPLATE
    for wrong, named in (([{"role": "tool", "content": "x"}], "unknown role tool"), ([*common, first], "once, before")):
        with pytest.raises(Exception, match=named):
            hf.apply_chat_template(wrong, tokenize=False)


def test_another_chat_format_is_as_transformers_has_it(tokenizer):
    other = "{{ messages[0]['role'] }}{% if add_generation_prompt %}!{% endif %}"
    hf = RodimusLabTokenizer.of(tokenizer, chat_template=other)
    said = [{"role": "tool", "content": "x"}]
    assert hf.apply_chat_template(said, tokenize=False) == "tool"
    assert hf.apply_chat_template(said, add_generation_prompt=True, tokenize=False) == "tool!"


def test_a_pipelines_chat_goes_on_from_what_it_gave_back(tokenizer):
    hf = RodimusLabTokenizer.of(tokenizer, chat_template=CHAT_TEMPLATE)
    say = pipeline("text-generation", model=tiny("rodimus", vocab_size=tokenizer.vocab_size), tokenizer=hf)
    options = {"max_new_tokens": 4, "do_sample": False}
    history = say([{"role": "user", "content": "plain"}], **options)[0]["generated_text"]
    history = say([*history, {"role": "user", "content": "words"}], **options)[0]["generated_text"]
    assert [message["role"] for message in history] == ["user", "assistant"] * 2
