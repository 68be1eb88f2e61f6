"""What it takes to reproduce each table and figure at the paper's own settings: runs, FLOPs, GPU-hours and the command.

`docs/reproducing.md` is `page()`, which `make reproducing` writes. Commands are those that are registered; FLOPs are
those that the models declare, forward and backward; what a table needs beside training is said in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

from rodimus_lab.command import COMMANDS
from rodimus_lab.experiment import EXPERIMENTS, REPORTS
from rodimus_lab.nn.zoo import MODELS, SIZES, model_config
from rodimus_lab.records import PROJECT_ROOT, write_atomic
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import FIGURES, PaperResults
from rodimus_lab.report.artefacts import PAPER, Artefact, belongs

PAGE = PROJECT_ROOT / "docs" / "reproducing.md"
RATE = 322e12  # FLOP/s that Rodimus reached in training at Table 1's size (docs/benchmarks.md).
WIKITEXT = 25_000 * 256 * 512  # tokens of one run
PILE = 13_351 * 256 * 2048  # of a run on the Pile subset of Table 5
SCALING = {"125m": 4_800, "350m": 13_500, "760m": 29_000, "1.3b": 50_000}  # steps of Table 8
BATCH = 2**19  # tokens
TABLE_1 = ("rodimus", "rodimus+", "mamba", "mamba2", "transformer++", "llama3", "gla", "hgrn2")
FIGURE_1A = (
    *(("rodimus", 5), ("rodimus+", 5), ("mamba", 4), ("mamba2", 5), ("hgrn2", 5), ("gla", 5)),
    ("transformer++", 6),  # StreamingLLM, whose weights are Transformer++'s
)
OF_A_RUN = {f"figure{number}": "rodimus-lab needlebench RUN" for number in (5, *range(9, 15))}
OF_A_RUN["figure8"] = "rodimus-lab gates RUN --beside RUN-WITHOUT-TAU --text TEXT --record"
NEEDS = {
    "figure1b": "At most: hours by the steps timed in benchmarks.md, if no run ended early.",
    "figure6": "At most: hours by the steps timed in benchmarks.md, if no run ended early.",
    "table2": "6 N D for what the authors trained; part of their text is not public. Open models are downloaded.",
    "table10": "6 N D; the Pile, which is distributed no longer.",
    "figure5": "Scores a trained model; the training is Table 2's.",
    "figure9": "Scores published weights.",
    "figure10": "Scores published weights.",
    "figure11": "Scores a trained model; the training is Table 2's.",
    "figure12": "Scores published weights; Pythia is a GPT-NeoX, which this project does not read yet.",
    "figure13": "Scores a trained model; the training is Table 2's.",
    "figure14": "Scores checkpoints that are not published.",
    "table11": "Scores trained and published weights; the training is Table 2's.",
    "table14": "The caches are computed; the perplexities are trained.",
    "table19": "Minutes of measuring; FLOPs are computed.",
    "table20": "Minutes of measuring; FLOPs and memory are computed.",
    "table4": "Computed from the code.",
    "figure7": "Computed from the formulas.",
    "figure8": "Two runs of Table 15, with tau and without it, and a sentence; the first alone will do.",
    "table21": "Scores published weights; two benchmarks need OpenCompass.",
    "table22": "Scores published weights; four benchmarks need OpenCompass, and nobody packages four.",
}
INTRODUCTION = """\
# Reproducing each table

Written by `make reproducing` from the code; a test holds it to that. Hours are those of one NVIDIA H200 at the paper's
own settings: the FLOPs of all runs, as the models declare them, at 322 TFLOP/s, which is what Rodimus reached in
training at Table 1's size ([benchmarks.md](benchmarks.md)). Evaluation and compilation come on top, and models with
slower operators take longer. Runs that two tables share are counted in both.

Every command that trains takes `--budget short` (a stated fraction of the steps) and `--budget smoke` (minutes on a
CPU) as well; such numbers are labelled wherever they are shown. What has been run so far stands in
[the tables](../results/tables). `rodimus-lab report` then rebuilds all tables and the pages.

