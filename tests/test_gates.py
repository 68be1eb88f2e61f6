"""The gates that are shown are those that the recurrence uses."""

from __future__ import annotations

import csv

import pytest
import torch

from rodimus_lab.errors import UserError
from rodimus_lab.gates import heat_maps, layer_gates
from rodimus_lab.nn import rodimus as module
from rodimus_lab.nn.rodimus import Rodimus
from rodimus_lab.nn.zoo import build_model

IDS = [5, 17, 3, 99, 42, 8]


@pytest.mark.parametrize("model", ["rodimus", "rodimus+"])
@pytest.mark.parametrize("tau", [{}, {"fixed": 0.5}, None])
def test_they_are_those_of_the_recurrence(model, tau, monkeypatch) -> None:
    net = build_model(model, size="smoke", vocab_size=300, rodimus={"tau": tau}).eval()
    used = []
    recurrence = module.gated_linear
    monkeypatch.setattr(module, "gated_linear", lambda *a, **k: used.append(a) or recurrence(*a, **k))
    seen = layer_gates(net, IDS, 2)
    _, k, _, log_alpha, _ = used[1]
    torch.testing.assert_close(seen.decay_Tn, log_alpha[0, :, 0].exp())
    lengths = torch.linalg.vector_norm(seen.write_Tn * torch.nn.functional.normalize(k[0, :, 0] / seen.write_Tn), dim=1)
    torch.testing.assert_close(torch.linalg.vector_norm(k[0, :, 0], dim=1), lengths)
    assert (seen.tau_Tn is None) == (tau is None)
    assert tau != {"fixed": 0.5} or bool((seen.tau_Tn == 0.5).all())


def test_maps_without_tau_are_of_the_other_run() -> None:
    own = layer_gates(build_model("rodimus", size="smoke", vocab_size=300).eval(), IDS, run="with")
    plain = layer_gates(
        build_model("rodimus", size="smoke", vocab_size=300, rodimus={"tau": None}).eval(), IDS, run="w/o"
    )
    alone, beside = (heat_maps(own, other, list("abcdef"), "layer 2") for other in (None, plain))
    assert [part.title for part in alone.parts] == ["g", "g^tau", "exp(-g)", "exp(-g tau)"]
    assert [part.title for part in beside.parts] == ["g (w/o)", "g^tau", "exp(-g) (w/o)", "exp(-g tau)"]
    torch.testing.assert_close(torch.tensor(alone.parts[0].values).T, own.g_Tn, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(beside.parts[0].values).T, plain.g_Tn, rtol=1e-4, atol=1e-6)
    assert alone.parts[3].values == beside.parts[3].values


@pytest.mark.parametrize(
    ("model", "options", "layer", "told"),
    [
        ("transformer++", {}, None, "no Rodimus layer; give a run of rodimus"),
        ("rodimus", {}, 5, "no Rodimus layer 5; it has 1 to 4"),
        ("rodimus", {"rodimus": {"g": None, "tau": None}}, 1, "no gate g"),
    ],
)
def test_what_cannot_be_shown_is_an_error(model, options, layer, told) -> None:
    with pytest.raises(UserError, match=told):
        layer_gates(build_model(model, size="smoke", vocab_size=300, **options), IDS, layer)
    assert any(isinstance(part, Rodimus) for part in build_model("rodimus", size="smoke", vocab_size=300).modules())


def test_from_the_command_line(cli, smoke_run, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    text = "Return a list of the names"
    for place, arguments in ((smoke_run.root / "gates", []), (tmp_path / "maps", ["--out", tmp_path / "maps"])):
        result = cli("gates", smoke_run.id, "--text", text, "--layer", 2, *arguments)
        assert (result.code, result.err) == (0, "")
        files = {path.suffix: path for path in place.iterdir()}
    assert set(files) == {".svg", ".pdf", ".png", ".csv"}
    rows = list(csv.DictReader(files[".csv"].read_text().splitlines()))
    names = dict.fromkeys((int(row["column"]), row["token"]) for row in rows)
    assert "".join(name for _, name in names) == text
    assert len(rows) == 4 * 32 * len(names)
    assert all(0 < float(row["value"]) < 1 for row in rows if row["panel"].startswith("exp"))
    refused = cli("gates", smoke_run.id, "--text", text, "--beside", smoke_run.id)
    assert (refused.code, "has the gate tau" in refused.err) == (2, True)
    assert cli("gates", smoke_run.id, "--text", "").code == 2
