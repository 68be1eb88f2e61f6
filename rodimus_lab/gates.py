"""The gates of a trained Rodimus layer over a text, as numbers and as heat maps (Figure 8).

Shapes: T tokens, n state expansion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.nn.rodimus import Gates, Rodimus
from rodimus_lab.report import HeatMap, Panels

DIGITS = 5


class LayerGates(NamedTuple):
    """The gates of one layer, on the CPU in float32; `run` is whose they are."""

    run: str
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


@torch.no_grad()
def layer_gates(model: LanguageModel, ids: Sequence[int], layer: int | None = None, *, run: str = "") -> LayerGates:
    """The gates of the Rodimus layer `layer`, counted from 1 (by default the middle one), over the token ids.

    Raises `UserError` for an empty text, for a model without such a layer and for one without the gate g.
    """
    mixers = [module for module in model.modules() if isinstance(module, Rodimus)]
    if not mixers:
        raise UserError(f"{run or 'the model'} has no Rodimus layer; give a run of rodimus or rodimus+")
    layer = (len(mixers) + 1) // 2 if layer is None else layer
    if not 1 <= layer <= len(mixers):
        raise UserError(f"--layer: {run or 'the model'} has no Rodimus layer {layer}; it has 1 to {len(mixers)}")
    mixer = mixers[layer - 1]
    if mixer.config.g is None:
        raise UserError(f"{run or 'the model'} has no gate g to show; give a run that has it")
    if not ids:
        raise UserError("the text is empty; give at least one word")
    found: list[Gates] = []
    hook = mixer.register_forward_pre_hook(lambda _, given: found.append(mixer.gates(given[0])))
    try:
        model.hidden(torch.tensor([list(ids)], device=model.embedding.weight.device))
    finally:
        hook.remove()
    g_BTn, tau_BTn = found[0]
    return LayerGates(run, g_BTn[0].float().cpu(), None if tau_BTn is None else tau_BTn[0].float().cpu())


def heat_maps(own: LayerGates, plain: LayerGates | None, tokens: Sequence[str], layer: str) -> Panels:
    """Four maps with a column for every token and a row for every dimension of n: g and g^tau, exp(-g) and
    exp(-g tau). Those without tau are of `plain`, a run without it, where there is one, else `own` read without its
    temperature."""
    without = plain or own._replace(tau_Tn=None)
    of = f" ({plain.run})" if plain else ""
    maps = [
        (f"g{of}", without.write_Tn),
        ("g^tau", own.write_Tn),
        (f"exp(-g){of}", without.decay_Tn),
        ("exp(-g tau)", own.decay_Tn),
    ]
    size = (max(4.0, 0.15 * len(tokens)), 4.0)
    parts = [
        HeatMap(title, "token", "dimension", tokens, range(gate_Tn.shape[1]), _rounded(gate_Tn.T), size=size)
        for title, gate_Tn in maps
    ]
    return Panels(f"Gates of {own.run}, {layer}", parts)


def _rounded(gate: Tensor) -> Any:
    return [[float(f"{value:.{DIGITS}g}") for value in row] for row in gate.tolist()]
