"""The gates that are shown are those that the recurrence uses, and Figure 8 is drawn of those that were recorded."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from experiments.gates import COMMAND, figure_8
from rodimus_lab.errors import UserError
from rodimus_lab.gates import GATES, LayerGates, Reading, heat_maps, layer_gates, read_gates, write_gates
from rodimus_lab.nn import rodimus as module
from rodimus_lab.nn.rodimus import Rodimus
from rodimus_lab.nn.zoo import build_model, with_sublayers
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import load_records
from rodimus_lab.report import PaperResults
from rodimus_lab.weights import RECIPE, save_model

IDS = [5, 17, 3, 99, 42, 8]
TEXT = "Return a list of the names"


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
    own = layer_gates(build_model("rodimus", size="smoke", vocab_size=300).eval(), IDS, 2)
    plain = layer_gates(
        build_model("rodimus", size="smoke", vocab_size=300, rodimus={"tau": None}).eval(), IDS, 2, run="w/o"
    )
    alone, beside = (heat_maps(Reading("abcdef", own, other), "whose") for other in (None, plain))
    assert [part.title for part in alone.parts] == ["g", "g^tau", "exp(-g)", "exp(-g tau)"]
    assert [part.title for part in beside.parts] == [
        "g, trained without tau",
        "g^tau",
        "exp(-g), trained without tau",
        "exp(-g tau)",
    ]
    torch.testing.assert_close(torch.tensor(alone.parts[0].values).T, own.g_Tn, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(beside.parts[0].values).T, plain.g_Tn, rtol=1e-4, atol=1e-6)
    assert alone.parts[3].values == beside.parts[3].values
    assert alone.note == "whose"


@pytest.mark.parametrize(
    ("model", "options", "layer", "told"),
    [
        ("transformer++", {}, 1, "no Rodimus layer; give a run of rodimus"),
        ("rodimus", {}, 5, "no Rodimus layer 5; it has 1 to 4"),
        ("rodimus", {"rodimus": {"g": None, "tau": None}}, 1, "no gate g"),
    ],
)
def test_what_cannot_be_shown_is_an_error(model, options, layer, told) -> None:
    with pytest.raises(UserError, match=told):
        layer_gates(build_model(model, size="smoke", vocab_size=300, **options), IDS, layer)
    assert any(isinstance(part, Rodimus) for part in build_model("rodimus", size="smoke", vocab_size=300).modules())


def test_gates_that_are_not_finite_are_an_error() -> None:
    net = build_model("rodimus", size="smoke", vocab_size=300)
    torch.nn.init.constant_(net.embedding.weight, torch.nan)
    with pytest.raises(UserError, match="the gates of it are not finite"):
        layer_gates(net, IDS, 1, run="it")


def test_from_the_command_line(cli, smoke_run, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for place, arguments in ((smoke_run.root / "gates", []), (tmp_path / "maps", ["--out", tmp_path / "maps"])):
        result = cli("gates", smoke_run.id, "--text", TEXT, "--layer", 2, *arguments)
        assert (result.code, result.err) == (0, "")
        files = {path.suffix: path for path in place.iterdir()}
    assert set(files) == {".svg", ".pdf", ".png", ".csv"}
    assert {path.stem for path in files.values()} == {smoke_run.id}
    rows = list(csv.DictReader(files[".csv"].read_text().splitlines()))
    names = dict.fromkeys((int(row["column"]), row["token"]) for row in rows)
    assert "".join(name for _, name in names) == TEXT
    assert len(rows) == 4 * 32 * len(names)
    assert all(0 < float(row["value"]) < 1 for row in rows if row["panel"].startswith("exp"))
    refused = cli("gates", smoke_run.id, "--text", TEXT, "--beside", smoke_run.id)
    assert (refused.code, "has the gate tau" in refused.err) == (2, True)
    assert cli("gates", smoke_run.id, "--text", "").code == 2
    assert load_records(experiment="gates") == []


def without_tau(run) -> Path:
    """The smoke run's model without tau, not trained, in a folder of weights."""
    recipe = Recipe.read(run.root / "checkpoints" / "wikitext103" / run.id / "final" / RECIPE)
    other = recipe.replace(label="without-tau", model=with_sublayers(recipe.model, "rodimus", {"tau": None}))
    folder = run.root / "checkpoints" / other.experiment / other.id
    save_model(folder, other.model.build().state_dict(), other)
    return folder


