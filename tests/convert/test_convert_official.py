"""The authors' layout: its own definition of the logits, both ways, and what does not fit."""

from __future__ import annotations

import json

import convert_official as official
import pytest
import torch
from safetensors.torch import load_file

from rodimus_lab.convert import Checkpoint, open_directory, write_native, write_official
from rodimus_lab.errors import UserError
from rodimus_lab.generate import Sampling, stream
from rodimus_lab.nn.zoo import model_config, with_official_cache

VARIANTS = {
    "rodimus": official.config("rodimus"),
    "rodimus+": official.config(),
    "tied": official.config(tie_word_embeddings=True),
    "scaled and normed": official.config(tie_word_embeddings=True, use_scale_embedding=True, use_norm_embedding=True),
    "mha": official.config(attn={"num_heads_k": 4}),
    "gqa": official.config(attn={"num_heads_k": 2, "num_heads_v": 2}),
    "keys in two, values in four": official.config(attn={"num_heads": 8, "num_heads_k": 2, "num_heads_v": 4}),
    "mqa": official.config(attn={"num_heads_v": 1}),
    "interleaved": official.config(attn={"rotary_emb_interleaved": True, "rotary_emb_base": 500.0}),
    "no rotary": official.config(attn={"rotary_emb_dim": 0}),
    "no window": official.config(attn={"window_size": None}),
    "widths": official.config(
        attn={"ffn_expand_ratio": 2.1},
        mixer={"expand_ratio": 1.7, "d_conv": 3, "input_gate_low_rank": 5, "mem_size": 6},
    ),
}
IDS = torch.randint(1, official.V, (40,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=VARIANTS)
def checkpoint(request, tmp_path):
    values = VARIANTS[request.param]
    weights = official.tensors(values)
    return official.write(tmp_path / "theirs", values, weights), official.Reference(values, weights)


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids[None])[0][0]


def test_logits_are_those_of_the_layout(checkpoint):
    folder, reference = checkpoint
    model = open_directory(folder, "official").build()
    torch.testing.assert_close(logits_of(model), reference.logits(IDS).float(), rtol=0, atol=1e-4)


