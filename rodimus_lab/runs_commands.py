"""`rodimus-lab runs`: list, filter and sort the runs on disk, compare two, export them, and clear away what is not
wanted."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from filelock import FileLock, Timeout
from rich import box
from rich.table import Table as RichTable

from rodimus_lab import results
from rodimus_lab.config import did_you_mean
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import EXPERIMENTS
from rodimus_lab.records import (
    PROJECT_ROOT,
    SAMPLES,
    Record,
    RunDir,
    UnfinishedRun,
    load_records,
    load_unfinished,
    runs_root,
    write_atomic,
)
from rodimus_lab.report import overlaps, runs_json, runs_table
from rodimus_lab.terminal import console, print_table, shown
from rodimus_lab.weights import checkpoints_root

app = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=False,
    help="List the runs on disk; compare, export or prune them.",
    epilog="Such as: rodimus-lab runs --where model=rodimus+ --where 'test_ppl<60' --sort test_ppl",
)

Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", help="Only runs with KEY=VALUE (or !=, <, <=, >, >=), such as lr=1e-3; may be repeated.", metavar="C"
    ),
]
Corpus = Annotated[str | None, typer.Option(help="Only runs on this corpus.")]
Named = Annotated[str | None, typer.Option("--experiment", help="Only runs of this experiment.")]
Run = Annotated[str, typer.Argument(help="A run's id, or the beginning of one.", show_default=False)]


@app.callback()
def runs(
    context: typer.Context,
    where: Where = None,
    corpus: Corpus = None,
    experiment: Named = None,
    sort: Annotated[str | None, typer.Option(help="A column to sort by; -COLUMN goes downwards.")] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="Show this too, such as test_accuracy; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs on disk; compare, export or prune them."""
    if context.invoked_subcommand is not None:
        if where or corpus or experiment or sort or column or as_json:
            raise UserError(f"the options go after {context.invoked_subcommand}; see rodimus-lab runs --help")
        return
    filtered = bool(where) or corpus is not None or sort is not None
    records = _chosen(where, corpus, experiment, sort, column or ())
    unfinished: Sequence[UnfinishedRun] = () if filtered else load_unfinished(experiment=experiment)
    if as_json:
        found = runs_json(records, unfinished)
        for one, record in zip(found, records, strict=False):  # The unfinished ones come after.
            one |= {key: results.column(results.row(record, recipes=True), key) for key in column or ()}
        print(json.dumps(found, indent=1))
        return
    keys = [*(results.Condition.parse(text).key for text in where or ()), *([sort.removeprefix("-")] if sort else [])]
    extra = list(dict.fromkeys([*(column or ()), *(key for key in keys if key not in SHOWN)]))
    if records or unfinished:
        print_table(runs_table(records, unfinished, _columns(records, extra)))
    elif not filtered:
        console.print(f"there is no run under {shown(runs_root(), PROJECT_ROOT)} yet")
    _warn(overlaps(records, extra))
    if filtered:
        console.print(f"{len(records)} of {len(load_records())} finished runs")


SHOWN = {"model", "label", "id", "corpus", "device", "test_ppl", "finished", "experiment"}


