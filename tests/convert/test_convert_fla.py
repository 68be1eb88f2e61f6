"""flash-linear-attention's layouts: its own classes' tensors, their definitions' logits, and what is refused."""

from __future__ import annotations

import sys
import types
from contextlib import nullcontext

import convert_fla as layouts
import pytest
import torch

from rodimus_lab.convert import open_directory, write_native
from rodimus_lab.errors import UserError

pytest.importorskip("fla")
IDS = torch.randint(1, layouts.V, (24,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _flash_attention(monkeypatch):
    """Its attention layers only want to see that the package is there when they are built."""
    import fla.layers.attn

    monkeypatch.setattr(fla.layers.attn, "flash_attn_func", types.SimpleNamespace())


@pytest.fixture(scope="module")
def shapes():
    """The names and shapes of the tensors of fla's own model of a config."""

    def of(values):
        import fla.models

        models = [each for name, each in vars(fla.models).items() if name.endswith("ForCausalLM")]
        (own,) = (each for each in models if each.config_class.model_type == values["model_type"])
        known = own.config_class(**{k: v for k, v in values.items() if k != "model_type"})
        with torch.device("meta"):
            model = own(known)
        found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if known.tie_word_embeddings:
            found.pop("lm_head.weight", None)
        return found

    return of


def write(values, shapes, folder):
    weights = layouts.tensors(shapes(values))
    return layouts.write(folder, values, weights), weights


@pytest.mark.parametrize("name", layouts.CONFIGS)
def test_logits_are_those_of_the_layout(name, shapes, tmp_path):
    values = layouts.CONFIGS[name]
    folder, weights = write(values, shapes, tmp_path / "theirs")
    expected = layouts.Reference(values, weights).logits(IDS).float()
    assert expected.std() > 0.1
    write_native(open_directory(folder, "fla"), tmp_path / "ours")
    for place in ("theirs", "ours"):
        model = open_directory(tmp_path / place).build()
        with torch.no_grad():
            found = model(IDS[None])[0][0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            state, steps = model.init_state(1), []
            for part in (IDS[:9], *IDS[9:].split(1)):
                logits, state = model(part[None], state)
                steps.append(logits[0])
        torch.testing.assert_close(torch.cat(steps), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rodimus", {"use_short_conv": False}),
        ("rodimus", {"k_norm_eps": 1e-3}),
        ("rodimus+", {"ska_attn": {"num_heads": 4, "qk_norm": True}}),
        ("gla", {"use_output_gate": False}),
        ("gla", {"use_short_conv": True}),
        ("gla", {"feature_map": "relu"}),
        ("gla", {"clamp_min": -3.0}),
        ("gla", {"attnres_block_size": 1}),
        ("gla", {"hidden_act": "powlu"}),
        ("hgrn2", {"use_short_conv": True}),
        ("hgrn2", {"attn": {"layers": [1], "num_heads": 2}}),
        ("mamba", {"use_bias": True}),
        ("mamba", {"hidden_act": "gelu"}),
        ("mamba2", {"n_groups": 2}),
        ("mamba2", {"rmsnorm": False}),
        ("mamba2", {"norm_before_gate": True}),
        ("mamba2", {"D_has_hdim": True}),
        ("mamba2", {"dt_limit": [0.0, 1.0]}),
        ("retnet", {"expand_k": 0.5}),
        ("retnet", {"use_output_gate": False}),
        ("retnet", {"feature_map": "relu"}),
        ("rwkv6", {"expand_v": 2.0}),
        ("rwkv6", {"expand_k": 2.0}),
        ("rwkv6", {"attn": {"layers": [1], "num_heads": 2}}),
        ("rwkv6", {"hidden_act": "relu"}),
        ("gated_deltanet", {"use_gate": False}),
        ("gated_deltanet", {"output_gate_activation": "sigmoid"}),
        ("transformer", {"qk_norm": True}),
    ],
    ids=str,
)
def test_what_this_zoo_cannot_express_is_named(name, change, shapes, tmp_path):
    values = layouts.CONFIGS[name]
    folder, weights = write(values, shapes, tmp_path / "theirs")
    layouts.write(folder, values | change, weights)
    key = next(iter(change))
    named = {"ska_attn": "qk_norm=True", "attn": "attn in"}.get(key, f"{key}=")
    with pytest.raises(UserError, match=named):
        open_directory(folder)


@pytest.mark.parametrize("name", [name for name in layouts.CONFIGS if " " not in name])
def test_tensors_that_do_not_fit_are_named(name, shapes, tmp_path):
    values = layouts.CONFIGS[name]
    folder, weights = write(values, shapes, tmp_path / "theirs")
    for key in weights:
        layouts.write(folder, values, {k: v for k, v in weights.items() if k != key})
        with pytest.raises(UserError, match=f"no tensor '{key}'") if needed(key) else nullcontext():
            open_directory(folder)
        layouts.write(folder, values, weights | {key: torch.zeros(*weights[key].shape, 2)})
        with pytest.raises(UserError, match=f"'{key}' in .* is .* x 2, not the"):
            open_directory(folder)
    layouts.write(folder, values, weights | {"model.more.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"'model\.more\.weight' that its config does not call for"):
        open_directory(folder)


def needed(key):
    """All but the biases of LayerNorms, which a config may leave out."""
    return not (key.endswith("norm.bias") and "g_norm" not in key)


def test_nothing_of_fla_is_needed(shapes, tmp_path, monkeypatch):
    folder, _ = write(layouts.CONFIGS["gla"], shapes, tmp_path / "theirs")
    for name in [name for name in sys.modules if name == "fla" or name.startswith("fla.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert open_directory(folder).layout == "fla"
