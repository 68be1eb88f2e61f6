"""The benchmarks at tiny shapes: what they report, and that a wrong result is never timed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from rodimus_lab.bench import app, mixers, training
from rodimus_lab.bench.measure import copy_rate, median_seconds, peak_bytes, seconds_of
from rodimus_lab.bench.operators import CASES, Scene, measure
from rodimus_lab.bench.race import race
from rodimus_lab.bench.tokenization import SHORTEST, scale
from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import SIZES, model_config
from rodimus_lab.ops.backend import OPERATORS, Backend
from rodimus_lab.ops.cross_entropy import linear_cross_entropy

CPU = torch.device("cpu")
TIMES = {"forward_seconds", "both_seconds", "forward_over_floor", "both_over_floor", "peak_bytes", "forward_peak_bytes"}


def bench(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_seconds_leave_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0])
    monkeypatch.setattr("rodimus_lab.bench.measure.time.perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert seconds_of(lambda: calls.append(1), CPU, repeats=3, warmup=4) == [1.0, 3.0, 2.0]
    assert len(calls) == 7


def test_the_median_is_of_the_timed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 120.0])
    monkeypatch.setattr("rodimus_lab.bench.measure.time.perf_counter", lambda: next(clock))
    assert median_seconds(lambda: None, CPU, repeats=3) == 3.0


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    x = torch.ones(1000)

    def call() -> None:
        a = x + 1  # 4,000 bytes
        b = a.view(10, 100) * 2  # 8,000: the view is no memory of its own
        del a
        a = b + 1  # 8,000 again
        a.add_(b)
        del a, b

    assert peak_bytes(call, CPU) == 8000


def test_peak_memory_follows_the_backward_pass() -> None:
    x = torch.ones(1000, requires_grad=True)

    def call() -> None:
        torch.autograd.grad((x.exp() * 2).sum(), x)

    assert 12_000 <= peak_bytes(call, CPU) <= 12_100  # exp(x), its gradient and their product, and some scalars


def test_the_copy_rate_is_one_of_memory() -> None:
    assert 1e8 < copy_rate(CPU, repeats=2) < 1e13


def test_ops() -> None:
    report = bench("ops", "--length", "20", "--repeats", "2", "--device", "cpu")
    report["rows"] = [row for row in report["rows"] if "mixer" not in row]
    assert report["bench"] == "ops"
    assert report["environment"].keys() >= {"commit", "dirty", "packages", "python", "cpu", "device", "load_average"}
    assert report["settings"]["copy_bytes_per_second"] > 0
    assert {row["operator"] for row in report["rows"]} == set(CASES)
    for row in report["rows"]:
        if "note" in row:
            assert row["note"].startswith("cannot run: ")
            assert not TIMES & row.keys()
        else:
            assert row["relative_error"] <= 1e-4
            assert all(row[key] > 0 for key in TIMES)
    measured = {(row["operator"], row["backend"]) for row in report["rows"] if "note" not in row}
    assert measured >= {("gated_linear", "chunked"), ("gated_linear", "naive"), ("attention", "sdpa")}


def test_ops_takes_the_operators_asked_for() -> None:
    rows = bench("ops", "--only", "short_conv", "--length", "9", "--batch", "3", "--repeats", "1")["rows"]
    assert {row["operator"] for row in rows} == {"short_conv"}
    assert rows[0]["shape"] == {"batch": 3, "length": 9, "channels": 1024, "taps": 4}
    with pytest.raises(UserError, match="no operator benchmark named 'short_con'; did you mean 'short_conv'"):
        bench("ops", "--only", "short_con")


def wrong_backends() -> dict[str, Any]:
    """Backends of `short_conv`, each off in its own way."""
    (taps,) = (backend.run for backend in OPERATORS["short_conv"] if backend.name == "taps")

    def off(wrong: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def run(*x: Any) -> tuple[Tensor, Tensor]:
            y, state = taps(*x)
            return wrong(y), state

        return run

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * 1.001

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("the kernel does not compile\nfor this device")

    return {
        "output": off(lambda y: y * 1.001),
        "gradient": off(WrongGradient.apply),
        "nan": off(lambda y: y * float("nan")),
        "shape": off(lambda y: y[..., :1]),
        "broken": broken,
    }


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("output", "wrong at B1 T8 D1024 W4: "),
        ("gradient", "wrong at B1 T8 D1024 W4: the gradient of "),
        ("nan", "wrong at B1 T8 D1024 W4: "),
        ("shape", "failed: RuntimeError: Mismatch in shape"),
        ("broken", "failed: RuntimeError: the kernel does not compile"),
    ],
)
def test_a_wrong_backend_gets_no_time(name: str, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Backend("wrong", wrong_backends()[name])
    monkeypatch.setitem(OPERATORS, "short_conv", (wrong, *OPERATORS["short_conv"]))
    (problem,) = CASES["short_conv"](Scene(CPU, torch.float32, 1, 8))
    rows = {row["backend"]: row for row in race(problem, repeats=1, bytes_per_second=1e9)}
    assert rows["wrong"]["note"].startswith(note)
    assert not TIMES & rows["wrong"].keys()
    if name == "gradient":
        assert rows["wrong"]["relative_error"] == pytest.approx(1e-3, rel=0.1)
    assert rows["taps"].keys() >= TIMES
    json.dumps(rows, allow_nan=False)


def test_a_value_wrong_outside_the_head_of_the_batch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrence is checked on a sample: the last row and columns, to the last token, at the full size."""
    (right,) = (backend.run for backend in OPERATORS["gated_linear"] if backend.name == "chunked")

    def forgets(*x: Any) -> Any:
        o, state = right(*x)
        return torch.cat([o[:, :-1], 0 * o[:, -1:]], dim=1), state

    monkeypatch.setitem(OPERATORS, "gated_linear", (Backend("forgets", forgets), *OPERATORS["gated_linear"]))
    (problem,) = CASES["gated_linear"](Scene(CPU, torch.float32, 2, 33))
    rows = {row["backend"]: row for row in race(problem, repeats=1, bytes_per_second=1e9)}
    assert "it gets no time" in rows["forgets"]["note"]
    assert rows["chunked"].keys() >= TIMES


