"""NeedleBench: how well a trained model finds what stands in a long text (Section 4.2, D.8; Figures 5 and 9 to 14).

`rodimus-lab needlebench RUN` scores a run and keeps the scores as a record of the experiment `needlebench`, cell by
cell, so that an interrupted one goes on. Heat maps are drawn of each record, those of the paper's models as Figures 9
to 14; Figure 5 and a table are of all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
import typer
from filelock import FileLock, Timeout
from rich.console import Console

from evals.needlebench import PRESETS, SUBTASKS, WEIGHTS, Cell, Source, Spec, evaluate, open_source, summarize
from evals.needlebench.runner import BATCH_TOKENS, resumed
from evals.needlebench.scores import by_length
from evals.needlebench.spec import DEPTHS, Language, Task
from rodimus_lab.command import command
from rodimus_lab.config import did_you_mean
from rodimus_lab.convert import open_checkpoint
from rodimus_lab.convert.provenance import Provenance, provenance
from rodimus_lab.data import Tokenizer, load_tokenizer
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import report
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.records import (
    METRICS,
    Record,
    RunDir,
    environment,
    figures_root,
    load_records,
    runs_root,
)
from rodimus_lab.report import (
    FIGURES,
    Axis,
    Drawing,
    Figure,
    HeatMap,
    Line,
    Metric,
    NotRun,
    Panels,
    PaperResults,
    Table,
    paper_vs_measured,
    write_figure,
)
from rodimus_lab.report.artefacts import PAPER, belongs
from rodimus_lab.train.progress import Progress

TASKS, LANGUAGES = get_args(Task), get_args(Language)
EXPERIMENT = "needlebench"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {
    "single_retrieval": "Single-needle retrieval",
    "multi_retrieval": "Multi-needle retrieval",
    "multi_reasoning": "Multi-needle reasoning",
    "overall": "Overall",
}
# The models of Figures 9 to 14 in their order, and how records of them may be labelled.
MODELS = {
    "Mamba-1.4B": ("mamba-1.4b", "mamba-1.4b-hf"),
    "Mamba2-1.3B": ("mamba2-1.3b", "mamba2-1.3b-hf"),
    "Rodimus-1.4B": ("rodimus-1.4b",),
    "Pythia-1.4B": ("pythia-1.4b",),
    "Rodimus+-1.6B": ("rodimus_plus-1.6b", "rodimus-plus-1.6b"),
    "Rodimus+-1.6B-4K": ("rodimus_plus-1.6b-4k", "rodimus-plus-1.6b-4k"),
}
COMMAND = "rodimus-lab needlebench RUN"
FOLDER = "RUN is a trained run of the model or a folder with its weights."
NEEDS = {
    "Pythia-1.4B": "RUN is a folder with Pythia's weights, a GPT-NeoX, which this project does not read yet.",
    "Rodimus+-1.6B-4K": "RUN is a checkpoint of training at a context of 4K; the paper's are not published.",
}
LENGTH, DEPTH, SCORE = "Length (tokens)", "Depth (%)", "Score"


@command("needlebench", panel="Evaluation")
def needlebench(
    run: Annotated[str, typer.Argument(help="A run id, or a folder with model.safetensors.")],
    preset: Annotated[
        Literal["4k", "8k", "32k", "16k"], typer.Option(help="A published grid; 16k is that of the paper's figures.")
    ] = "16k",
    task: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(TASKS)}; may be repeated. Default: all but ancestry.")
    ] = None,
    language: Annotated[list[str] | None, typer.Option(help="en or zh; may be repeated. Default: both.")] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="In place of the preset's lengths; may be repeated.")
    ] = None,
    depth: Annotated[
        list[int] | None, typer.Option(min=0, max=100, help="Percent, in place of the twenty; may be repeated.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Prompts a cell. Default: 10, or 25.")] = None,
    buffer: Annotated[int | None, typer.Option(min=0, help="Tokens without haystack. Default: as published.")] = None,
    length_tokenizer: Annotated[
        str, typer.Option(help="What measures lengths and depths: a tokenizer, or model for the model's own.")
    ] = "gpt-4",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 2000,
    score_empty: Annotated[
        bool, typer.Option("--score-empty", help="Score prompts without any haystack, as OpenCompass does.")
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Of NeedleBench's files. Default: $RODIMUS_LAB_DATA/needlebench, or the Hub."),
    ] = None,
    dtype: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="Default: bf16 on CUDA, fp32 on a CPU.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompts read at a time.")] = BATCH_TOKENS,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Default: cuda where there is one.")] = None,
) -> None:
    """Score a run on NeedleBench, and draw its heat maps."""
    from rodimus_lab.train.distributed import World, device_type
    from rodimus_lab.train.journal import device_facts

    for option, given, known in (("--task", task, TASKS), ("--language", language, LANGUAGES)):
        for one in given or ():
            if one not in known:
                raise UserError(f"{option} has no {one!r}{did_you_mean(one, known)}")
    _each_once({"--task": task, "--language": language, "--length": length, "--depth": depth})
    spec = Spec.from_dict(
        {
            "lengths": sorted(length) if length else PRESETS[preset],
            "repeats": repeats,
            "buffer": buffer,
            "length_tokenizer": length_tokenizer,
            "max_new_tokens": max_new_tokens,
            "score_empty": score_empty,
        }
        | ({"depths": sorted(depth)} if depth else {})
        | ({"tasks": [one for one in TASKS if one in task]} if task else {})
        | ({"languages": [one for one in LANGUAGES if one in language]} if language else {})
    )
    kind = device_type(device)
    checkpoint = open_checkpoint(run)
    tokenizer = checkpoint.tokenizer()
    source = open_source(data_dir, spec.tasks, spec.languages)
    measure = tokenizer if length_tokenizer == "model" else load_tokenizer(length_tokenizer)
    precision = dtype or ("bf16" if kind == "cuda" else "fp32")
    facts = environment() | device_facts(World(0, 1, torch.device(kind)))
    examined = Examined(provenance(checkpoint), tokenizer, precision, facts["device"])
    kept = score_run(checkpoint.build(device=kind), examined, spec, source, measure, facts, batch_tokens=batch_tokens)
    for line in lines(kept):
        print(line)
    for record in _maps([kept]):
        for path in write_figure(heat_maps(record), figures_root(), f"{EXPERIMENT}-{record.id}"):
            print(path)


def _each_once(options: Mapping[str, Sequence[Any] | None]) -> None:
    for option, values in options.items():
        for one, times in Counter(values or ()).items():
            if times > 1:
                raise UserError(f"{option} names {one} twice; give it once")


class Examined(NamedTuple):
    """What is scored: where its weights come from, its tokenizer, and in what and on what it runs."""

    origin: Provenance
    tokenizer: Tokenizer
    dtype: str
    device: str


def score_run(
    model: LanguageModel,
    examined: Examined,
    spec: Spec,
    source: Source,
    measure: Tokenizer,
    facts: Mapping[str, Any],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Record:
    """Score the cells that are not yet among the run's metrics and finish its record; a finished one is left as it is.

    Every cell is a line of metrics, written as soon as it is scored, whole or not at all. `measure` is the tokenizer of
    lengths, `facts` the environment.
    """
    label = examined.origin.label
    asked = {
        "label": label,
        "model": examined.origin.identity,
        "spec": spec.to_dict(),
        "data": {"origin": source.origin, "digest": source.digest},
        "tokenizer": examined.tokenizer.name,
        "length_tokenizer": {"name": measure.name, "fingerprint": measure.fingerprint},
        "dtype": examined.dtype,
        "device": examined.device,
    }
    run = RunDir.of(runs_root(), EXPERIMENT, asked)
    if not run.finished:
        run.create(asked)
        with _alone(run):
            _score(model.to(DTYPES[examined.dtype]), run, examined, spec, source, measure, facts, batch_tokens)
    return next(record for record in load_records(experiment=EXPERIMENT) if record.id == run.id)


def _score(
    model: LanguageModel,
    run: RunDir,
    examined: Examined,
    spec: Spec,
    source: Source,
    measure: Tokenizer,
    facts: Mapping[str, Any],
    batch_tokens: int,
) -> None:
    run.write_env(facts)
    run.truncate_metrics(_whole_lines(run.path / METRICS))
    results = resumed(run.read_metrics(), spec, run.path / METRICS)

    scored = count(len(results) + 1)
    with Progress(run.id, len(list(spec.cells())), unit="cell", console=Console(stderr=True)) as progress:

        def keep(cell: Cell, result: dict[str, Any]) -> None:
            run.append_metrics({"cell": cell.key} | result)
            progress.advance(next(scored))

        results |= evaluate(
            model,
            examined.tokenizer,
            spec,
            source,
            length_tokenizer=measure,
            keep=keep,
            done=results,
            batch_tokens=batch_tokens,
        )
    run.finish(
        {
            "label": examined.origin.label,
            "corpus": examined.origin.corpus,
            "tokenizer": examined.tokenizer.name,
            "budget": examined.origin.budget | {"scored": f"{grid(spec, measure.name)}, data {source.digest[:8]}"},
            "device": examined.device,
            "commit": facts["commit"],
            "metrics": summarize(spec, results),
        }
    )


@contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """Keep a run for this process. Raises `UserError` where another has it."""
    path = run.path / "lock"
    try:
        lock = FileLock(path).acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process is scoring into {run.path}; wait for it or stop it") from None
    with lock:
        yield
    path.unlink(missing_ok=True)


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0


def grid(spec: Spec, length_tokenizer: str) -> str:
    """What is asked, in words: grids whose words differ have scores that cannot be compared."""
    first, *rest = lengths = sorted(spec.lengths)
    steps = {after - before for before, after in pairwise(lengths)}
    told = f"{first:,} to {rest[-1]:,} by {min(steps):,}" if len(steps) == 1 else ", ".join(f"{n:,}" for n in lengths)
    depths = f"{len(DEPTHS)} depths" if spec.depths == DEPTHS else f"depths {', '.join(map(str, spec.depths))} %"
    known = {"lengths", "depths", "tasks", "languages", "length_tokenizer"}
    changed = [
        f"{name.replace('_', ' ')} {value}"
        for name, field in type(spec).model_fields.items()
        if name not in known and (value := getattr(spec, name)) != field.default
    ]
    return "; ".join([f"{told} tokens of {length_tokenizer}", depths, ", ".join(spec.languages), *changed])


def lines(record: Record) -> list[str]:
    """A record's scores in words."""
    metrics, spec = record.metrics, record.recipe["spec"]
    named = [name for name in (*NAMES, *(name for name in metrics if name.startswith("ancestry"))) if name in metrics]
    said = [f"{NAMES.get(name, name.replace('_', ' '))}: {metrics[name]:.2f}" for name in named]
    asked = grid(Spec.from_dict(spec), record.recipe["length_tokenizer"]["name"])
    found = [f"{record.id}: {metrics['cells']:,} cells; {asked}", *said]
    if impossible := metrics["impossible"]:
        key, reason = next(iter(impossible.items()))
        cells = f"{len(impossible):,} cells, such as" if len(impossible) > 1 else "one cell,"
        found.append(f"not scored: {cells} {key} ({reason})")
    return found


