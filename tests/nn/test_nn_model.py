"""The language model around its blocks: loss, head, positions, dropout, costs and the naming of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rodimus_lab.config import ConfigError
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import IGNORE, LanguageModel
from rodimus_lab.nn.zoo import MODELS, SIZES, Size, build_model, model_config
from rodimus_lab.ops import Segments, gated_linear

TINY = Size("tiny", num_layers=2, d_model=16, num_heads=2, vocab_size=23, context=8)


def tiny(name: str = "rodimus+", **options: Any) -> LanguageModel:
    return build_model(name, size=TINY, **options).double().eval()


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}, {"head_bias": True}])
def test_the_loss_is_the_cross_entropy_of_the_logits(options: dict[str, Any]) -> None:
    model = tiny(**options)
    if model.head_bias is not None:
        torch.nn.init.normal_(model.head_bias)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()
    ids, targets = torch.randint(0, 23, (2, 2, 7))
    targets[0, :3] = IGNORE
    segments = Segments.from_mask(torch.arange(7) >= torch.tensor([[2], [0]]))
    logits, _ = model(ids, segments=segments)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").reshape(2, 7)
    torch.testing.assert_close(model.loss(ids, targets, segments, reduction="none"), want)
    torch.testing.assert_close(model.loss(ids, targets, segments), want.sum() / 11)
    torch.testing.assert_close(model.loss(ids, targets, segments, reduction="sum"), want.sum())
    gradients = torch.autograd.grad(model.loss(ids, targets, segments), list(model.parameters()))
    torch.testing.assert_close(gradients, torch.autograd.grad(want.sum() / 11, list(model.parameters())))


def test_logits_are_in_float32_at_least() -> None:
    ids = torch.randint(0, 23, (1, 3))
    assert tiny()(ids)[0].dtype == torch.float64
    assert tiny().bfloat16()(ids)[0].dtype == torch.float32


def test_learned_positions_follow_documents_and_states() -> None:
    model = tiny("transformer")
    ids = torch.randint(0, 23, (1, 6))
    shifted = torch.cat([ids[:, :1], ids], dim=1)
    alone, _ = model(ids)
    packed, _ = model(shifted, segments=Segments.from_lengths([1, 6]))
    torch.testing.assert_close(packed[:, 1:], alone)
    unlike, _ = model(shifted)
    assert not torch.allclose(unlike[:, 1:], alone)


def test_dropout_only_in_training() -> None:
    model = tiny(dropout=0.5)
    ids = torch.randint(0, 23, (1, 6))
    torch.testing.assert_close(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])


def test_a_memory_is_kept_in_float32_and_what_is_only_stored_in_the_models_dtype() -> None:
    model = tiny().bfloat16()
    state = model.init_state(2).blocks[0][0]
    assert (state.memory_B1nM.dtype, state.conv_BWM.dtype) == (torch.float32, torch.bfloat16)
    state = model.init_state(2, dtype=torch.bfloat16).blocks[0][0]
    assert (state.memory_B1nM.dtype, state.conv_BWM.dtype) == (torch.bfloat16, torch.bfloat16)
    assert tiny().double().init_state(2).blocks[0][0].memory_B1nM.dtype == torch.float64
    assert model.init_state(2).length_B.dtype == torch.long


def test_a_bfloat16_memory_forgets_what_slow_gates_keep() -> None:
    """Why the default is float32: after 2,048 tokens the outputs of the one are off by percents, of the other not."""
    torch.manual_seed(0)
    n, m, length = 16, 8, 2048
    k = torch.nn.functional.normalize(torch.randn(length, n), dim=-1)
    q, v, log_alpha = torch.randn(length, n), torch.randn(length, m), -torch.full((n,), 1e-3)

    def last_outputs(dtype: torch.dtype) -> torch.Tensor:
        memory, outputs = torch.zeros(1, 1, n, m, dtype=dtype), []
        for t in range(length):
            step = (x[t].double().view(1, 1, 1, -1) for x in (q, k, v))
            o, wide = gated_linear(*step, log_alpha.double().view(1, 1, 1, n), state_BHKV=memory.double())
            memory = wide.to(dtype)
            outputs.append(o)
        return torch.cat(outputs[-256:])

    want = last_outputs(torch.float64)
    errors = [((last_outputs(dtype) - want).norm() / want.norm()).item() for dtype in (torch.float32, torch.bfloat16)]
    assert errors[0] < 1e-4
    assert errors[1] > 1e-2


@pytest.mark.parametrize("name", ["rodimus", "rodimus+", "transformer++", "transformer++-swa"])
def test_training_flops_are_thrice_the_mean_of_the_positions(name: str) -> None:
    """A window bends the cost over the context, so the mean of the two ends would not do."""
    config = model_config(name, size=TINY)
    positions = [config.flops_per_token(t) for t in range(1, 21)]
    assert config.training_flops_per_token(20) == pytest.approx(3 * sum(positions) / 20)
    assert config.training_flops_per_token(1) == 3 * config.flops_per_token(1)


def test_overrides_reach_the_model_and_every_sublayer_of_a_kind() -> None:
    config = model_config("rodimus+", size=TINY, vocab_size=99, dropout=0.1, rodimus={"n": 3}, attention={"window": 2})
    assert (config.vocab_size, config.dropout) == (99, 0.1)
    rodimus, attention, feed_forward = config.pattern[0].sublayers
    assert (rodimus.n, attention.window, feed_forward.kind) == (3, 2, "feed_forward")  # type: ignore[attr-defined]


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"no model named 'rodimos'; did you mean 'rodimus'\?"):
        model_config("rodimos")
    with pytest.raises(UserError, match=r"no size named '125'; did you mean '125m'\?"):
        model_config("rodimus", size="125")
    with pytest.raises(UserError, match=r"'rodimus' has no setting 'atention'"):
        model_config("rodimus", atention={"window": 3})
    with pytest.raises(ConfigError, match=r"RodimusConfig has no key 'expanse'; did you mean 'expand'\?"):
        model_config("rodimus", rodimus={"expanse": 3})


def test_aliases_and_sizes() -> None:
    assert MODELS.canonical("rodimus_plus") == "rodimus+"
    assert MODELS.canonical("transformer_pp") == "transformer++"
    assert all(model_config("rodimus", size=name).vocab_size == size.vocab_size for name, size in SIZES.items())


@pytest.mark.parametrize("name", ["rodimus", "rodimus+", "transformer", "transformer++"])
def test_training_on_a_repeated_sequence_learns_it(name: str) -> None:
    model = build_model(name, size=TINY, vocab_size=11)
    ids = torch.randint(0, 11, (1, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.1


def test_sequences_without_a_token_are_refused() -> None:
    model = build_model("transformer++", size=Size("tiny", 1, 8, 2, 20, 8))
    for state in (None, model.init_state(2)):
        with pytest.raises(UserError, match="sequences without a token; give each at least one"):
            model(torch.zeros(2, 0, dtype=torch.long), state)
