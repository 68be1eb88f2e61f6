"""Results as pandas frames: what notebooks and the command `runs` read. Needs no torch.

    from rodimus_lab import results

    results.runs(experiment="wikitext103")     a row for each finished run, its final metrics as columns
    results.metrics("rodimus-b6357da5")        what a run logged, a row for each line
    results.table("table1")                    a table as `rodimus-lab report` wrote it
    results.compare("run-a", "run-b")          where two runs' recipes and metrics differ

Every number keeps the unit that it was recorded in: perplexities as they are, accuracies from 0 to 1, bytes, seconds.
"""

from __future__ import annotations

import io
import math
import operator
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rodimus_lab.config import did_you_mean, nearest
from rodimus_lab.errors import UserError
from rodimus_lab.records import (
    PROJECT_ROOT,
    Record,
    RunDir,
    canonical_json,
    figures_root,
    load_records,
    runs_root,
    tables_root,
)
from rodimus_lab.report.curves import draw_curves
from rodimus_lab.report.paper import PaperResults

if TYPE_CHECKING:
    import pandas as pd

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
CONDITION = re.compile(r"([^=<>!]+)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
NOT_RUN = "not run"
NAMED = ("experiment", "id", "label", "model", "corpus", "tokenizer", "budget", "steps", "seed", "device", "finished")


def runs(root: Path | str | None = None, experiment: str | None = None, *, recipes: bool = False) -> pd.DataFrame:
    """A row for each finished run. `model` is the label in the model's own spelling (`rodimus+`). With `recipes` every
    setting has a column too, by its dotted path after `recipe.`, and what of the environment is plain after `env.`.

    Raises `UserError` naming a record that cannot be read, or an experiment that is none and nearly one.
    """
    return frame(_records(root, experiment), recipes=recipes)


def frame(records: Iterable[Record], *, recipes: bool = False) -> pd.DataFrame:
    """`runs` of records at hand; without any, no rows."""
    rows = [row(record, recipes=recipes) for record in records]
    names = dict.fromkeys(NAMED) | dict.fromkeys(name for one in rows for name in one)
    return _frame(rows, columns=list(names))


def row(record: Record, *, recipes: bool = False) -> dict[str, Any]:
    """One run as plain values by the names of columns."""
    values = {
        "experiment": record.experiment,
        "id": record.id,
        "label": record.label,
        "model": spelled(record.label),
        "corpus": record.corpus,
        "tokenizer": record.tokenizer,
        "budget": record.budget["name"],
        "steps": record.budget["steps"],
        "seed": record.recipe.get("seed"),
        "device": record.device,
        "finished": record.finished,
    }
    values |= {name: value for name, value in record.metrics.items() if name not in values}
    if recipes:
        values |= {f"recipe.{path}": value for path, value in flat(record.recipe)}
        values |= {f"env.{path}": value for path, value in flat(record.env)}
    return values


def spelled(label: str) -> str:
    """A label as the model is called: rodimus_plus -> rodimus+, transformer_pp-swa -> transformer++-swa."""
    return re.sub(r"_pp(?![a-z])", "++", re.sub(r"_plus(?![a-z])", "+", label))


def metrics(run: str, root: Path | str | None = None) -> pd.DataFrame:
    """What a run logged as it went, a row for each line; the columns are whatever it logged, `step` among them."""
    record = find(run, load_records(root))
    return _frame(RunDir(record.path.parents[1], record.experiment, record.id).read_metrics())


def paper(name: str) -> pd.DataFrame:
    """The paper's own numbers by the file's name, such as `table01` or `figure01a`; what it does not give is None."""
    given, known = re.fullmatch(r"(table|figure)0*(\d+)([a-z]?)", name), PaperResults()
    number = f"{int(given[2]):02d}{given[3]}" if given else ""
    there = sorted(path.stem for path in known.folder.glob("*.csv"))
    if given is None or (there and f"{given[1]}{number}" not in there):
        raise UserError(f"the paper gives no numbers of a {name!r}{did_you_mean(name, there)}")
    return _frame(known.table(int(number)) if given[1] == "table" else known.figure(number))


def table(name: str) -> pd.DataFrame:
    """A table as `rodimus-lab report` wrote it, without the columns of provenance. A cell without a number says what it
    says there, "not run" or why else; so does a table that has not been written. Raises `UserError` for a name that no
    table has."""
    path = _place(tables_root(), name, ".csv")
    if path is None:
        return _frame({name: [NOT_RUN]})
    found = _without_provenance(_read(path))
    shown = path.with_suffix(".md")
    said = _cells(shown.read_text(encoding="utf-8")) if shown.is_file() else []
    if [len(found.columns)] * len(found) != [len(cells) for cells in said]:
        return found.fillna(NOT_RUN)
    return found.where(found.notna(), _frame(said, columns=list(found.columns)))


def figure(name: str) -> pd.DataFrame:
    """The numbers of a figure as `make figures` wrote them; a point that is not there says "not run". Raises
    `UserError` for a name that no figure has."""
    path = _place(figures_root(), name, ".csv")
    return _frame({name: [NOT_RUN]}) if path is None else _read(path).fillna(NOT_RUN)


def overview(experiment: str, *columns: str, root: Path | str | None = None) -> pd.DataFrame:
    """An experiment's finished runs by model, corpus, budget and seed, and these columns; without any it says so."""
    found = runs(root, experiment)
    if found.empty:
        return _frame({experiment: [NOT_RUN]})
    return found[["id", "model", "corpus", "budget", "steps", "seed", *(name for name in columns if name in found)]]


def curves(
    experiment: str, quantity: str = "loss", root: Path | str | None = None, *, where: Iterable[str] = ()
) -> Any:
    """What an experiment's runs logged over their steps, for a notebook to show: a panel for each corpus and budget,
    and in it a line for each run, in its model's colour. `where` are conditions as of `rodimus-lab runs`, such as
    `model=rodimus`. The text "not run" where there is no run. Raises `UserError` for a quantity that none logged, and
    where matplotlib is not installed."""
    records = select(_records(root, experiment), where)
    if not records:
        return NOT_RUN
    logged = [metrics(f"{record.experiment}/{record.id}", root) for record in records]
    panels: dict[str, list[tuple[str, Any]]] = {}
    for record, lines in zip(records, logged, strict=True):
        if quantity in lines:
            curve = (spelled(record.label), lines[["step", quantity]].dropna())
            panels.setdefault(f"{record.corpus}, {record.budget_text}", []).append(curve)
    if not panels:
        names = [name for lines in logged for name in lines if name != "step"]
        raise UserError(f"no run of {experiment!r} logged a {quantity!r}{did_you_mean(quantity, names)}")
    from IPython.display import SVG

    drawn = io.StringIO()
    draw_curves(panels, quantity).savefig(drawn, format="svg")
    return SVG(data=drawn.getvalue())


def picture(name: str) -> Any:
    """A drawn figure for a notebook to show; the text "not run" where it has not been drawn. Raises `UserError` for a
    name that no figure has."""
    path = _place(figures_root(), name, ".svg")
    if path is None:
        return NOT_RUN
    from IPython.display import SVG

    return SVG(filename=str(path))


def find(run: str, records: Sequence[Record]) -> Record:
    """The one finished run that an id, `experiment/id` or the unambiguous beginning of either names."""
    exact = [record for record in records if run in _names(record)]
    found = exact or [record for record in records if run and any(name.startswith(run) for name in _names(record))]
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(f"{record.experiment}/{record.id}" for record in found[:4])
        raise UserError(f"{run!r} names {len(found)} runs ({some} ...); give more of the id")
    near = nearest(run, [name for record in records for name in _names(record)])
    raise UserError(f"there is no finished run {run!r}{near or ';'} see rodimus-lab runs")


def _names(record: Record) -> tuple[str, str]:
    return record.id, f"{record.experiment}/{record.id}"


@dataclass(frozen=True)
class Condition:
    """`KEY=VALUE`, `!=`, `<`, `<=`, `>` or `>=`. `key` is a column of `runs(recipes=True)`, or the end of one."""

    key: str
    sign: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises `UserError` for what is no condition."""
        match = CONDITION.fullmatch(text)
        if match is None or not match[1].strip():
            raise UserError(f"{text!r} is no condition; write one such as model=rodimus or test_ppl<60")
        return cls(match[1].strip(), match[2], match[3].strip())

    def holds(self, values: dict[str, Any]) -> bool:
        """Whether a run meets it; one that has no such column does not, but for `!=`. Raises `UserError` where the run
        has a number or a yes or no, and the value is none."""
        found = column(values, self.key)
        if found is None:
            return self.sign == "!="
        wanted: Any = self.value
        if self.key in ("model", "label"):
            found, wanted = spelled(str(found)), spelled(wanted)
        elif isinstance(found, bool):
            found = str(found).lower()
            wanted = wanted.lower()
            if wanted not in ("true", "false"):
                raise UserError(f"{self.key} is true or false, and {self.value!r} is neither")
        elif isinstance(found, int | float):
            wanted = _number(wanted)
            if wanted is None:
                raise UserError(f"{self.key} is a number, and {self.value!r} is none")
        else:
            found = str(found)
        return OPERATORS[self.sign](found, wanted)


def column(values: dict[str, Any], key: str) -> Any:
    """The value under a column's name or the end of one after a point, such as `optimizer.lr` or `lr`; None where there
    is none. Raises `UserError` where several columns that end so differ."""
    if key in values:
        return values[key]
    found = {path: value for path, value in values.items() if path.endswith(f".{key}")}
    if len({repr(value) for value in found.values()}) > 1:
        raise UserError(f"{key!r} may be any of {', '.join(sorted(found))}; write one of them")
    return next(iter(found.values()), None)


def select(records: Sequence[Record], where: Iterable[str] = (), sort: str | None = None) -> list[Record]:
    """The runs that meet every condition; sorted by a column, downwards with a `-` before its name, those that have no
    such value last. Raises `UserError` for a column that no run has."""
    conditions = [Condition.parse(text) for text in where]
    rows = [(record, row(record, recipes=True)) for record in records]
    order = None if sort is None else sort.removeprefix("-")
    check_columns(
        [values for _, values in rows], [*(one.key for one in conditions), *([] if order is None else [order])]
    )
    kept = [(record, values) for record, values in rows if all(one.holds(values) for one in conditions)]
    if order is not None:
        given = [(record, column(values, order)) for record, values in kept]
        there = [pair for pair in given if pair[1] is not None]
        numbers = all(isinstance(value, int | float) for _, value in there)
        there.sort(key=lambda pair: pair[1] if numbers else str(pair[1]), reverse=(sort or "").startswith("-"))
        return [record for record, _ in there] + [record for record, value in given if value is None]
    return [record for record, _ in kept]


def check_columns(rows: Sequence[dict[str, Any]], keys: Iterable[str]) -> None:
    """Raise `UserError` for the first key that is neither a column of any of the rows nor the end of one."""
    known = {path for values in rows for path in values}
    for key in keys:
        if rows and key not in known and not any(path.endswith(f".{key}") for path in known):
            near = nearest(key, [*known, *(path.rpartition(".")[2] for path in known)])
            raise UserError(
                f"no run has a {key!r}{near or ';'} rodimus-lab runs export FILE.csv writes all that there is"
            )


@dataclass(frozen=True)
class Comparison:
    """`recipe`: the settings that differ, `setting, first, second`. `metrics`: every number that both have, `metric,
    first, second, difference, noise`; noise is twice the standard error of the difference of the two means over seeds
    (missing where one of the two recipes has a single seed), and first and second are then those means."""

    recipe: pd.DataFrame
    metrics: pd.DataFrame
    seeds: tuple[int, int]


def compare(first: str, second: str, root: Path | str | None = None) -> Comparison:
    """Two runs beside each other, each with the other seeds of its own recipe."""
    records = load_records(root)
    one, two = find(first, records), find(second, records)
    groups = [[record for record in records if _but_seed(record) == _but_seed(run)] for run in (one, two)]
    if groups[0] == groups[1]:
        groups = [[one], [two]]
    numbers = [name for name in one.metrics if _is_number(one.metrics[name]) and _is_number(two.metrics.get(name))]
    rows = []
    for name in numbers:
        values = [[run.metrics[name] for run in group if _is_number(run.metrics.get(name))] for group in groups]
        means = [statistics.fmean(some) for some in values]
        noise = None
        if all(len(some) > 1 for some in values):
            noise = 2 * math.sqrt(sum(statistics.variance(some) / len(some) for some in values))
        rows.append((name, *means, means[1] - means[0], noise))
    columns = ["metric", "first", "second", "difference", "noise"]
    return Comparison(
        _frame(differences(one.recipe, two.recipe), columns=["setting", "first", "second"]),
        _frame(rows, columns=columns),
        (len(groups[0]), len(groups[1])),
    )


def differences(first: Any, second: Any) -> list[tuple[str, Any, Any]]:
    """The settings by dotted path that differ; None where one has no such setting."""
    one, two = dict(flat(first)), dict(flat(second))
    paths = [*one, *(path for path in two if path not in one)]
    return [
        (path, one.get(path), two.get(path))
        for path in paths
        if (path in one, one.get(path)) != (path in two, two.get(path))
    ]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A nested recipe as pairs of dotted path and plain value; what is empty stands for itself."""
    if not value or not isinstance(value, dict | list):
        yield path, value
        return
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flat(item, f"{path}.{name}" if path else str(name))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _but_seed(record: Record) -> tuple[str, str]:
    recipe = {name: value for name, value in record.recipe.items() if name != "seed"}
    return record.experiment, canonical_json(recipe)


def _frame(rows: Any, columns: Sequence[str] | None = None) -> pd.DataFrame:
    import pandas as pd  # Here, for the sake of the commands that need none.

    return pd.DataFrame(rows, columns=columns)


def _place(folder: Path, name: str, suffix: str) -> Path | None:
    """A file of results; None where one is committed under this name, and not here. Raises `UserError` for another."""
    here = {path.stem for path in folder.glob(f"*{suffix}")}
    committed = {path.stem for path in (PROJECT_ROOT / "results" / folder.name).glob(f"*{suffix}")}
    if name in here:
        return folder / f"{name}{suffix}"
    if name in committed:
        return None
    sort, command = {"tables": ("table", "report"), "figures": ("figure", "figures")}[folder.name]
    told = did_you_mean(name, here | committed)
    raise UserError(
        f"there is no {sort} named {name!r} in {folder}{told}; rodimus-lab {command} writes those of new runs"
    )


def _records(root: Path | str | None, experiment: str | None) -> list[Record]:
    """Raises `UserError` for an experiment that has no runs and is named nearly as one that has."""
    found = load_records(root, experiment)
    if experiment and not found:
        roots = (Path(root or runs_root()), PROJECT_ROOT / "results" / "runs")
        known = {path.name for folder in roots if folder.is_dir() for path in folder.iterdir()}
        if experiment not in known and (near := nearest(experiment, known)):
            raise UserError(f"there is no run of an experiment named {experiment!r}{near}")
    return found


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(path, keep_default_na=False, na_values=[""]).astype(object)


def _cells(markdown: str) -> list[list[str]]:
    """The rows of a table that `rodimus-lab report` wrote as Markdown, without its head, marks and letters of notes."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")][1:]
    return [
        [re.sub(r" \[\w+\]$", "", cell) for cell in re.split(r"(?<!\\) \| ", line[2:].removesuffix(" |"))]
        for line in lines
    ]


def _without_provenance(given: pd.DataFrame) -> pd.DataFrame:
    """Columns such as `Test PPL (paper): source` tell where the column before them is from."""
    names = list(given.columns)
    return given[[name for name in names if name.rpartition(": ")[0] not in names]]