def test_every_models_mixer_is_timed() -> None:
    """A sublayer that only mixes channels is none."""
    rows = bench("ops", "--only", "mixers", "--repeats", "1", "--length", "16")["rows"]
    with_one = {row["model"] for row in rows}
    assert {"transformer++", "rodimus", "rodimus+", "mamba", "mamba2", "gla", "hgrn2", "rwkv6"} <= with_one
    assert len({(row["mixer"], row["model"]) for row in rows}) == len(rows)
    assert not {"feed_forward", "gated_gelu", "rwkv6_channel"} & {row["mixer"] for row in rows}
    for row in rows:
        assert row["forward_seconds_per_token"] > 0
        assert row["both_seconds_per_token"] > 0
        assert row["output_error"] < 1e-3
        assert row["size"] == "smoke"
    assert rows[0]["over_first"] == 1
    backends = {row["mixer"]: row["backends"] for row in rows}
    assert (backends["gla"], backends["mamba2"]) == ("gated_linear: chunked", "ssd: attention_form")


def test_mixers_of_named_models_are_told_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    scene = Scene(CPU, torch.float32, 1, 16)
    rows, _ = measure(scene, ["mixers"], repeats=1, compile=False, models=["rodimus_plus"])
    assert [row["model"] for row in rows] == ["transformer++", "rodimus_plus", "rodimus_plus"]
    assert [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"{row['mixer']} of {row['model']}" for row in rows
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--model", "rodimu"), "rodimus"), (("--only", "attention", "--model", "rodimus"), "--only mixers")],
)
def test_models_that_have_no_part_in_it_are_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(app, ["ops", *arguments], catch_exceptions=False)


def test_a_size_is_trained_at_another_width() -> None:
    arguments = ("--model", "rodimus", "--batch-size", "1", "--seq-len", "16", "--steps", "1")
    own, wide = (bench("train", *arguments, *more)["rows"][0] for more in ((), ("--width", "192")))
    assert wide["params"] > own["params"]
    assert (wide["width"], "width" in own) == (192, False)
    with pytest.raises(UserError, match="--width 100 is not a multiple of 64"):
        CliRunner().invoke(app, ["train", "--width", "100"], catch_exceptions=False)