def test_figure_8_is_drawn_of_the_records(cli, smoke_run) -> None:
    pytest.importorskip("matplotlib")
    assert figure_8(load_records(), PaperResults()).rows()[1][1:3] == ("not run", COMMAND)
    other = without_tau(smoke_run)
    notes = []
    for arguments in (["--beside", other], [], []):
        result = cli("gates", smoke_run.id, "--text", TEXT, "--layer", 2, "--record", *arguments)
        assert (result.code, result.err) == (0, "")
        own = load_records(experiment="gates")
        (kept,) = [record for record in own if f"gates/{record.id}" in result.out]
        (trained,) = load_records(experiment="wikitext103")
        assert (kept.label, kept.corpus, kept.tokenizer) == (trained.label, trained.corpus, trained.tokenizer)
        assert (kept.budget, kept.device, kept.recipe["layer"]) == (trained.budget, "cpu", 2)
        alone = figure_8([kept], PaperResults())
        assert alone.note.startswith(f"{kept.id}: pydoc standing in for wikitext-103, pydoc-4096 tokens, smoke budget ")
        assert f"g^tau and exp(-g tau): wikitext103/{smoke_run.id} (pydoc standing in for wiki" in alone.note
        assert alone.note.endswith("Rodimus layer 2 of 4; tokens of pydoc-4096, read on cpu")
        beside_it = figure_8([kept, trained], PaperResults()).note
        assert (
            f"{trained.id}: pydoc standing in for wikitext-103, pydoc-4096 tokens, {trained.budget_text}" in beside_it
        )
        drawn = list(csv.reader((smoke_run.root / "gates" / f"{smoke_run.id}.csv").read_text().splitlines()))
        assert [row[:4] for row in drawn] == [[str(cell) for cell in row[:4]] for row in alone.rows()]
        written, again = ([float(row[4]) for row in rows[1:]] for rows in (drawn, alone.rows()))
        assert written == pytest.approx(again, rel=1e-4)
        notes.append(alone.note)
    assert len(own) == 2, "the same again takes the place of the one before"
    assert f"g and exp(-g): wikitext103/{other.name} (pydoc standing in for wikitext-103, " in notes[0]
    assert "trained without tau" in notes[0]
    assert "g and exp(-g): the same run read without its temperature" in notes[1]
    assert figure_8(own, PaperResults()).note == notes[0], "a run beside it comes before a newer record"
    turned = cli("gates", other, "--text", TEXT)
    assert (turned.code, "has no gate tau; give a run that has it" in turned.err) == (2, True)


LINE = {"token": "a", "g": [0.5, 1.0], "tau": [0.5, 0.25]}


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]\n",
        "{",
        json.dumps({"token": "a", "g": [0.5]}),
        json.dumps(LINE | {"tau": [0.5]}),
        json.dumps(LINE | {"g": 0.5}),
        json.dumps(LINE | {"g": ["x", "y"]}),
        json.dumps(LINE | {"g": [-1.0, 0.5]}),
        json.dumps(LINE | {"g": [float("nan"), 0.5]}),
        json.dumps(LINE) + "\n" + json.dumps(LINE | {"g": [1.0], "tau": [1.0]}),
        json.dumps(LINE | {"beside": [0.5]}) + "\n" + json.dumps(LINE),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(text, tmp_path) -> None:
    if text is not None:
        (tmp_path / GATES).write_text(text)
    with pytest.raises(UserError, match=rf"cannot read .*{GATES} \(.*record again with rodimus-lab gates --record"):
        read_gates(tmp_path)


@pytest.mark.parametrize("beside", [None, LayerGates(torch.tensor([[3.0], [0.25]]), None)])
def test_what_is_written_is_read(beside, tmp_path) -> None:
    own = LayerGates(torch.tensor([[0.5, 1.25], [0.0, 2.0]]), torch.tensor([[0.5, 1.0], [0.125, 0.0]]))
    write_gates(tmp_path, Reading([" a", "\u2028"], own, beside))
    tokens, again, other = read_gates(tmp_path)
    assert tokens == [" a", "\u2028"]
    torch.testing.assert_close(again, own)
    assert (other is None) == (beside is None)
    assert beside is None or torch.equal(other.g_Tn, beside.g_Tn)