def heat_maps(record: Record) -> Panels:
    """The subtasks and the overall score of one record, length by depth: a figure as 9 to 14."""
    spec, grids = record.recipe["spec"], record.metrics["grids"]
    parts = [
        HeatMap(
            f"{name}: {record.metrics[task]:.2f}" if task in record.metrics else f"{name}: not scored",
            LENGTH,
            DEPTH,
            spec["lengths"],
            spec["depths"],
            list(zip(*grids[task], strict=True)),
            scores=True,
        )
        for task, name in NAMES.items()
        if task in grids
    ]
    return Panels(f"NeedleBench, {record.id}", parts, remark="; ".join(_legend(parts)), runs=[record])


def _legend(parts: Sequence[HeatMap]) -> list[str]:
    """What of the maps is no score."""
    means = [mean for part in parts for mean in part.means()]
    hatched = any(value is None for part in parts for row in part.values for value in row)
    line = "white line: the mean over the depths, 0 at the bottom and 100 at the top"
    return [line] * any(mean is not None for mean in means) + ["hatched: cannot be asked, not scored"] * hatched


def _maps(records: Sequence[Record]) -> list[Record]:
    """The records of the benchmark that have a grid to draw."""
    return [record for record in records if record.experiment == EXPERIMENT and record.metrics["grids"]]


