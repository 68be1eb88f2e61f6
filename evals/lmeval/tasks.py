"""Suites, and the tasks in them: lm-eval's own definitions, over the Hub's data or the same items in local files."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from evals.coder import SHOTS, coder_tasks
from evals.lmeval.code import CODE_FOLDERS, CodeConfig, CodeRunner, unfenced
from evals.lmeval.local import LOCAL, fingerprint, local_file, read_rows
from evals.lmeval.recall import RECALL, Codec, RecallConfig, contains, recall_items
from rodimus_lab.errors import UserError

# Where lm-eval keeps these tasks: reading their folders takes no time, and all of them half a minute.
FOLDERS: dict[str, tuple[str, ...]] = {
    "arc_challenge": ("arc",),
    "arc_easy": ("arc",),
    "hellaswag": ("hellaswag",),
    "lambada_openai": ("lambada",),
    "openbookqa": ("openbookqa",),
    "piqa": ("piqa",),
    "winogrande": ("winogrande",),
    "nq_open": ("nq_open",),
    "triviaqa": ("triviaqa",),
    "humaneval": ("humaneval",),
    "humaneval_instruct": ("humaneval",),
    "humaneval_plus": ("humaneval",),
    "humaneval_plus_instruct": ("humaneval",),
    "mbpp": ("mbpp",),
    "mbpp_instruct": ("mbpp",),
    "mbpp_plus": ("mbpp",),
    "mbpp_plus_instruct": ("mbpp",),
    "cruxeval_input": ("cruxeval",),
    "cruxeval_output": ("cruxeval",),
    "ceval-valid": ("ceval",),
    "cmmlu": ("cmmlu",),
    "mmlu": ("mmlu/default",),
    "bbh": ("bbh/cot_fewshot",),
    "gsm8k_cot": ("gsm8k",),
    "minerva_math": ("minerva_math", "benchmarks"),
}
UNFENCED = {"filter_list": [{"name": "extract_code", "filter": [{"function": "custom", "filter_fn": unfenced}]}]}
# What lm-eval does not have, or not right, made of what it has: its task, and the changes.
DERIVED: dict[str, tuple[str, dict[str, Any]]] = {
    "humaneval_plus_instruct": ("humaneval_instruct", {"dataset_path": "evalplus/humanevalplus"}),
    "mbpp_instruct": ("mbpp_instruct", UNFENCED),
    "mbpp_plus_instruct": ("mbpp_plus_instruct", UNFENCED),
}
DOWNSTREAM = ("arc_challenge", "arc_easy", "hellaswag", "lambada_openai", "openbookqa", "piqa", "winogrande")
CHAT_SUITE = "coder-chat"
SUITES: dict[str, tuple[str, ...]] = {
    "downstream": DOWNSTREAM,
    "recall": tuple(name for name, task in RECALL.items() if task.hub),
    "coder": coder_tasks(21),
    CHAT_SUITE: coder_tasks(22),
}
HUB = "the Hugging Face Hub"


class Tasks:
    """The tasks that a suite's name or names with commas stand for.

    The benchmarks of Tables 21 and 22 are asked with the shots that the paper states, others with lm-eval's, all with
    `shots` where it is given. `chat` asks in the chat format, as the suite of Table 22 does. Raises `UserError` for a
    task that there is not, for a file that is not there, and for one that runs code where `allow_code` is not given.
    """

    def __init__(
        self,
        suite: str,
        data_dir: Path | None = None,
        recall: RecallConfig | None = None,
        *,
        code: CodeConfig | None = None,
        allow_code: bool = False,
        shots: int | None = None,
        chat: bool = False,
    ):
        names = SUITES.get(suite) or tuple(dict.fromkeys(filter(None, map(str.strip, suite.split(",")))))
        if not names:
            raise UserError(f"--suite names no task; give {', '.join(SUITES)} or the names of lm-eval's tasks")
        if data_dir is not None and not data_dir.is_dir():
            raise UserError(f"there is no folder {data_dir}; give one with the test items as files, or leave it out")
        self.names, self.data_dir, self.recall = names, data_dir, recall or RecallConfig()
        self.chat = chat or suite == CHAT_SUITE
        self.shots = {
            name: count for name in names if (count := SHOTS.get(name) if shots is None else shots) is not None
        }
        asked = [name for name in names if name not in RECALL]
        folders = sorted({folder for name in asked for folder in FOLDERS.get(name, ())})
        if all(name in FOLDERS for name in asked):
            root = Path(lm_eval.tasks.__file__).parent
            self.manager = TaskManager(include_path=[root / name for name in folders], include_defaults=False)
        else:
            self.manager = TaskManager()
        known = {*self.manager.all_tasks, *RECALL, *DERIVED}
        for name in names:
            if name not in known and not Path(name).is_file():
                close = difflib.get_close_matches(name, [*SUITES, *known], n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ";"
                raise UserError(
                    f"there is no suite or task named {name!r}{hint} suites: {', '.join(SUITES)}; "
                    f"tasks: lm-eval's own and {', '.join(RECALL)}"
                )
            if data_dir is None and name in RECALL and not RECALL[name].hub:
                raise UserError(
                    f"{name} reads {LOCAL[name].file}, which is not on the Hub; give its folder as --data-dir"
                )
        self.runner = CodeRunner(allow_code, code or CodeConfig())
        if runs := [name for name in names if CODE_FOLDERS & {*FOLDERS.get(name, ())}]:
            self.runner.require(", ".join(runs))
        self.files = {} if data_dir is None else {name: local_file(name, data_dir) for name in names}

    @property
    def asks_recall(self) -> bool:
        return any(name in RECALL for name in self.names)

    @property
    def source(self) -> dict[str, Any]:
        """Where the items come from, for the recipe."""
        if self.data_dir is None:
            return {"source": HUB}
        return {"source": "local files", "files": {path.name: fingerprint(path) for path in self.files.values()}}

    def load(self, name: str, codec: Codec) -> list[Any]:
        """lm-eval's task objects of a name, their items read. Raises `UserError` where the Hub does not give them, and
        where a package is missing that the task needs."""
        try:
            if name in RECALL:
                return [_recall_task(name, self._rows(name), self.recall, codec)]
            with self.runner.loading():
                tasks = list(self._loaded(name))
        except (OSError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"the items of {name} cannot be had from the Hub ({reason}); get access to it, or give --data-dir"
            ) from None
        except ImportError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"{name} needs a package that is not there ({reason}); pip install -e '.[eval]'") from None
        for task in tasks:
            self.runner.confine(task)
            if name in self.shots:
                task.set_config("num_fewshot", self.shots[name])
        return tasks

    def _loaded(self, name: str) -> Iterator[Any]:
        if self.data_dir is not None:
            yield from self._local_task(name).values()
        elif name in DERIVED:
            base, change = DERIVED[name]
            yield from self._changed(base, change).values()
        else:
            yield from self.manager.load([name])["tasks"].values()

    def _rows(self, name: str) -> list[dict[str, Any]]:
        if self.data_dir is not None:
            return read_rows(name, self.data_dir)
        return list(datasets.load_dataset(RECALL[name].hub, split="validation"))

    def _local_task(self, name: str) -> dict[str, Any]:
        """lm-eval's definition with nothing but its source of data replaced."""
        assert self.data_dir is not None
        split = LOCAL[name].split
        items = {split: Dataset.from_list(read_rows(name, self.data_dir))}

        def local_items(**_: Any) -> dict[str, Dataset]:
            return items

        splits = {"training_split": None, "validation_split": None, "test_split": None, f"{split}_split": split}
        base, change = DERIVED.get(name, (name, {}))
        return self._changed(base, change | {"custom_dataset": local_items} | splits)

    def _changed(self, name: str, change: dict[str, Any]) -> dict[str, Any]:
        return self.manager.load([{"group": "changed", "task": [{"task": name} | change]}])["tasks"]


def _recall_task(name: str, rows: Sequence[dict[str, Any]], config: RecallConfig, codec: Codec) -> ConfigurableTask:
    items = recall_items(name, rows, config, codec)
    if not items:
        raise UserError(f"{name} has no document with an answer of two characters or more; give other data")

    def prepared(**_: Any) -> dict[str, Dataset]:
        return {"validation": Dataset.from_list(items)}

    def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        return {"contains": float(contains(results[0], doc["answers"]))}

    return ConfigurableTask(
        config={
            "task": name,
            "dataset_path": RECALL[name].hub or name,
            "custom_dataset": prepared,
            "validation_split": "validation",
            "output_type": "generate_until",
            "doc_to_text": lambda doc: doc["prompt"],
            "doc_to_target": lambda doc: doc["answers"][0],
            "process_results": score,
            "num_fewshot": 0,
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": config.generation, "do_sample": False},
            "metric_list": [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
    )
