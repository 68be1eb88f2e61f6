"""The examples in docs/adding-*.md, run as they stand: in processes of their own, for they register what they add."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rodimus_lab.records import PROJECT_ROOT, load_records

PAGES = {
    "adding-a-mixer": "baselines/leaky_average.py",
    "adding-a-head-type": "baselines/paired_values.py",
    "adding-an-experiment": "experiments/learning_rates.py",
    "adding-an-evaluator": "evals/bits_per_byte.py",
}
LOAD = "import sys, {names}\nfrom rodimus_lab.cli import main\nsys.argv[0] = 'rodimus-lab'\nmain()\n"


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PROJECT_ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder with every example as a module, named after the file that the page puts it in."""
    for page, file in PAGES.items():
        first = examples(page)[0]
        assert first.startswith(f"# {file}\n")
        (tmp_path / Path(file).name).write_text(first)
    return tmp_path


def run(modules: Path, *command: object, code: int = 0) -> str:
    """What a command wrote, or where it should fail with a code what it said."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (modules, PROJECT_ROOT)))}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def lab(modules: Path, module: str, *arguments: object, code: int = 0) -> str:
    """`rodimus-lab ARGUMENTS` where an example is part of the project."""
    return run(modules, "-c", LOAD.format(names=module), *arguments, code=code)


def test_the_mixer_and_the_head_type_keep_the_contract(modules: Path) -> None:
    plugins = ("-p", "leaky_average", "-p", "paired_values", "-p", "no:cacheprovider")
    chosen = ("-k", "leaky_average or paired_values", "tests/nn/test_nn_contract.py")
    out = run(modules, "-m", "pytest", *plugins, *chosen)
    assert int(re.search(r"(\d+) passed", out)[1]) > 40
    assert "failed" not in out


def test_the_experiment_is_a_command_and_a_table(modules: Path, places: Path, texts: Path) -> None:
    options = ("--corpus", texts, "--lr", "1e-3", "--lr", "3e-3", "--steps", 2, "--serial", "--device", "cpu")
    out = lab(modules, "learning_rates", "learning-rates", *options)
    assert "learning_rates.md" in out
    table = (places / "tables" / "learning_rates.md").read_text()
    assert table.startswith("# What the learning rate is worth")
    assert re.findall(r"\| rodimus \| (\S+) \|", table) == ["0.001", "0.003"]
    assert len(load_records(places / "runs")) == 2


def test_the_evaluator_is_a_command_and_leaves_a_record(modules: Path, smoke_run) -> None:
    text = smoke_run.root / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 3)
    out = lab(modules, "bits_per_byte", "bits-per-byte", smoke_run.id, text)
    (record,) = load_records(smoke_run.root / "runs", "bits-per-byte")
    assert 1 < record.metrics["bits_per_byte"] < 12
    assert record.metrics["bytes"] < text.stat().st_size
    assert out.startswith(f"{record.metrics['bits_per_byte']:.4f} bits per byte")
    assert json.loads((record.path / "recipe.json").read_text())["run"] == smoke_run.id
    text.write_bytes(b"\xff\xfe")
    said = lab(modules, "bits_per_byte", "bits-per-byte", smoke_run.id, text, code=2)
    assert said == f"error: {text} is not in UTF-8; give a text file that is\n"


def test_the_other_examples_run() -> None:
    (_, short) = examples("adding-a-head-type")
    scope: dict[str, object] = {}
    exec(short.replace('size="125m"', 'size="smoke", vocab_size=64').replace("12", "2").replace("6}", "2}"), scope)