@FIGURES.register("needlebench")
def figures_9_to_14(records: Sequence[Record], paper: PaperResults) -> Mapping[str, Drawing]:
    """Heat maps of every record, whatever its model."""
    return {record.id: heat_maps(record) for record in _maps(records)}


@FIGURES.register("figure05")
def figure_5(records: Sequence[Record], paper: PaperResults) -> Panels:
    """The mean over depths against the length: the paper's one model with printed numbers, and each of our records."""
    printed = paper.figure("05")
    axes = Axis(LENGTH, "linear", unit=""), Axis(SCORE, "score")
    scored = {record.label for record in _maps(records)}
    absent = [model for model, labels in MODELS.items() if not scored & {*labels}]
    missing = [(model, float(length)) for model in absent for length in PRESETS["16k"]]
    panels = []
    for task, name in NAMES.items():
        drawn = []
        for model in dict.fromkeys(str(row["model"]) for row in printed):
            rows = [row for row in printed if (row["model"], row["task"]) == (model, task)]
            points = [(1000 * k, row["score"]) for row in rows if isinstance(k := row["context_k"], int | float)]
            drawn.append(_line(model, points))
        for record in _maps(records):
            means = by_length(record.metrics["grids"].get(task, []))
            drawn.append(_line(record.id, list(zip(record.recipe["spec"]["lengths"], means, strict=False)), record))
        lines = [line for line in drawn if line.xs]
        panels.append(Figure(name, *axes, lines, missing, size=(6.5, 4.2), command=COMMAND))
    return Panels("Figure 5. NeedleBench: mean over depths", panels)


