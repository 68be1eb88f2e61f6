"""The gates of a trained Rodimus layer over a text: as numbers, beside a run record and as heat maps (Figure 8).

Shapes: T tokens, n state expansion.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.nn.rodimus import Gates, Rodimus
from rodimus_lab.records import write_atomic
from rodimus_lab.report import HeatMap, Panels

GATES = "gates.jsonl"  # In a record's folder: a line for each token with g, tau and, of a run without tau, its g.
DIGITS = 5
WITHOUT = ", trained without tau"
TITLE = "Figure 8. The gates of a trained layer over a sentence"


class LayerGates(NamedTuple):
    """The gates of one layer, on the CPU in float32."""

    g_Tn: Tensor
    tau_Tn: Tensor | None

    @property
    def write_Tn(self) -> Tensor:
        """The input gate g^tau, or g without a temperature."""
        return self.g_Tn if self.tau_Tn is None else self.g_Tn**self.tau_Tn

    @property
    def decay_Tn(self) -> Tensor:
        """The decay exp(-g tau), or exp(-g)."""
        return torch.exp(-self.g_Tn if self.tau_Tn is None else -self.g_Tn * self.tau_Tn)


class Reading(NamedTuple):
    """What a layer with the gate tau made of a text, and the same layer of a run `beside` it that was trained without
    tau, where there is one."""

    tokens: Sequence[str]
    own: LayerGates
    beside: LayerGates | None = None

    @property
    def maps(self) -> dict[str, Tensor]:
        """The four maps of Figure 8 by their titles, (T, n) each. Those without tau are of the run beside, where there
        is one, else of the run itself read without its temperature."""
        without, said = (self.own._replace(tau_Tn=None), "") if self.beside is None else (self.beside, WITHOUT)
        return {
            f"g{said}": without.write_Tn,
            "g^tau": self.own.write_Tn,
            f"exp(-g){said}": without.decay_Tn,
            "exp(-g tau)": self.own.decay_Tn,
        }


def rodimus_layers(model: LanguageModel) -> list[Rodimus]:
    """The Rodimus layers of a model, the first one first."""
    return [module for module in model.modules() if isinstance(module, Rodimus)]


@torch.no_grad()
def layer_gates(model: LanguageModel, ids: Sequence[int], layer: int, *, run: str = "the model") -> LayerGates:
    """The gates of the Rodimus layer `layer`, counted from 1, over the token ids. Errors call the model `run`.

    Raises `UserError` for an empty text, for a model without such a layer, for one without the gate g, and where the
    gates are not finite.
    """
    mixers = rodimus_layers(model)
    if not mixers:
        raise UserError(f"{run} has no Rodimus layer; give a run of rodimus or rodimus+")
    if not 1 <= layer <= len(mixers):
        raise UserError(f"--layer: {run} has no Rodimus layer {layer}; it has 1 to {len(mixers)}")
    mixer = mixers[layer - 1]
    if mixer.config.g is None:
        raise UserError(f"{run} has no gate g to show; give a run that has it")
    if not ids:
        raise UserError("the text is empty; give at least one word")
    found: list[Gates] = []
    hook = mixer.register_forward_pre_hook(lambda _, given: found.append(mixer.gates(given[0])))
    try:
        model.hidden(torch.tensor([list(ids)], device=model.embedding.weight.device))
    finally:
        hook.remove()
    g_BTn, tau_BTn = found[0]
    if not all(gate is None or gate.isfinite().all() for gate in found[0]):
        raise UserError(f"the gates of {run} are not finite; give a run that did not diverge")
    return LayerGates(g_BTn[0].float().cpu(), None if tau_BTn is None else tau_BTn[0].float().cpu())


def heat_maps(reading: Reading, note: str) -> Panels:
    """Figure 8: four maps with a column for every token and a row for every dimension of n; `note` says whose they
    are."""
    size = (max(4.0, 0.15 * len(reading.tokens)), 4.0)
    parts = [
        HeatMap(title, "token", "dimension", reading.tokens, range(gate_Tn.shape[1]), _rounded(gate_Tn.T), size=size)
        for title, gate_Tn in reading.maps.items()
    ]
    return Panels(TITLE, parts, remark=note)


def write_gates(folder: Path, reading: Reading) -> None:
    """Write the gates into a record's folder."""
    gates = {"g": reading.own.g_Tn, "tau": reading.own.tau_Tn, "beside": reading.beside and reading.beside.g_Tn}
    rows = {name: _rounded(gate_Tn) for name, gate_Tn in gates.items() if gate_Tn is not None}
    lines = [
        json.dumps({"token": token} | {name: values[index] for name, values in rows.items()})
        for index, token in enumerate(reading.tokens)
    ]
    write_atomic(folder / GATES, "".join(f"{line}\n" for line in lines))


def read_gates(folder: Path) -> Reading:
    """The inverse of `write_gates`. Raises `UserError` where the file is missing or is not what that wrote."""
    path = folder / GATES
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        g_Tn, tau_Tn = _stacked(lines, "g"), _stacked(lines, "tau")
        if g_Tn.shape != tau_Tn.shape:
            raise ValueError("tau")
        beside = LayerGates(_stacked(lines, "beside"), None) if "beside" in lines[0] else None
        return Reading([str(line["token"]) for line in lines], LayerGates(g_Tn, tau_Tn), beside)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except (ValueError, TypeError, KeyError, IndexError):
        reason = "not a line with g and tau for each token"
    raise UserError(f"cannot read {path} ({reason}); restore the file, or record again with rodimus-lab gates --record")


def _stacked(lines: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """(T, n) of all lines. Raises `ValueError` for anything else than numbers from 0 up."""
    gate_Tn = torch.tensor([line[name] for line in lines], dtype=torch.float32)
    if gate_Tn.dim() != 2 or not gate_Tn.numel() or not ((gate_Tn >= 0) & (gate_Tn < math.inf)).all():
        raise ValueError(name)
    return gate_Tn


def _rounded(gate: Tensor) -> Any:
    return [[float(f"{value:.{DIGITS}g}") for value in row] for row in gate.tolist()]
