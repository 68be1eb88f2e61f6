"""What a command would run: recipes with their ids, sizes, state on disk and time on a GPU, without training any."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from rodimus_lab.experiment import Estimate, no_estimate
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import Record, RunDir, describe_budget, runs_root
from rodimus_lab.terminal import print_table

H200 = "NVIDIA H200"
TIMED = "docs/benchmarks.md"  # where the steps stand that an experiment's own hours are reckoned from


class Planned(NamedTuple):
    """One run to come. `state` is new, unfinished or finished; `hours` on `device`, from the speed of the run
    `measured`, where one of this model or of its base was timed on a GPU, else from the steps that its experiment has
    timed."""

    recipe: Recipe
    state: str
    params: int
    tokens: int
    hours: float | None
    device: str | None
    measured: str | None

    @property
    def facts(self) -> dict[str, Any]:
        """As plain JSON."""
        recipe = self.recipe
        return {
            "experiment": recipe.experiment,
            "id": recipe.id,
            "state": self.state,
            "corpus": recipe.data.corpus,
            "budget": describe_budget(recipe.budget.to_dict()),
            "params": self.params,
            "tokens": self.tokens,
            "hours": None if self.hours is None else round(self.hours, 3),
            "device": self.device,
            "measured": self.measured,
        } | (recipe.departure or {"base": None, "changes": {}})


def plan(
    recipes: Iterable[Recipe],
    records: Sequence[Record],
    estimate: Estimate = no_estimate,
) -> Iterator[Planned]:
    """The recipes in order. A time is tokens over the speed of the newest record of the same model on a GPU, or of the
    base's, then scaled by the FLOPs of a token, else the experiment's `estimate`; evaluations and compilation are not
    in it."""
    timed = {
        _model(record.recipe): record
        for record in sorted(records, key=lambda record: record.finished)
        if record.metrics.get("tokens_per_second") and record.device != "cpu" and "model" in record.recipe
    }
    for recipe in recipes:
        run = RunDir(runs_root(), recipe.experiment, recipe.id)
        state = "finished" if run.finished else "unfinished" if run.path.is_dir() else "new"
        tokens = recipe.budget.steps * recipe.budget.batch_size * recipe.data.seq_len
        hours, record = None, None
        base = recipe.base
        for known in (recipe, *([base] if base else [])):
            record = timed.get(_model(known.to_dict()))
            if record is not None:
                more = _flops(recipe) / _flops(known)
                hours = tokens / record.metrics["tokens_per_second"] * more / 3600
                break
        device, measured = (record.device, record.id) if record else (None, None)
        if record is None and (hours := estimate(recipe)) is not None:
            device, measured = H200, TIMED
        yield Planned(recipe, state, recipe.model.num_params(), tokens, hours, device, measured)


def show_plan(
    recipes: Iterable[Recipe],
    records: Sequence[Record],
    console: Console,
    *,
    as_json: bool,
    estimate: Estimate = no_estimate,
    later: int = 0,
) -> None:
    """List what would be trained, with the time where a speed was measured. The last `later` recipes are there because
    of what others came to."""
    planned = list(plan(recipes, records, estimate))
    if as_json:
        print(json.dumps([one.facts for one in planned], indent=1))
        return
    table = plan_table(planned)
    if console.is_terminal:
        console.print(table)
    else:
        print_table(table, console)
    left = [one for one in planned if one.state != "finished"]
    hours = [one.hours for one in left if one.hours is not None]
    devices = ", ".join(sorted({one.device for one in left if one.device}))
    console.print(
        f"{len(left)} of {len(planned)} runs to train"
        + (f"; {sum(hours):.2f} h for {len(hours)} of them at the speeds measured on {devices}" if hours else "")
        + (
            "; a run that has learnt enough ends sooner"
            if any(hasattr(one.recipe.data, "enough") for one in left)
            else ""
        )
    )
    if later:
        console.print(f"the last {later} follow from the results so far; the others' results may change them")


def plan_table(planned: Sequence[Planned]) -> Table:
    """For a terminal; the changes are those from the base. What all runs have in common stands above."""
    budgets = [one.recipe.budget for one in planned]
    facts = {
        "corpus": [one.recipe.data.corpus for one in planned],
        "budget": [f"{budget.name}, {budget.steps:,} steps" for budget in budgets],
        "change": [_said(one.facts["changes"]) for one in planned],
    }
    common = [values[0] for name, values in facts.items() if name != "change" and len(set(values)) == 1]
    table = Table(box=box.SIMPLE, title=", ".join(common) or None, title_justify="left", pad_edge=False)
    table.add_column("run", no_wrap=True)
    told = [name for name, values in facts.items() if len(set(values)) > 1]
    for name in told:
        table.add_column(name, overflow="fold", min_width=12)
    for name in ("params", "GPU h"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for index, one in enumerate(planned):
        table.add_row(
            one.recipe.id,
            *(facts[name][index] for name in told),
            f"{one.params:,}",
            "-" if one.hours is None else f"{one.hours:.2f}",
            one.state,
        )
    return table


def _said(changes: dict[str, Any]) -> str:
    """The last parts of the changed paths, with values where they are short."""
    said = []
    for path, (_, here) in changes.items():
        name = path.rpartition(".")[2] if not path[-1].isdigit() else path
        said.append(f"{name} = {here}" if not isinstance(here, dict | list) else f"{name} changed")
    return ", ".join(dict.fromkeys(said)) or "-"


def _model(recipe: dict[str, Any]) -> str:
    # Vocabulary and dropout hardly change the speed, and a stand-in corpus may have another tokenizer.
    data = recipe["data"]
    model = {name: value for name, value in recipe["model"].items() if name not in ("vocab_size", "dropout")}
    return json.dumps([model, data.get("seq_len", data)], sort_keys=True)


def _flops(recipe: Recipe) -> float:
    return recipe.model.training_flops_per_token(recipe.data.seq_len)
