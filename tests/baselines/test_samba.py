"""Samba: its order of blocks, its size, and its data."""

from __future__ import annotations

import pytest

from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import SIZES, model_config


@pytest.mark.parametrize(("num_layers", "kinds"), [(4, "ma" * 2), (5, "a" + "ma" * 2), (1, "ma")])
def test_mamba_and_attention_by_turns(num_layers: int, kinds: str) -> None:
    config = model_config("samba", size=SIZES["smoke"]._replace(num_layers=num_layers))
    assert "".join(block.sublayers[0].kind[0] for block in config.blocks) == kinds
    assert {block.sublayers[1].kind for block in config.blocks} == {"feed_forward"}


@pytest.mark.parametrize("size", ["wikitext103", "1.3b"])
def test_its_count_is_near_transformer_pps(size: str) -> None:
    counts = [model_config(name, size=size).num_params() for name in ("samba", "transformer++")]
    assert 1 <= counts[0] / counts[1] < 1.1


def test_it_is_data() -> None:
    config = model_config("samba", size="smoke")
    assert LanguageModelConfig.from_dict(config.to_dict()) == config
    assert {sub.window for block in config.blocks for sub in block.sublayers if sub.kind == "attention"} == {128}
