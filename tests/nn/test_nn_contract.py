"""The one contract that every token mixer and every model keeps.

The mixers are found through their configs' family and the models through their registry, so a new one is held to all of
this without an edit here. A kind that no example below names is tested in its default config.

Shapes: B batch, T time, D model width.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rodimus_lab.config import Config
from rodimus_lab.errors import UserError
from rodimus_lab.nn.attention import AttentionConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.mixer import Initializer, TokenMixerConfig, state_nbytes
from rodimus_lab.nn.model import LanguageModel, LanguageModelConfig
from rodimus_lab.nn.official_attention import OfficialAttentionConfig
from rodimus_lab.nn.rodimus import RodimusConfig, TemperatureGate, ValueDecay, ValueGate
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops import Segments, use_backend
from rodimus_lab.ops.backend import OPERATORS
from rodimus_lab.registry import load_plugins

T = 12
TINY = Size("tiny", num_layers=2, d_model=64, num_heads=4, vocab_size=50, context=T)
EXAMPLE_WIDTH, DEFAULT_WIDTH = 16, 64

RODIMUS = RodimusConfig(n=4, beta_hat=ValueGate(rank=3))
ODD = HeadSharing(num_heads=8, num_key_heads=2, num_value_heads=4)
EXAMPLES: dict[str, dict[str, TokenMixerConfig]] = {
    "rodimus": {
        "full": RODIMUS,
        "auto_rank": RODIMUS.replace(beta_hat=ValueGate(rank="auto")),
        "no_tau": RODIMUS.replace(tau=None),
        "no_g": RODIMUS.replace(g=None, tau=None),
        "fixed_tau": RODIMUS.replace(tau=TemperatureGate(fixed=0.5)),
        "no_beta_hat": RODIMUS.replace(beta_hat=None),
        "beta": RODIMUS.replace(beta=ValueDecay(rank=3)),
        "only_beta": RODIMUS.replace(g=None, tau=None, beta_hat=None, beta=ValueDecay(temperature=1.0)),
        "no_key_norm": RODIMUS.replace(key_norm=False),
        "no_feedthrough": RODIMUS.replace(feedthrough=False),
        "no_conv": RODIMUS.replace(conv_width=0),
        "conv_1": RODIMUS.replace(conv_width=1),
        "expand_1": RODIMUS.replace(expand=1.0),
        "bare": RODIMUS.replace(g=None, tau=None, beta_hat=None, conv_width=0, key_norm=False, feedthrough=False),
    },
    "attention": {
        "mha": AttentionConfig(heads=HeadSharing.of("mha", 4)),
        "gqa_bias": AttentionConfig(heads=HeadSharing.of("gqa", 4, 2), bias=True),
        "mqa_window": AttentionConfig(heads=HeadSharing.of("mqa", 4), window=5),
        "ska_window": AttentionConfig(heads=HeadSharing.of("ska", 4), window=4),
        "ska_official_window": AttentionConfig(heads=HeadSharing.of("ska", 2), window=4, window_convention="official"),
        "odd_no_rotary": AttentionConfig(heads=ODD, rotary_base=None, head_width=3),
        "odd_wide_window": AttentionConfig(heads=ODD, window=40),
    },
    # Within its window; beyond that it breaks the contract on purpose.
    "official_attention": {
        "wide": OfficialAttentionConfig(heads=HeadSharing.of("ska", 2), window=80, window_convention="official")
    },
    "feed_forward": {
        "swiglu": FeedForwardConfig(width=24),
        "gelu_bias": FeedForwardConfig(width=24, activation="gelu", bias=True),
    },
}


class Subject:
    """A mixer or a model under one face: something with weights, inputs and declared costs."""

    config: Any

    def build(self) -> Any:
        """In float64, with every weight moved off its start so that none is idle."""
        torch.default_generator.manual_seed(1)
        module = self.fresh().double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return module.eval()


class MixerSubject(Subject):
    def __init__(self, config: TokenMixerConfig, d_model: int):
        self.config, self.d_model = config, d_model

    def fresh(self) -> nn.Module:
        mixer = self.config.build(self.d_model)
        mixer.init_weights(Initializer())
        return mixer

    def init_weights(self, module: Any) -> None:
        module.init_weights(Initializer())

    def draw(self, batch: int, length: int) -> Tensor:
        return torch.randn(batch, length, self.d_model, dtype=torch.float64)

    def sensitivity(self, module: nn.Module, x: Tensor, t: int) -> Tensor:
        x = x.clone().requires_grad_()
        y, _ = module(x)
        (gradient,) = torch.autograd.grad((y[0, t] * torch.randn_like(y[0, t])).sum(), x)
        return gradient[0]

    def num_params(self) -> int:
        return self.config.num_params(self.d_model)

    def flops_per_token(self, context: int) -> int:
        return self.config.flops_per_token(self.d_model, context)

    def state_bytes(self, batch: int, context: int, dtype: torch.dtype) -> int:
        return self.config.state_bytes(self.d_model, batch, context, dtype)


class ModelSubject(Subject):
    def __init__(self, config: LanguageModelConfig):
        self.config = config

    def fresh(self) -> LanguageModel:
        return self.config.build()

    def init_weights(self, module: Any) -> None:
        module.init_weights()

    def draw(self, batch: int, length: int) -> Tensor:
        return torch.randint(0, self.config.vocab_size, (batch, length))

    def sensitivity(self, module: Any, ids: Tensor, t: int) -> Tensor:
        """To the embedding of each token."""
        seen: list[Tensor] = []

        def keep(_: Any, __: Any, x: Tensor) -> Tensor:
            seen.append(x.detach().requires_grad_())
            return seen[0]

        hook = module.embedding.register_forward_hook(keep)
        logits, _ = module(ids)
        hook.remove()
        (gradient,) = torch.autograd.grad((logits[0, t] * torch.randn_like(logits[0, t])).sum(), seen[0])
        return gradient[0]

    def num_params(self) -> int:
        return self.config.num_params()

    def flops_per_token(self, context: int) -> int:
        return self.config.flops_per_token(context)

    def state_bytes(self, batch: int, context: int, dtype: torch.dtype) -> int:
        return self.config.state_bytes(batch, context, dtype)


def subjects() -> list[Any]:
    load_plugins()
    found: dict[str, Any] = {}
    for kind, family_member in sorted(TokenMixerConfig.family.items()):
        for label, config in EXAMPLES.get(kind, {}).items():
            found[f"{kind}-{label}"] = MixerSubject(config, EXAMPLE_WIDTH)
        if kind not in EXAMPLES:
            try:
                found[kind] = MixerSubject(family_member(), DEFAULT_WIDTH)  # type: ignore[arg-type]
            except UserError as error:
                found[kind] = f"the kind {kind!r} has no default config, so give it an example here: {error}"
    for name in MODELS:
        found[f"model-{name}"] = ModelSubject(MODELS[name](TINY))
    return [pytest.param(subject, id=name) for name, subject in found.items()]


@pytest.fixture(params=subjects())
def subject(request: pytest.FixtureRequest) -> Any:
    if isinstance(request.param, str):
        pytest.fail(request.param)
    return request.param


@pytest.fixture
def module(subject: Any) -> Any:
    return subject.build()


def empty_state(module: Any, batch: int, context: int = 2 * T) -> Any:
    return module.init_state(batch, context=context, dtype=torch.float64)


def assert_close(got: Any, want: Any) -> None:
    """Tensors or states, leaf by leaf."""
    torch.testing.assert_close(tree_leaves(got), tree_leaves(want), rtol=1e-10, atol=1e-10)


def row(state: Any, index: int) -> list[Tensor]:
    return [leaf[index : index + 1] for leaf in tree_leaves(state)]


def feed(module: Any, x: Tensor, pieces: list[int], state: Any) -> tuple[Tensor, Any]:
    """`x` in pieces of those lengths."""
    outputs, start = [], 0
    for piece in pieces:
        y, state = module(x[:, start : start + piece], state)
        outputs.append(y)
        start += piece
    assert start == x.shape[1]
    return torch.cat(outputs, dim=1), state


def test_causal_by_gradient(subject: Any, module: Any) -> None:
    remembers = subject.state_bytes(1, T, torch.float64) > 0
    for t in (0, 1, 5):
        strength = subject.sensitivity(module, subject.draw(1, 8), t).abs().amax(-1)
        assert (strength[t + 1 :] == 0).all()
        assert strength[t] > 0
        assert t == 0 or (strength[t - 1] > 0) == remembers


@torch.no_grad()
def test_one_pass_equals_pieces_equals_steps(subject: Any, module: Any) -> None:
    x = subject.draw(2, T)
    want, nothing = module(x)
    assert nothing is None
    reference = None
    for pieces in ([T], [5, 1, 3, 1, 2], [1, 6, 5], [1] * T):
        y, state = feed(module, x, pieces, empty_state(module, 2))
        assert_close(y, want)
        reference = reference or state
        assert_close(state, reference)


@torch.no_grad()
def test_a_state_need_not_be_told_the_context(subject: Any, module: Any) -> None:
    x = subject.draw(2, T)
    y, _ = feed(module, x, [5, 3] + [1] * (T - 8), module.init_state(2, dtype=torch.float64))
    assert_close(y, module(x)[0])


@torch.no_grad()
def test_a_step_does_not_change_the_state_it_was_given(subject: Any, module: Any) -> None:
    x = subject.draw(2, T)
    _, state = module(x[:, :-1], empty_state(module, 2))
    before = [leaf.clone() for leaf in tree_leaves(state)]
    first, _ = module(x[:, -1:], state)
    assert_close(state, before)
    assert_close(module(x[:, -1:], state)[0], first)


@torch.no_grad()
def test_states_keep_their_shapes_and_dtypes(subject: Any, module: Any) -> None:
    x = subject.draw(2, T)
    state = module.init_state(2, context=T, dtype=torch.float32)
    kinds = [(leaf.shape, leaf.dtype) for leaf in tree_leaves(state)]
    for piece in (x[:, :5], x[:, 5:6], x[:, 6:]):
        _, state = module(piece, state)
        assert [(leaf.shape, leaf.dtype) for leaf in tree_leaves(state)] == kinds


@torch.no_grad()
def test_padded_equals_unpadded(subject: Any, module: Any) -> None:
    """Ragged left padding in one batch, twice over, then a step of the whole batch. A row may have no token at all."""
    prompts = [[7, 4, 1, 0, 3], [2, 0, 5, 3, 4]]
    x = [subject.draw(1, first + second + 1) for first, second in zip(*prompts, strict=True)]
    state, alone = empty_state(module, 5), [empty_state(module, 1) for _ in range(5)]
    starts = [0] * 5
    for lengths in prompts:
        widest = max(lengths)
        batch = subject.draw(5, widest)  # what stands in the padding must not matter
        for r, length in enumerate(lengths):
            batch[r, widest - length :] = x[r][0, starts[r] : starts[r] + length]
        mask = torch.arange(widest) >= widest - torch.tensor(lengths)[:, None]
        y, state = module(batch, state, Segments.from_mask(mask))
        for r, length in enumerate(lengths):
            if length:
                want, alone[r] = module(x[r][:, starts[r] : starts[r] + length], alone[r])
                assert_close(y[r : r + 1, widest - length :], want)
            assert_close(row(state, r), alone[r])
            starts[r] += length
    y, state = module(torch.cat([rows[:, -1:] for rows in x]), state)
    for r in range(5):
        want, alone[r] = module(x[r][:, -1:], alone[r])
        assert_close(y[r : r + 1], want)
        assert_close(row(state, r), alone[r])


@torch.no_grad()
def test_padded_equals_unpadded_without_a_state(subject: Any, module: Any) -> None:
    x = subject.draw(3, T)
    lengths = [T, 5, 1]
    mask = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    y, nothing = module(x, None, Segments.from_mask(mask))
    assert nothing is None
    for r, length in enumerate(lengths):
        assert_close(y[r : r + 1, T - length :], module(x[r : r + 1, T - length :])[0])


@torch.no_grad()
def test_packed_equals_separate(subject: Any, module: Any) -> None:
    """The first document continues the state, the last one leaves its own; with padding in one row as well."""
    before, x, after = subject.draw(2, 3), subject.draw(2, T), subject.draw(2, 2)
    ids = torch.tensor([[-1, -1, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3]])
    cuts = [[2, 5, 6, 12], [0, 1, 9, 11, 12]]
    for continued in (False, True):
        start = empty_state(module, 2)
        if continued:
            _, start = module(before, start)
        y, state = module(x, start, Segments(ids))
        stateless, _ = module(x, None, Segments(ids))
        more, _ = feed(module, after, [1, 1], state)
        for r, edges in enumerate(cuts):
            for document, (left, right) in enumerate(pairwise(edges)):
                alone = empty_state(module, 1)
                if continued and document == 0:
                    _, alone = module(before[r : r + 1], alone)
                want, alone = module(x[r : r + 1, left:right], alone)
                assert_close(y[r : r + 1, left:right], want)
                if not continued:
                    assert_close(stateless[r : r + 1, left:right], want)
            if not continued:
                assert_close(row(state, r), alone)
            assert_close(more[r : r + 1], module(after[r : r + 1], alone)[0])


def test_no_rows_at_all(subject: Any, module: Any) -> None:
    """As a rank may be left with where rows run out."""
    x, state = subject.draw(0, 5), empty_state(module, 0)
    y, _ = module(x)
    (y.sum() + module(x, None, Segments(torch.zeros(0, 5, dtype=torch.long)))[0].sum()).backward()
    assert y.shape[:2] == (0, 5)
    assert all((p.grad is None or (p.grad == 0).all()) for p in module.parameters())
    for piece in (x, x[:, :1]):
        y, state = module(piece, state)
        assert y.shape[:2] == piece.shape[:2]
    assert all(leaf.shape[0] == 0 for leaf in tree_leaves(state))


@torch.no_grad()
def test_half_precision_stays_close(subject: Any, module: Any) -> None:
    x = subject.draw(2, T)
    want, _ = module(x)
    narrow = module.to(torch.bfloat16)
    y, _ = narrow(x.to(torch.bfloat16) if x.is_floating_point() else x)
    assert y.dtype == (torch.bfloat16 if x.is_floating_point() else torch.float32)
    assert (y - want).norm() / want.norm() < 0.1


def test_declared_parameters_are_the_real_ones(subject: Any) -> None:
    assert subject.num_params() == sum(parameter.numel() for parameter in subject.fresh().parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_declared_state_bytes_are_the_real_ones(subject: Any, dtype: torch.dtype) -> None:
    module = subject.build()
    for batch, context in ((1, 1), (2, 3), (3, T)):
        state = module.init_state(batch, context=context, dtype=dtype)
        declared = subject.state_bytes(batch, context, dtype)
        assert state_nbytes(state) == declared
        _, state = module(subject.draw(batch, context), state)
        assert state_nbytes(state) == declared


@torch.no_grad()
def test_a_state_that_outlives_its_context_is_as_large_as_declared(subject: Any, module: Any) -> None:
    """So what is declared constant in the context is so in truth."""
    sizes = [subject.state_bytes(1, context, torch.float64) for context in (T, 3 * T, 100 * T)]
    if isinstance(subject.config, RodimusConfig):
        assert len(set(sizes)) == 1
    x = subject.draw(1, 3 * T)
    _, state = feed(module, x, [T] + [4] * (T // 2), module.init_state(1, context=T, dtype=torch.float64))
    assert state_nbytes(state) == sizes[1]


@torch.no_grad()
def test_a_state_keeps_nothing_else_in_memory(subject: Any, module: Any) -> None:
    """As a view of what it was cut from it would."""
    x = subject.draw(2, T)
    _, state = module(x, module.init_state(2, context=T, dtype=torch.float64))
    for leaf in tree_leaves(state):
        assert leaf.untyped_storage().nbytes() == leaf.nbytes


@torch.no_grad()
def test_declared_flops_are_those_of_a_step(subject: Any, module: Any) -> None:
    """By torch's own count, on the backends whose products it sees: those that do a step's work and no more."""
    countable = {operator: backends[-1].name for operator, backends in OPERATORS.items()}
    for context in (1, 3, T):
        state = module.init_state(1, context=context, dtype=torch.float64)
        x = subject.draw(1, context)
        if context > 1:
            _, state = module(x[:, :-1], state)
        with use_backend(**countable), FlopCounterMode(display=False) as counter:
            module(x[:, -1:], state)
        assert subject.flops_per_token(context) == counter.get_total_flops()


def test_the_config_survives_its_dict(subject: Any) -> None:
    config: Config = subject.config
    root = TokenMixerConfig if isinstance(config, TokenMixerConfig) else LanguageModelConfig
    again = root.from_dict(json.loads(json.dumps(config.to_dict())))
    assert type(again) is type(config)
    assert again == config
    assert again.canonical_json() == config.canonical_json()


def test_every_parameter_is_initialised(subject: Any) -> None:
    module = subject.fresh()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    subject.init_weights(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        assert tensor.isfinite().all(), f"{name} is left as it was"


def test_building_on_the_meta_device_agrees(subject: Any) -> None:
    real = subject.fresh()
    with torch.device("meta"):
        meta = subject.fresh()
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    shapes = [{name: (t.shape, t.dtype) for name, t in m.state_dict().items()} for m in (real, meta)]
    assert shapes[0] == shapes[1]


def test_the_same_seed_gives_the_same_weights(subject: Any) -> None:
    drawn = []
    for seed in (3, 3, 4):
        torch.default_generator.manual_seed(seed)
        drawn.append(subject.fresh().state_dict())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert any(not torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


def test_a_new_kind_is_held_to_the_contract_without_an_edit() -> None:
    try:

        class Newcomer(FeedForwardConfig):
            kind = "newcomer"
            width: int = 8

        class NeedsMore(FeedForwardConfig):
            kind = "needs_more"

        found = {param.id: param.values[0] for param in subjects()}
    finally:
        for kind in ("newcomer", "needs_more"):
            TokenMixerConfig.family.pop(kind, None)
    assert found["newcomer"].config == Newcomer()
    assert "'needs_more' has no default config" in found["needs_more"]
    assert NeedsMore.kind in found["needs_more"]