@app.command()
def compare(
    first: Run,
    second: Run,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Where two runs' recipes and metrics differ, with the noise over seeds where there are several."""
    found = results.compare(first, second)
    if as_json:
        parts = {"recipe": found.recipe, "metrics": found.metrics}
        print(json.dumps({name: json.loads(part.to_json(orient="records")) for name, part in parts.items()}, indent=1))
        return
    heads = [
        f"{name} ({seeds} seeds)" if seeds > 1 else name
        for name, seeds in zip((first, second), found.seeds, strict=True)
    ]
    if found.recipe.empty:
        console.print("the recipes are the same")
    else:
        print_table(_table(["setting", first, second], found.recipe.itertuples(index=False), _plain))
    rows = [(name, a, b, gap, noise) for name, a, b, gap, noise in found.metrics.itertuples(index=False)]
    print_table(_table(["metric", *heads, "difference", "noise"], rows, _number))
    if min(found.seeds) < 2:
        console.print("noise is known where both recipes were run with several seeds")
    records = load_records()
    _warn(overlaps(results.find(run, records) for run in (first, second)))


@app.command()
def export(
    to: Annotated[Path, typer.Argument(help="NAME.csv, NAME.parquet, or a folder for W&B's offline runs.")],
    where: Where = None,
    corpus: Corpus = None,
    experiment: Named = None,
    wandb: Annotated[bool, typer.Option("--wandb", help="Write Weights & Biases' offline format.")] = False,
) -> None:
    """Write every setting, metric and environment of the finished runs as CSV, parquet or W&B offline runs."""
    records = _chosen(where, corpus, experiment, None)
    if not records:
        raise UserError(f"no finished run is chosen, so {to} is not written; see them all with rodimus-lab runs")
    if wandb:
        _export_wandb(records, to)
    elif to.suffix not in (".csv", ".parquet"):
        raise UserError(f"{to} ends in neither .csv nor .parquet; give such a name, or a folder with --wandb")
    else:
        table = results.frame(records, recipes=True)
        if to.suffix == ".csv":
            write_atomic(to, table.to_csv(index=False, lineterminator="\n"))
        elif find_spec("pyarrow") is None:
            raise UserError("parquet needs pyarrow; install it with: pip install -e '.[data]'")
        else:
            write_atomic(to, table.convert_dtypes().apply(_storable).to_parquet(index=False))
    console.print(f"written: {shown(to, PROJECT_ROOT)} ({len(records)} run{'s' * (len(records) != 1)})")


@app.command()
def sample(
    run: Run,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
) -> None:
    """Continue a prompt with a finished run's weights, on the CPU, and keep both beside its record for its page."""
    from rodimus_lab.run_models import continue_with  # Slow to import.

    record = results.find(run, load_records())
    text = continue_with(record.id, prompt, max_new_tokens, seed)
    path = record.path / SAMPLES
    kept = path.read_text(encoding="utf-8") if path.is_file() else ""
    line = json.dumps({"prompt": prompt, "text": text, "seed": seed}, ensure_ascii=False)
    write_atomic(path, f"{kept}{line}\n")
    print(f"{prompt}{text}")


@app.command()
def prune(
    which: Annotated[list[str] | None, typer.Argument(help="Runs by id. Default: every unfinished run.")] = None,
    finished: Annotated[bool, typer.Option("--finished", help="Let finished runs named here go too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete the folders of unfinished runs, or of the runs named. Finished ones need --finished; checkpoints stay."""
    root = runs_root()
    chosen = [_prunable(root, run) for run in _named(root, which)]
    if kept := [run for run in chosen if run.finished and not finished]:
        names = ", ".join(run.id for run in kept)
        raise UserError(f"finished: {names}; add --finished to delete a finished run's record too")
    if not chosen:
        console.print("there is nothing to prune")
        return
    for run in chosen:
        console.print(f"{'finished' if run.finished else 'unfinished'}: {run.experiment}/{run.id}")
    if not yes and not _confirmed(f"Delete {len(chosen)} of the runs under {shown(root, PROJECT_ROOT)}?"):
        console.print("nothing was deleted")
        return
    with ExitStack() as held:
        for run in chosen:
            if not run.finished:
                held.enter_context(_not_under_way(run))
        for run in chosen:
            shutil.rmtree(run.path)
    console.print(f"deleted: {len(chosen)}")


def _confirmed(question: str) -> bool:
    try:
        return typer.confirm(question)
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        console.print()
        raise UserError("nothing was deleted, for nobody is there to be asked; add --yes") from None


def _warn(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        console.print(sentence)


def _chosen(
    where: list[str] | None,
    corpus: str | None,
    experiment: str | None,
    sort: str | None,
    columns: Sequence[str] = (),
) -> list[Record]:
    """Raises `UserError` for a corpus or an experiment of which there is no run, and for a column that no run has."""
    records = load_records(experiment=experiment)
    if experiment and experiment not in EXPERIMENTS and not records and not load_unfinished(experiment=experiment):
        there = {record.experiment for record in load_records()} | {run.experiment for run in load_unfinished()}
        raise UserError(f"there is no run of an experiment named {experiment!r}{did_you_mean(experiment, there)}")
    if columns:
        results.check_columns([results.row(record, recipes=True) for record in records], columns)
    known = {record.corpus for record in records}
    if corpus is not None and records and corpus not in known:
        raise UserError(f"there is no finished run on a corpus named {corpus!r}{did_you_mean(corpus, known)}")
    return results.select(records, [*(where or ()), *([f"corpus={corpus}"] if corpus is not None else [])], sort)


def _columns(records: Sequence[Record], keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """What to show beside the usual columns: heading -> run id -> text."""
    return {
        key: {
            f"{record.experiment}/{record.id}": _short(results.column(results.row(record, recipes=True), key))
            for record in records
        }
        for key in keys
    }


def _named(root: Path, which: Sequence[str] | None) -> list[RunDir]:
    """The runs that ids name, finished or not; without any, the unfinished ones."""
    unfinished = [RunDir(root, run.experiment, run.id) for run in load_unfinished(root)]
    if not which:
        return unfinished
    every = [*unfinished, *(RunDir(root, record.experiment, record.id) for record in load_records(root))]
    chosen = []
    for name in dict.fromkeys(which):
        found = [run for run in every if name in (run.id, f"{run.experiment}/{run.id}")]
        if len(found) != 1:
            problem = (
                f"{len(found)} runs are named {name!r}; write EXPERIMENT/ID" if found else f"there is no run {name!r}"
            )
            raise UserError(f"{problem}; see rodimus-lab runs")
        chosen += found
    return chosen


def _prunable(root: Path, run: RunDir) -> RunDir:
    """The run, if its folder really lies where it says: no link leads out of the root."""
    here = run.path.resolve()
    if run.path.is_symlink() or run.path.parent.is_symlink() or here.parents[1] != root.resolve():
        raise UserError(f"{run.path} leads out of {root}, so nothing was deleted; remove that link by hand")
    return run


@contextmanager
def _not_under_way(run: RunDir) -> Iterator[None]:
    """Keep others from training a run meanwhile. Raises `UserError` where one does."""
    lock = checkpoints_root() / run.experiment / run.id / "lock"
    if not lock.exists():
        yield
        return
    try:
        with FileLock(lock).acquire(blocking=False):
            yield
    except Timeout:
        raise UserError(f"{run.experiment}/{run.id} is being trained; wait for it or stop it") from None


def _export_wandb(records: Sequence[Record], folder: Path) -> None:
    if find_spec("wandb") is None:
        raise UserError("W&B's format needs wandb, which is not installed; install it with: pip install wandb")
    wandb = import_module("wandb")
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        run = wandb.init(
            mode="offline", dir=str(folder), project="rodimus-lab", group=record.experiment, name=record.id,
            config={"recipe": record.recipe, "env": record.env}, reinit="finish_previous",
        )  # fmt: skip
        for line in RunDir(record.path.parents[1], record.experiment, record.id).read_metrics():
            run.log({name: value for name, value in line.items() if name != "step"}, step=line.get("step"))
        run.summary.update(record.metrics)
        run.finish()


def _table(headings: Sequence[str], rows: Any, text: Callable[[Any], str]) -> RichTable:
    table = RichTable(box=box.SIMPLE)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if not index or text is _plain else "right")
    for name, *values in rows:
        table.add_row(str(name), *map(text, values))
    return table


def _short(value: Any) -> str:
    return _number(value) if isinstance(value, float) else _plain(value)


def _plain(value: Any) -> str:
    return "—" if value is None else value if isinstance(value, str) else json.dumps(value)


def _number(value: Any) -> str:
    if value is None or math.isnan(value):
        return "—"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.6g}"


def _storable(values: Any) -> Any:
    """A column for parquet, where all values are of one sort: lists, and what is of several sorts, are text."""
    if values.dtype != object:
        return values
    sorts = {type(value) for value in values.dropna()}
    if len(sorts) < 2 and not sorts & {list, dict}:
        return values
    return values.map(lambda value: value if isinstance(value, str) else json.dumps(value), na_action="ignore")