| artefact | runs | FLOPs | H200 hours | command | to know |
|---|---:|---:|---:|---|---|
"""


class Training(NamedTuple):
    """So many runs, and the FLOPs of all together."""

    runs: int
    flops: float

    def __add__(self, other: object) -> Training:
        assert isinstance(other, Training)
        return Training(self.runs + other.runs, self.flops + other.flops)


def page() -> str:
    """The text of docs/reproducing.md."""
    load_plugins()
    return INTRODUCTION + "".join(map(_row, PAPER))


def write_page() -> None:
    write_atomic(PAGE, page())


def _row(artefact: Artefact) -> str:
    spent = trainings().get(artefact.name)
    commands = ", ".join(f"`{command}`" for command in _commands(artefact))
    said = {"settings": "Settings that recipes carry.", "drawing": "Drawn from the code."}.get(artefact.sort, "")
    note = NEEDS.get(artefact.name, said)
    recall = {"figure1b": "1b", "figure6": "6"}.get(artefact.name)
    cells = [
        f"{artefact.label}. {artefact.title}",
        f"{spent.runs}" if spent else "",
        f"{spent.flops:.1e}" if spent else "",
        "" if spent is None else _told(_recall_hours(recall)) if recall else _told(spent.flops / RATE / 3600),
        commands or ("none yet" if artefact.sort == "measured" else ""),
        note,
    ]
    return f"| {' | '.join(cells)} |\n"


def _told(hours: float) -> str:
    return f"{hours:,.1f}" if hours < 10 else f"{hours:,.0f}"


def _commands(artefact: Artefact) -> Iterator[str]:
    """The registered commands whose runs feed a report of the artefact, or the report by itself."""
    names = [name for name in REPORTS if belongs(name, artefact)]
    feeding = {name for name in EXPERIMENTS if set(EXPERIMENTS[name].reports) & set(names)}
    if not feeding:
        feeding = {group for name in names for group in REPORTS[name].experiments}
    if "bench" in feeding:
        yield from ("rodimus-lab bench train", "rodimus-lab bench decode", "rodimus-lab bench record")
    options = f" --figure {artefact.label.removeprefix('Figure ')}" if "mqar" in feeding else ""
    there = [name for name in feeding if name in EXPERIMENTS or name in COMMANDS]
    yield from (f"rodimus-lab {name}{options}" for name in sorted(there, key=_breadth))
    if artefact.name in OF_A_RUN:
        yield OF_A_RUN[artefact.name]
    elif not names and any(belongs(name, artefact) for name in FIGURES):
        yield "make figures"
    if names and not feeding:
        yield from (f"rodimus-lab report {name}" for name in names)


def _breadth(name: str) -> tuple[int, str]:
    """An experiment that is made for few artefacts stands before one that is made for many."""
    return len(EXPERIMENTS[name].reports) if name in EXPERIMENTS else 0, name


@cache
def trainings() -> dict[str, Training]:
    """What is trained for each table and figure, by the paper's account of it."""
    paper = PaperResults()
    return {
        "table1": _all(_one(model, "wikitext103", WIKITEXT) for model in TABLE_1),
        "figure1a": _all(_one(model, "wikitext103", WIKITEXT) for model, count in FIGURE_1A for _ in range(count)),
        "figure1b": _recall("1b"),
        "figure6": _recall("6"),
        "figure4": _all(
            _one(model, size, steps * BATCH)
            for model in ("rodimus", "rodimus+", "transformer++", "mamba2")
            for size, steps in SCALING.items()
        ),
        "table2": _by_count(paper.table(2), lambda row: "odimus" in str(row["model"]) or row["same_setup"] == "yes"),
        "table6": _all(_one(str(row["model"]), "350m", SCALING["350m"] * BATCH) for row in paper.table(6)),
        "table7": _all(_one(str(row["model"]), "125m", SCALING["125m"] * BATCH) for row in paper.table(7)),
        "table10": _by_count(paper.table(10), lambda row: True),
        "table12": _all(_one("rodimus", str(row["size"]).lower(), PILE) for row in paper.table(12)),
        "table13": _all(_one("rodimus", str(row["size"]).lower(), PILE) for row in paper.table(13)),
        "table14": _all(_one(str(row["model"]), "125m", PILE) for row in paper.table(14)),
        "table15": _all(_one("rodimus", "wikitext103", WIKITEXT) for _ in paper.table(15)),
        "table16": _all(_one("rodimus", "wikitext103", WIKITEXT) for _ in paper.table(16)),
        "table17": _all(
            _one("rodimus+", "wikitext103", WIKITEXT, int(str(row["n_layers"]).split(".")[0]))
            for row in paper.table(17)
        ),
        "table18": _all(
            _one("rodimus+", "wikitext103", WIKITEXT)
            if "iki" in str(row["corpus"])
            else _one("rodimus+", "350m", SCALING["350m"] * BATCH)
            for row in paper.table(18)
        ),
        "figure8": _all(_one("rodimus", "wikitext103", WIKITEXT) for _ in ("with tau", "without tau")),
    }


def _all(some: Iterable[Training]) -> Training:
    return sum(some, start=Training(0, 0.0))


@cache
def _one(model: str, size: str, tokens: int, blocks: int | None = None) -> Training:
    config = model_config(MODELS.canonical(model), size=size)
    if blocks is not None:
        config = config.replace(repeats=blocks)
    return Training(1, config.training_flops_per_token(SIZES[size].context) * tokens)


def _by_count(rows: Iterable[object], ours: Callable[..., bool]) -> Training:
    """6 N D of the rows that are trained, for their exact shapes are not all known."""
    chosen = [row for row in rows if ours(row)]
    billions = [(float(str(row["params_b"])), float(str(row["tokens_b"]))) for row in chosen]  # type: ignore[index]
    return Training(len(billions), sum(6e18 * params * tokens for params, tokens in billions))


def _recall_hours(figure: str) -> float:
    """Of all runs of Figure 6 or 1b, to their last epoch: steps so small are far from what FLOPs alone would take."""
    mqar = EXPERIMENTS["mqar"]
    return sum(mqar.hours(recipe) or 0.0 for recipe in mqar.recipes(figure=figure, budget="paper"))


def _recall(figure: str) -> Training:
    recipes = EXPERIMENTS["mqar"].recipes(figure=figure, budget="paper")
    flops = 0.0
    for recipe in recipes:
        tokens = recipe.budget.steps * recipe.budget.batch_size
        length = recipe.data.train[0].seq_len  # type: ignore[union-attr]
        flops += 3 * recipe.model.flops_per_token(length // 2) * tokens * length
    return Training(len(recipes), flops)
