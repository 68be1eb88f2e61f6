"""One model on some tasks: a run record whose lines of metrics are the tasks, so that it goes on where it stopped."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Annotated, Any, Literal

import torch
from lm_eval import simple_evaluate
from pydantic import Field

from evals.lmeval.code import CodeConfig
from evals.lmeval.recall import RecallConfig
from evals.lmeval.subject import LoadOptions, Subject
from evals.lmeval.tasks import Tasks
from rodimus_lab.config import Config
from rodimus_lab.device import device_name, device_type
from rodimus_lab.records import RunDir, environment, runs_root

EXPERIMENT = "eval"
BOOTSTRAP = 1000


class EvaluationRecipe(Config):
    """Everything that decides the scores. `data` says where the items come from; `limit` counts the first ones only."""

    label: str
    evaluation: Literal["lm-eval"] = "lm-eval"
    version: str
    model: dict[str, str]
    tasks: tuple[str, ...]
    data: dict[str, Any]
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: int | None = None
    limit: int | None = None
    recall: RecallConfig | None = None
    code: CodeConfig | None = None
    shots: Annotated[dict[str, int], Field(default_factory=dict)]
    chat: bool = False

    @property
    def id(self) -> str:
        return f"{self.label}-{self.digest()}"

    @property
    def scored(self) -> str:
        """Which items count and how they are asked, in words."""
        items = "all items" if self.limit is None else f"the first {self.limit:,} items of each task"
        words = [f"{items} from {self.data['source']}"]
        if self.dtype != "float32":
            words.append(f"weights in {self.dtype}")
        if self.max_length is not None:
            words.append(f"at most {self.max_length:,} tokens")
        if self.recall is not None:
            words.append(f"{self.recall.context:,} tokens in and {self.recall.generation:,} out")
            if self.recall.whitespace == "keep":
                words.append("white space kept")
        if self.chat:
            words.append("in the chat format")
        if self.code is not None and self.code.samples not in (None, 1):
            words.append(f"{self.code.samples} samples of code at temperature {self.code.temperature:g}")
        return ", ".join(words)


def evaluate(
    subject: Subject, tasks: Tasks, options: LoadOptions, limit: int | None = None, say: Callable[[str], None] = print
) -> RunDir:
    """Score `subject` on `tasks` and keep the record; what is finished already is skipped. `say` is told of each task.

    Raises `UserError` where a model, its data or the disk refuse.
    """
    recipe = EvaluationRecipe(
        label=subject.label,
        version=version("lm-eval"),
        model=subject.identity,
        tasks=tasks.names,
        data=tasks.source,
        dtype=options.dtype,
        max_length=options.max_length,
        limit=limit,
        recall=tasks.recall if tasks.asks_recall else None,
        code=tasks.runner.config if tasks.runner.isolation else None,
        shots=tasks.shots,
        chat=tasks.chat,
    )
    run = RunDir(runs_root(), EXPERIMENT, recipe.id)
    if run.finished:
        say(f"{run.experiment}/{run.id} is finished")
        return run
    device = device_name(torch.device(device_type(options.device)))
    run.create(recipe.to_dict())
    env = environment()
    where = {"device": device, "batch_size": options.batch_size, "isolation": tasks.runner.isolation}
    run.write_env(env | where)
    done = {line["task"]: line for line in run.read_metrics()}
    for name in done:
        say(f"{name}: done before")
    for name in ("lm_eval", "huggingface_hub"):  # Which tells of each attempt; the error says it once.
        logging.getLogger(name).setLevel(logging.ERROR)
    model = None
    for name in tasks.names:
        if name in done:
            continue
        try:
            model = model or subject.load()
            started = time.perf_counter()
            scores = _scores(model, name, tasks, limit)
        except BaseException:
            if not done:  # A run without a task would be listed as one that can go on.
                shutil.rmtree(run.path, ignore_errors=True)
            raise
        line = {"task": name, **scores, "seconds": round(time.perf_counter() - started, 1)}
        run.append_metrics(line)
        done[name] = line
        say(f"{name}: {describe(line)}")
    scores = {f"{name}.{key}": value for name in tasks.names for key, value in done[name].items() if key != "task"}
    run.finish(
        {
            "label": subject.label,
            "corpus": subject.corpus,
            "tokenizer": subject.tokenizer,
            "budget": subject.budget | {"scored": recipe.scored},
            "device": device,
            "commit": env["commit"],
            "metrics": scores | subject.facts,
        }
    )
    return run


def describe(line: dict[str, Any]) -> str:
    """A task's metrics in words, with their standard errors."""
    parts = []
    for key, value in line.items():
        if key in ("task", "seconds", "items") or key.endswith(("_stderr", ".items")):
            continue
        error = line.get(f"{key}_stderr")
        parts.append(f"{key} {value:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
    return f"{', '.join(parts)} ({line['items']:,} items, {line['seconds']:,.0f} s)"


def _scores(model: Any, name: str, tasks: Tasks, limit: int | None) -> dict[str, float]:
    loaded = tasks.load(name, model)
    given = simple_evaluate(
        model=model,
        tasks=loaded,
        task_manager=tasks.manager,
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
        confirm_run_unsafe_code=tasks.runner.isolation is not None,
        apply_chat_template=tasks.chat,
        fewshot_as_multiturn=tasks.chat,
    )
    assert given is not None
    return dict(_flat(given, name))


def _flat(given: Any, name: str) -> Iterator[tuple[str, float]]:
    """`acc`, `acc_stderr` and so on; what is not a finite number is left out. Where the name stands for several tasks,
    each one's with the task before it, and their means over all items, as lm-eval's groups have them."""
    counts = {task: count["effective"] for task, count in given["n-samples"].items()}
    yield "items", sum(counts.values())
    found: dict[str, dict[str, float]] = {}
    for task, metrics in given["results"].items():
        prefix = "" if task == name or len(given["results"]) == 1 else f"{task}."
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            number = value.item() if hasattr(value, "item") else value
            if kind and isinstance(number, int | float) and math.isfinite(number):
                name_of, error = metric.removesuffix("_stderr"), "_stderr" if metric.endswith("_stderr") else ""
                full = name_of + (f".{kind}" if kind != "none" else "") + error
                found.setdefault(full, {})[task] = number
                yield f"{prefix}{full}", number
    for full, numbers in found.items():
        if len(counts) > 1 and numbers.keys() == counts.keys():
            power = 2 if full.endswith("_stderr") else 1
            total = math.fsum((counts[task] * number) ** power for task, number in numbers.items()) ** (1 / power)
            yield full, total / sum(counts.values())