def test_a_wrong_mixer_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPERATORS["gated_linear"]
    wrong = right[-1]._replace(run=lambda *arguments: tuple(1.1 * x for x in right[-1].run(*arguments)), name="wrong")
    monkeypatch.setitem(OPERATORS, "gated_linear", (wrong, *right))
    monkeypatch.setattr(mixers, "MODELS", ["rodimus"])
    rows: list[Any] = []
    mixers.measure_mixers(rows, mixers.MixerSetting(SIZES["smoke"], CPU, 1, 16, 1, False))
    assert [row["mixer"] for row in rows] == ["attention", "rodimus"]
    assert "both_seconds_per_token" in rows[0]
    assert "both_seconds_per_token" not in rows[1]
    assert "so it gets no time" in rows[1]["note"]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_measured_before_an_interruption_is_shown(
    signal_number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = training.measure_steps

    def one_and_no_more(entrant: Any, *rest: Any) -> Any:
        if entrant.name != "transformer++":
            signal.raise_signal(signal_number)
        return ours(entrant, *rest)

    monkeypatch.setattr(training, "measure_steps", one_and_no_more)
    before = signal.getsignal(signal.SIGTERM)
    rows = bench("train", "--batch-size", "1", "--steps", "1", "--seq-len", "16")["rows"]
    assert [row["model"] for row in rows] == ["transformer_pp"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_memory_floor_counts_each_tensor_once() -> None:
    (problem,) = CASES["short_conv"](Scene(CPU, torch.float32, 1, 8))
    tensor, parameters = 8 * 1024 * 4, (1024 * 4 + 1024) * 4
    row = next(row for row in race(problem, repeats=1, bytes_per_second=1.0) if row["backend"] == "taps")
    assert row["forward_seconds"] / row["forward_over_floor"] == pytest.approx(2 * tensor + parameters)
    assert row["both_seconds"] / row["both_over_floor"] == pytest.approx(5 * tensor + 3 * parameters)


def test_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_cross_entropy.CHUNK_ELEMENTS, "cpu", 1 << 14)
    report = bench("loss", "--shape", "16x8x100", "--shape", "64x8x2000", "--repeats", "1", "--device", "cpu")
    rows = {(row["case"], row["backend"]): row for row in report["rows"]}
    assert {backend for _, backend in rows} == {"chunked", "naive"}
    assert all(row.keys() >= TIMES and row["relative_error"] < 1e-4 for row in rows.values())
    chunked, naive = rows["64x8x2000", "chunked"], rows["64x8x2000", "naive"]
    assert chunked["matrix_bytes"] == 64 * 2000 * 4
    assert naive["peak_over_matrix"] >= 2
    assert naive["peak_over_naive"] == naive["time_over_naive"] == 1
    assert chunked["peak_over_naive"] == chunked["peak_bytes"] / naive["peak_bytes"] < 1


@pytest.mark.parametrize("shape", ["16x8", "0x8x9", "ax8x9", "16x8x100x2"])
def test_loss_refuses_what_is_no_shape(shape: str) -> None:
    with pytest.raises(UserError, match="is not a shape; give tokens x width x vocabulary"):
        bench("loss", "--shape", shape)


def test_train() -> None:
    report = bench(
        "train", "--model", "transformer++", "--model", "rodimus", "--batch-size", "2", "--seq-len", "16",
        "--micro-batch-size", "1", "--steps", "2", "--device", "cpu",
    )  # fmt: skip
    first, second = report["rows"]
    assert [first["model"], second["model"]] == ["transformer_pp", "rodimus"]
    for row in report["rows"]:
        params = model_config(row["model"], size="smoke").num_params()
        assert row["params"] == params
        assert row["tokens_per_second"] > 0
        assert row["peak_bytes"] > 16 * params  # Weights, two moments and gradients in float32, then activations.
        assert row["mfu"] is None  # No peak is known of a CPU.
        assert (row["batch_size"], row["micro_batch_size"], row["compiled"]) == (2, 1, False)
        assert 0 < row["loss"] < 9
    assert first["over_first"] == 1
    assert second["over_first"] == second["tokens_per_second"] / first["tokens_per_second"]


def test_train_writes_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bench("train", "--model", "rodimus", "--batch-size", "1", "--seq-len", "8", "--steps", "1", "--device", "cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "value"), [("--model", "rodimos"), ("--size", "wikitext")])
def test_train_names_what_it_does_not_know(option: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{value}'; did you mean"):
        bench("train", option, value, "--device", "cpu")


def test_data() -> None:
    report = bench("data", "--corpus", "pydoc", "--seconds", "0.05", "--workers", "2")
    one, two, reading = report["rows"]
    assert [one["workers"], two["workers"]] == [1, 2]
    assert reading["bytes_per_second"] > one["bytes_per_second"]
    assert "one reader feeds some" in reading["note"]
    for row in (one, two):
        assert row["tokens_per_second"] == row["tokens"] / row["seconds"]
        assert row["over_target"] == row["tokens_per_second"] / 1_000_000
        assert ("too short to be relied on" in row.get("note", "")) == (row["seconds"] < SHORTEST)
        assert 0 < row["tokens_per_second_per_core"] <= row["tokens_per_second"]
    assert (scale(1), scale(2), scale(6), scale(8)) == ([1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8])
    assert two["speedup"] == two["tokens_per_second"] / one["tokens_per_second"]


def test_tables_show_measurements_and_say_what_is_missing() -> None:
    result = CliRunner().invoke(app, ["ops", "--only", "gated_linear", "--length", "5", "--repeats", "1"])
    assert result.exit_code == 0
    assert "bench ops: " in result.stdout
    assert "commit " in result.stdout
    table = result.stdout.splitlines()
    assert any(line.startswith("gated_linear") and "chunked" in line for line in table)
    assert "gated_linear step: cannot run: it is for one token at a time" in table
