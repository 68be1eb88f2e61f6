"""What this machine has, and what the operators would choose on it."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from rodimus_lab.data import cache_root, data_root
from rodimus_lab.ops.backend import OPERATORS, survey, usual
from rodimus_lab.records import environment, runs_root, tables_root
from rodimus_lab.weights import checkpoints_root


class Fact(NamedTuple):
    topic: str
    name: str
    value: str


def examine() -> list[Fact]:
    """Versions, devices, places, then each operator's backends on each device type: chosen, possible, or why not."""
    env = environment()
    facts = [Fact("project", "commit", str(env["commit"])), Fact("project", "uncommitted changes", str(env["dirty"]))]
    facts += [Fact("version", "python", str(env["python"]))]
    facts += [Fact("version", name, version or "not installed") for name, version in env["packages"].items()]
    facts.append(Fact("device", "cpu", f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts.append(
            Fact(
                "device",
                f"cuda:{index}",
                f"{device.name}, {device.total_memory / 2**30:.0f} GiB, "
                f"compute capability {device.major}.{device.minor}",
            )
        )
    if not torch.cuda.is_available():
        facts.append(Fact("device", "cuda", "none; models train and run on the CPU"))
    ray = env["packages"].get("ray")
    without = "none, so several runs go one after another; pip install -e '.[sweep]' for Ray"
    facts.append(Fact("sweep", "engine", f"Ray {ray}" if ray else without))
    places = {
        "data": data_root(),
        "token shards": cache_root(),
        "checkpoints": checkpoints_root(),
        "records": runs_root(),
        "tables": tables_root(),
    }
    facts += [
        Fact("place", name, str(place) if place else "not set ($RODIMUS_LAB_DATA)") for name, place in places.items()
    ]
    for operator in OPERATORS:
        for kind in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            chosen = usual(operator, kind)
            for name, reason in survey(operator, kind).items():
                verdict = f"no: {reason}" if reason else ("chosen" if name == chosen else "can run")
                facts.append(Fact(f"{kind} backend", f"{operator}: {name}", verdict))
    return facts