def _line(name: str, points: Sequence[tuple[Any, Any]], run: Record | None = None) -> Line:
    """The points that have a score, the paper's where there is no run."""
    there = [(x, float(y)) for x, y in points if y is not None]
    xs, ys = [x for x, _ in there], [y for _, y in there]
    if run is None:
        return Line(name, xs, ys, ["paper"] * len(there), quoted=True)
    return Line(name, xs, ys, runs=[[run]] * len(there))


def _register_map(name: str, model: str) -> None:
    @FIGURES.register(name)
    def draw(records: Sequence[Record], paper: PaperResults) -> Drawing:
        """The heat maps of one of the paper's models, of the last record that names it."""
        artefact = next(one for one in PAPER if belongs(name, one))
        title = f"{artefact.label}. {artefact.title}"
        own = [record for record in _maps(records) if record.label in MODELS[model]]
        if not own:
            return NotRun(title, COMMAND, NEEDS.get(model, FOLDER))
        return replace(heat_maps(max(own, key=lambda record: (record.finished, record.id))), title=title)


for _number, _model in enumerate(MODELS, 9):
    _register_map(f"figure{_number:02d}", _model)


@report("needlebench", experiments=(EXPERIMENT,))
def needlebench_table(records: Sequence[Record], paper: PaperResults) -> Table:
    """NeedleBench's subtasks and overall score, of the paper's one model with printed numbers and of ours, and the
    ancestry scores that ours have."""
    rows: dict[str, dict[str, Any]] = {}
    for row in paper.figure("05"):
        if row["context_k"] == "mean":
            rows.setdefault(str(row["model"]), {"model": row["model"]})[str(row["task"])] = row["score"]
    weights = ", ".join(f"{weight:g} {NAMES[task].lower()}" for task, weight in WEIGHTS.items())
    return paper_vs_measured(
        list(rows.values()),
        records,
        title="NeedleBench (Figure 5)",
        metrics=[
            *(Metric(NAMES[task], task, task, "higher") for task in (*SUBTASKS, "overall")),
            *(Metric(name, metric, None, "higher") for metric, name in _ancestry_names(records).items()),
        ],
        caption=f"Means over depths, then lengths. The overall score is {weights}, cell by cell.",
        notes=[
            "The paper's grid is 1k to 16k in tokens of gpt-4. Cells that cannot be asked are left out of ours, and "
            "with them the overall score of such a length and depth."
        ],
    )


def _ancestry_names(records: Sequence[Record]) -> dict[str, str]:
    """Of the ancestry scores that any record has."""
    found = sorted({metric for record in records for metric in record.metrics if metric.startswith("ancestry")})
    return {metric: metric.replace("_", " ").capitalize() for metric in found}
