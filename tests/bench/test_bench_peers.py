"""The peers in the benchmarks: built at our sizes, checked before they are timed, named where they are missing."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from rodimus_lab.bench import app, operator_peers, peers, training
from rodimus_lab.bench.operators import CASES, Scene
from rodimus_lab.bench.peers import DECODE_PEERS, PEERS, Peer, parameters, wrong_loss
from rodimus_lab.bench.race import run_alone
from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import SIZES, Size, model_config
from rodimus_lab.train import TrainOptions
from rodimus_lab.train.distributed import World

CPU = torch.device("cpu")
TINY = Size("smoke", 1, 64, 1, 97, 16)
HERE = [name for name in PEERS if importlib.util.find_spec(PEERS[name].package[0])]
INSTALLED = pytest.mark.skipif("transformers-llama" not in HERE, reason="transformers is not installed")


def bench(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("size", ["wikitext103", "1.3b"])
def test_a_peer_has_the_parameters_of_its_like(name: str, size: str) -> None:
    with torch.device("meta"):
        peer = PEERS[name](SIZES[size])
    expected = model_config(PEERS[name].like, size=size).num_params()
    assert abs(parameters(peer) / expected - 1) <= (0.05 if "mamba" in name else 0)


def test_a_peer_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS._things, "small", Small)
    with pytest.raises(ValueError, match=r"it has [\d,]+ parameters, rodimus has [\d,]+: no fair match"):
        peers.build("small", SIZES["smoke"], CPU)


class Small(Peer):
    """A bag of embeddings: what comes next depends on the last token alone, so decoding is exact."""

    package = ("torch", "it is there")
    like = "rodimus"
    kernels = False
    decoding = "none"

    def __init__(self, size: Size):
        super().__init__()
        self.table = torch.nn.Embedding(size.vocab_size, size.vocab_size)
        self.net = torch.nn.Module()
        self.net.lm_head = self.table

    def logits(self, ids_BT: Tensor) -> Tensor:
        return self.table(ids_BT)

    def prefill(self, ids_BT: Tensor, slots: int) -> Tensor:
        return self.table(ids_BT[:, -1])

    def step(self, ids_B1: Tensor) -> Tensor:
        return self.table(ids_B1[:, -1])


class Forgetful(Small):
    def step(self, ids_B1: Tensor) -> Tensor:
        return super().step(ids_B1 * 0)


@pytest.mark.parametrize(("kind", "timed"), [(Small, True), (Forgetful, False)])
def test_decoding_is_checked_before_it_is_timed(kind: type[Peer], timed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS._things, "small", kind)
    monkeypatch.setattr(peers, "build", lambda name, size, device: kind(TINY))
    monkeypatch.setitem(SIZES, "smoke", TINY)
    row = peers.decode("small", "smoke", 2, 5, CPU, torch.float32)
    assert ("seconds_per_token" in row) == timed
    if timed:
        assert row["tokens_per_second"] == 2 / row["seconds_per_token"]
    else:
        assert "its decoding is off by" in row["note"]
        assert "it gets no time" in row["note"]


@INSTALLED
def test_llama_decodes_as_it_reads() -> None:
    row = DECODE_PEERS["transformers-llama"]("smoke", 2, 40, CPU, torch.float32)
    assert row["relative_error"] < 1e-5
    assert row["seconds_per_token"] > 0
    assert (row["batch_size"], row["context"], row["dtype"], row["size"]) == (2, 40, "float32", "smoke")
    assert row["weight_bytes"] == 4 * row["params"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels may run here")
@pytest.mark.parametrize("name", ["fla-rodimus", "mamba-ssm-mamba2", "mamba-ssm-mamba"])
def test_a_peer_that_cannot_run_is_named_with_the_reason(name: str) -> None:
    note = DECODE_PEERS[name]("smoke", 1, 8, CPU, torch.float32)["note"]
    assert note.startswith("cannot run: ")
    assert ("need a CUDA device" in note) == (name in HERE)
    assert ("is not installed (pip install" in note) == (name not in HERE)


def test_train_sets_peers_beside_ours() -> None:
    report = bench(
        "train", "--model", "transformer++", "--peers", "--batch-size", "2", "--seq-len", "16", "--steps", "1",
        "--device", "cpu",
    )  # fmt: skip
    rows = {row["model"]: row for row in report["rows"]}
    assert set(rows) == {"transformer_pp", *PEERS}
    assert [row["peer"] for row in report["rows"]] == [False] + [True] * len(list(PEERS))
    if "transformers-llama" in HERE:
        ours, theirs = rows["transformer_pp"], rows["transformers-llama"]
        assert ours["params"] == theirs["params"]
        assert theirs["over_first"] == theirs["tokens_per_second"] / ours["tokens_per_second"]
        for row in (ours, theirs):
            assert row["first_loss"] == pytest.approx(math.log(4096), abs=0.5)
            assert row["loss"] < row["first_loss"]  # The same batch again and again.
            assert row["peak_bytes"] > 16 * row["params"]
    for name in set(PEERS) - set(HERE):
        assert "is not installed" in rows[name]["note"]


def test_train_names_an_unknown_peer_and_an_unknown_backend() -> None:
    for option, value, complaint in [
        ("--peer", "fla-rodimos", "no peer named 'fla-rodimos'; did you mean 'fla-rodimus'"),
        ("--backend", "attention=naiv", "attention has no backend 'naiv'; did you mean 'naive'"),
        ("--backend", "attention", "no operator=backend pair"),
    ]:
        with pytest.raises(UserError, match=complaint):
            bench("train", option, value, "--device", "cpu")


def test_train_by_another_backend_and_precision() -> None:
    report = bench(
        "train", "--model", "transformer", "--backend", "attention=naive", "--precision", "bf16-params",
        "--batch-size", "2", "--seq-len", "16", "--steps", "1", "--device", "cpu",
    )  # fmt: skip
    (row,) = report["rows"]
    assert row["backends"] == {"attention": "naive"}
    assert row["precision"] == "bf16-params"
    # Weights, two moments and gradients of two bytes each, then activations; twice that in float32.
    assert 8 * row["params"] < row["peak_bytes"]


def test_a_model_that_does_not_fit_or_breaks_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.measure_steps

    def measure(entrant: Any, *rest: Any) -> Any:
        if entrant.name == "rodimus":
            raise torch.OutOfMemoryError("too much")
        if entrant.name == "rodimus+":
            raise RuntimeError("broken\nin some way")
        return real(entrant, *rest)

    monkeypatch.setattr(training, "measure_steps", measure)
    rows = bench("train", "--batch-size", "1", "--seq-len", "8", "--steps", "1", "--device", "cpu")["rows"]
    assert rows[0]["tokens_per_second"] > 0
    assert (rows[1]["note"], rows[1]["out_of_memory"]) == ("out of memory", True)
    assert rows[2]["note"] == "failed: RuntimeError: broken"


def test_a_peer_that_cannot_be_captured_is_measured_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(entrant: training.Entrant, world: World, options: TrainOptions, steps: int) -> dict[str, Any]:
        if options.capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        return {"model": entrant.name, "tokens_per_second": 1.0, "mfu": None, "peak_bytes": 0}

    monkeypatch.setattr(training, "measure_steps", measured)
    world = World(rank=0, size=1, device=torch.device("cuda"))
    entrants = [
        training.Entrant(name, TINY, 1, "fp32", peer=peer) for name, peer in (("fla-rodimus", True), ("rodimus", False))
    ]
    peer, ours = training.compare(entrants, world, TrainOptions(capture=True), 1)
    assert peer["tokens_per_second"] == 1.0
    assert "not permitted" in ours["note"]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.0, 12.0])
def test_a_wrong_first_loss_gets_no_time(loss: float) -> None:
    assert "it gets no time" in str(wrong_loss(loss, 4096))
    assert wrong_loss(math.log(4096) + 0.4, 4096) is None


def test_attention_stands_beside_the_recurrence_at_its_shape() -> None:
    rows = bench("ops", "--only", "gated_linear", "--length", "20", "--repeats", "1", "--device", "cpu")["rows"]
    row = next(row for row in rows if row["backend"] == "SDPA causal")
    assert row["peer"]
    assert row["case"] == "B1 T20 8 heads of 64"
    assert 0 < row["relative_error"] < 1e-5
    assert row["both_seconds"] > row["forward_seconds"] > 0
    assert not [
        row for row in bench("ops", "--only", "gated_linear", "--length", "5", "--no-peers")["rows"] if "peer" in row
    ]


def test_a_wrong_peer_gets_no_time() -> None:
    (ours,) = CASES["gated_linear"](Scene(CPU, torch.float32, 1, 12))
    problem = operator_peers.causal_attention(ours)
    right = problem.run
    object.__setattr__(problem, "run", lambda x, backend: right(x, backend) * 1.01)
    row = run_alone(problem, "wrong", repeats=1, bytes_per_second=1e9)
    assert "it gets no time" in row["note"]
    assert "forward_seconds" not in row
