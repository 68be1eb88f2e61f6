"""Numbers as the pages of runs show them."""

from __future__ import annotations

from typing import Any

import pytest

from rodimus_lab.site.values import bytes_text, rounded, seconds_text, setting, shortened, told


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tokens", 131072000.0, "131,072,000"),
        ("params", 46681856, "46,681,856"),
        ("peak_memory_bytes", 995109888, "995 MB"),
        ("growth_bytes", 0, "0 B"),
        ("seconds", 331.573, "5 min 32 s"),
        ("arc_easy.seconds", 48.4, "48.4 s"),
        ("seconds_per_token", 0.0027150559425354005, "2.72 ms"),
        ("floor_seconds", 0.0006331367425481745, "633 µs"),
        ("tokens_per_second", 2558134.7, "2,558,135 tokens/s"),
        ("peak_flops", 989e12, "989 TFLOP/s"),
        ("mfu", 0.18574421692534038, "18.57 %"),
        ("test_accuracy", 0.99195833, "99.2 %"),
        ("piqa.acc_norm_stderr", 0.011661506839823768, "1.166 %"),
        ("train_loss", 3.9452616, "3.945 nats"),
        ("lambada_openai.perplexity", 1133564.6902736258, "1,133,565"),
        ("test_ppl", 59.483677, "59.48"),
        ("test_word_ppl", 263.86114, "263.86"),
        ("load_average", 1.8955078125, "1.896"),
        ("peak_memory_bytes", None, "—"),
        ("dirty", True, "yes"),
        ("seed", 20240101, "20240101"),
        ("loss", float("inf"), "Infinity"),
    ],
)
def test_metrics_have_units_and_few_digits(name: str, value: Any, text: str) -> None:
    assert told(name, value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00046420000000000001, "0.0004642"),
        (10000.0, "10,000"),
        (1e-05, "1e-05"),
        (0.95, "0.95"),
        ([], "—"),
        ("1", "1"),
    ],
)
def test_settings_keep_every_digit(value: Any, text: str) -> None:
    assert setting("optimizer.lr", value) == text


def test_texts_of_sizes_and_times() -> None:
    assert [bytes_text(number) for number in (999, 1000, 999_600, 10**6, 1.5e9)] == [
        "999 B", "1.00 kB", "1,000 kB", "1.00 MB", "1.50 GB",
    ]  # fmt: skip
    assert [seconds_text(number) for number in (0, 59.96, 60, 3599.7, 7260)] == [
        "0 s", "60.0 s", "1 min 0 s", "1 h 0 min", "2 h 1 min",
    ]  # fmt: skip
    assert [rounded(number) for number in (4.642e-05, 0.045551414, 12345.678)] == ["4.642e-05", "0.04555", "12,346"]


def test_long_numbers_of_figures_are_shortened_and_texts_are_not() -> None:
    given = ["0.071166667", "46.681855999999996", "59.48", "2.5", "not run", "1.2.345678901"]
    assert [shortened(text) for text in given] == ["0.07117", "46.68", "59.48", "2.5", "not run", "1.2.345678901"]