def test_there_and_back_again(checkpoint, tmp_path):
    folder, reference = checkpoint
    write_native(open_directory(folder), tmp_path / "ours")
    ours = open_directory(tmp_path / "ours", "native")
    torch.testing.assert_close(logits_of(ours.build()), reference.logits(IDS).float(), rtol=0, atol=1e-4)
    write_official(ours, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    weights = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == official.shapes(again)
    found = official.Reference(again, weights).logits(IDS)
    torch.testing.assert_close(found, reference.logits(IDS), rtol=0, atol=1e-4)
    before = load_file(folder / "model.safetensors")
    for name in before.keys() & weights.keys():  # Heads went there and came back.
        interleaved = reference.values["attn_cfg"].get("rotary_emb_interleaved") and name[-13:-12] in "qk"
        if not interleaved and not name.startswith("model.embeddings"):
            assert torch.equal(weights[name], before[name]), name


@pytest.mark.parametrize("name", ["rodimus", "rodimus+"])
def test_a_model_of_this_zoo_in_the_official_layout(name, tmp_path):
    """Whose window counts keys, and whose embedding is tied."""
    torch.manual_seed(1)
    attention = {"attention": {"window": 6, "heads": {"num_heads": 4, "num_key_heads": 1, "num_value_heads": 4}}}
    attention["attention"]["head_width"] = 8
    config = model_config(
        name, size="smoke", vocab_size=official.V, d_model=official.D, repeats=2, **(attention if "+" in name else {})
    )
    model = config.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_official(Checkpoint(config, model.state_dict(), tmp_path, "native", {}), tmp_path / "theirs")
    values = json.loads((tmp_path / "theirs" / "config.json").read_text())
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    found = official.Reference(values, weights).logits(IDS).float()
    torch.testing.assert_close(logits_of(model), found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prompt", [1, 3, 5, 6, 7, 20])
@pytest.mark.parametrize("compat", [False, True])
def test_decoding_after_prompts_around_the_window(prompt, compat, tmp_path):
    """The window is 12, halved: 6 slots in the published cache, 7 keys by the definition."""
    values = official.config()
    weights = official.tensors(values)
    checkpoint = open_directory(official.write(tmp_path / "theirs", values, weights))
    if compat:
        checkpoint = checkpoint._replace(config=with_official_cache(checkpoint.config))
    model = checkpoint.build(dtype=torch.float64)
    expected = official.Reference(values, weights).logits(IDS, prompt if compat else None)
    with torch.no_grad():
        state = model.init_state(1)
        parts = []
        first, state = model(IDS[None, :prompt], state)
        parts.append(first[0])
        for token in IDS[prompt:]:
            step, state = model(token.view(1, 1), state)
            parts.append(step[0])
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-6)
        if compat and prompt != 1:
            right = official.Reference(values, weights).logits(IDS)
            assert (torch.cat(parts)[prompt:] - right[prompt:]).abs().max() > 1e-3


def test_the_published_cache_knows_no_batch(tmp_path):
    values = official.config()
    checkpoint = open_directory(official.write(tmp_path / "theirs", values, official.tensors(values)))
    model = checkpoint._replace(config=with_official_cache(checkpoint.config)).build(dtype=torch.float64)
    prompts = [IDS[:20].tolist(), IDS[3:6].tolist(), IDS[7:8].tolist()]
    together = list(stream(model, prompts, 15, Sampling(temperature=0)))
    for row, prompt in enumerate(prompts):
        alone = list(stream(model, [prompt], 15, Sampling(temperature=0)))
        assert [step[row] for step in together] == [step[0] for step in alone]


def test_the_published_slots_are_those_that_were_observed():
    """Window 8, prompt 20, three steps; and a text that grows to the window's length."""
    held = official.published_slots(20, 8)
    for token in (20, 21, 22):
        held = official.published_step(held, token, 8)
    assert held == [3, 4, 5, 6, 19, 20, 21, 22]
    held = official.published_slots(3, 4)
    assert official.published_step(held, 3, 4) == [1, 2, None, 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_type": "rodimus_max"}, "block_type='rodimus_max'"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"n_layer": "2"}, "n_layer='2'"),
        ({"n_layer": 3}, "'model.layers.2.mixer_norm.weight', which its config calls for"),
        ({"n_layer": 1}, "'model.layers.1.attn.k_proj.weight' and"),
        ({"vocab_size": 65}, "'model.embeddings.weight' in .* is 64 x 32, not the 65 x 32"),
        ({"tie_word_embeddings": True}, "not the embedding"),
        ({"mixer_cfg": {"mem_size": 9}}, "in_proj.weight' in .* is 16 x 64, not the 18 x 64"),
        ({"mixer_cfg": {"mem_size": 8, "normalize_epsilon": 1e-3}}, "normalize_epsilon=0.001"),
        ({"attn_cfg": {"num_heads": 4}}, "no 'num_heads_k'"),
        ({"attn_cfg": {"num_heads": 5, "num_heads_k": 1, "num_heads_v": 5}}, "num_heads=5"),
        ({"attn_cfg": {"num_heads": 4, "num_heads_k": 4, "num_heads_v": 1}}, "num_heads_k=4"),
        ({"attn_cfg": {"num_heads": 4, "num_heads_k": 1, "num_heads_v": 4, "softmax_scale": "norm"}}, "softmax_scale"),
        ({"attn_cfg": {"num_heads": 4, "num_heads_k": 1, "num_heads_v": 4, "rotary_emb_dim": 4}}, "rotary_emb_dim=4"),
        ({"model_type": "bert"}, "model_type 'bert'"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_named(tmp_path, change, named):
    values = official.config()
    folder = official.write(tmp_path / "theirs", values | change, official.tensors(values))
    with pytest.raises(UserError, match=named):
        open_directory(folder)


def test_buffers_of_decoding_are_left_out(tmp_path):
    values = official.config()
    weights = official.tensors(values) | {"model.layers.0.attn.key_cache_0": torch.zeros(1, 6, 1, 8)}
    assert open_directory(official.write(tmp_path / "theirs", values, weights)).config.repeats == 2


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("transformer++", {}, "not blocks of attention | feed_forward"),
        ("rodimus", {"rodimus": {"tau": None}}, "lacks one"),
        ("rodimus", {"rodimus": {"feedthrough": False}}, "no feedthrough=False"),
        ("rodimus", {"head_bias": True}, "no head_bias=True"),
        ("rodimus+", {"attention": {"bias": True}}, "no bias=True"),
        ("rodimus+", {"attention": {"window": 1}}, "window of one key"),
    ],
    ids=str,
)
def test_what_the_official_layout_cannot_hold(name, change, named, tmp_path):
    config = model_config(name, size="smoke", **change)
    checkpoint = Checkpoint(config, config.build().state_dict(), tmp_path, "native", {})
    with pytest.raises(UserError, match=named.replace("|", r"\|")):
        write_official(checkpoint, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
