"""What the machine has and what would run on it."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch

from rodimus_lab.doctor import Fact, examine
from rodimus_lab.ops.backend import OPERATORS, choose
from rodimus_lab.records import environment


@pytest.fixture(scope="module")
def facts():
    return examine()


def values(facts, topic):
    return {fact.name: fact.value for fact in facts if fact.topic == topic}


def test_versions_are_those_installed(facts):
    versions = values(facts, "version")
    for package in ("torch", "numpy", "pydantic", "tokenizers", "safetensors"):
        assert versions[package] == metadata.version(package)


def test_devices(facts):
    devices = values(facts, "device")
    assert "threads" in devices["cpu"]
    if torch.cuda.is_available():
        assert torch.cuda.get_device_properties(0).name in devices["cuda:0"]
    else:
        assert devices["cuda"] == "none; models train and run on the CPU"


def test_places_follow_the_environment(monkeypatch, tmp_path):
    variables = {
        "data": "RODIMUS_LAB_DATA",
        "token shards": "RODIMUS_LAB_CACHE",
        "checkpoints": "RODIMUS_LAB_CHECKPOINTS",
        "records": "RODIMUS_LAB_RESULTS",
    }
    for name, variable in variables.items():
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    places = values(examine(), "place")
    assert {name: places[name] for name in variables} == {name: str(tmp_path / name) for name in variables}
    monkeypatch.delenv("RODIMUS_LAB_DATA")
    assert values(examine(), "place")["data"] == "not set ($RODIMUS_LAB_DATA)"


@pytest.mark.parametrize("version", ["2.60.0", None])
def test_the_engine_of_sweeps(monkeypatch, version):
    packages = {"ray": version} if version else {}
    monkeypatch.setattr("rodimus_lab.doctor.environment", lambda: environment() | {"packages": packages})
    engine = values(examine(), "sweep")["engine"]
    assert engine == "Ray 2.60.0" if version else engine.startswith("none, so several runs go one after another; pip")


def test_every_operator_has_one_backend_chosen_and_the_others_explained(facts):
    backends = values(facts, "cpu backend")
    for operator in OPERATORS:
        verdicts = {name.split(": ")[1]: text for name, text in backends.items() if name.startswith(f"{operator}: ")}
        assert list(verdicts.values()).count("chosen") == 1
        assert all(text in ("chosen", "can run") or len(text) > len("no: ") for text in verdicts.values())
        assert verdicts[OPERATORS[operator][-1].name] in ("chosen", "can run"), "the last runs everywhere"


def test_the_chosen_backend_is_the_one_that_runs(facts):
    """Asked as the attention of a training step on the CPU."""
    facts_of_call = {
        "device": "cpu",
        "dtype": torch.float32,
        "cached": False,
        "packed": False,
        "length": 128,
        "window": None,
        "sinks": False,
        "grad": True,
        "widths": (64, 64),
    }
    chosen = choose("attention", "auto", facts_of_call).name
    assert values(facts, "cpu backend")[f"attention: {chosen}"] == "chosen"


def test_from_the_command_line(cli, places):
    assert [Fact(**fact) for fact in json.loads(cli("doctor", "--json").out)] == examine()
    out = cli("doctor").out
    for fact in examine():
        assert fact.name in out
        assert fact.value in out
