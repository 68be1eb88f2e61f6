"""NeedleBench under OpenCompass: its data sets in this project's cells, and a summary of what it leaves.

The summary is this project's own. Since mid-2025 the group of single-needle retrieval in OpenCompass's summary table is
averaged over the scores of multi-needle retrieval; here every score is found by its own cell.

    python -m evals.opencompass.needlebench WORK_DIR
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from evals.needlebench.scores import summarize
from evals.needlebench.source import open_source
from evals.needlebench.spec import SPACING, Cell, Language, Spec, Task
from rodimus_lab.errors import UserError
from rodimus_lab.weights import find_model

HERE = "evals.opencompass.datasets"
THEIRS = "opencompass.datasets.needlebench"
KINDS: dict[Task, tuple[str, str]] = {
    "single_retrieval": ("SingleRetrieval", f"{THEIRS}.origin.NeedleBenchOriginEvaluator"),
    "multi_retrieval": ("MultiRetrieval", f"{THEIRS}.parallel.NeedleBenchParallelEvaluator"),
    "multi_reasoning": ("MultiReasoning", f"{THEIRS}.multi.NeedleBenchMultiEvaluator"),
}
HAYSTACKS = {"en": "PaulGrahamEssays.jsonl", "zh": "zh_finance.jsonl"}
LANGUAGES: dict[Language, str] = {"en": "English", "zh": "Chinese"}
SLASH = "__"
LONGEST_PROMPT = 1 << 17  # Tokens of the model: 32k of gpt-4's, of Chinese more than twice as many in others.


def abbreviation(cell: Cell) -> str:
    """The cell's key as OpenCompass can use it in file names."""
    return cell.key.replace("/", SLASH)


def data_sets(spec: Spec, data: Path) -> list[dict[str, Any]]:
    """A data set in OpenCompass's form for every cell of `spec`, out of NeedleBench's files in `data`.

    Cells whose buffer takes all of their length are left out: OpenCompass would score the needles without a haystack.
    """
    return [_data_set(spec, cell, data) for cell in spec.cells() if cell.length > spec.buffer_of(cell)]


def _data_set(spec: Spec, cell: Cell, data: Path) -> dict[str, Any]:
    kind, evaluator = KINDS[cell.task]
    chains = f"multi_needle_reasoning_{cell.language}.json"
    options: dict[Task, dict[str, Any]] = {
        "single_retrieval": {"depth": cell.depth, "needle_file_name": "needles.jsonl"},
        "multi_retrieval": {"depths": list(spec.depths), "needle_file_name": "needles.jsonl"},
        "multi_reasoning": {
            "depth": cell.depth,
            "needle_file_name": chains,
            "num_needles": cell.needles,
            "diff": SPACING,
        },
    }
    rounds = [{"role": "HUMAN", "prompt": "{prompt}"}, {"role": "BOT", "prompt": "{answer}\n"}]
    openicl = "opencompass.openicl"
    return options[cell.task] | {
        "abbr": abbreviation(cell),
        "type": f"{HERE}.{kind}",
        "path": str(data.resolve()),
        "length": cell.length,
        "length_tokenizer": spec.length_tokenizer,
        "tokenizer_model": "gpt-4",
        "file_list": [HAYSTACKS[cell.language]],
        "num_repeats_per_file": spec.repeats_of(cell.task),
        "length_buffer": spec.buffer_of(cell),
        "guide": True,
        "language": LANGUAGES[cell.language],
        "reader_cfg": {"input_columns": ["prompt"], "output_column": "answer"},
        "infer_cfg": {
            "prompt_template": {"type": f"{openicl}.icl_prompt_template.PromptTemplate", "template": {"round": rounds}},
            "retriever": {"type": f"{openicl}.icl_retriever.ZeroRetriever"},
            "inferencer": {"type": f"{openicl}.icl_inferencer.GenInferencer", "max_out_len": spec.max_new_tokens},
        },
        "eval_cfg": {"evaluator": {"type": evaluator}, "pred_role": "BOT"},
    }


def spec_of_environment() -> Spec:
    """The cells that the variables NEEDLEBENCH_LENGTHS, _DEPTHS, _TASKS, _LANGUAGES, _REPEATS, _BUFFER, _MAX_NEW_TOKENS
    and _LENGTH_TOKENIZER ask for; lists have commas. The default is the first published set, of up to 4k."""
    given: dict[str, Any] = {"lengths": (1000, 2000, 3000, 4000)}
    for field in ("lengths", "depths"):
        if text := _variable(field):
            given[field] = tuple(_whole_number(field, part) for part in text.split(","))
    for field in ("repeats", "buffer", "max_new_tokens"):
        if text := _variable(field):
            given[field] = _whole_number(field, text)
    for field in ("tasks", "languages"):
        if text := _variable(field):
            given[field] = tuple(text.split(","))
    if text := _variable("length_tokenizer"):
        given["length_tokenizer"] = text
    spec = Spec.from_dict(given)
    if other := set(spec.tasks) - set(KINDS):
        raise UserError(f"NEEDLEBENCH_TASKS: {other.pop()!r} is not in this config; choose among {', '.join(KINDS)}")
    return spec


def _variable(field: str) -> str | None:
    return os.environ.get(f"NEEDLEBENCH_{field.upper()}")


def _whole_number(field: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"NEEDLEBENCH_{field.upper()}: {text!r} is no whole number; give one") from None


def from_environment() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Data sets and models of a config: RODIMUS_LAB_MODEL is asked, over the files in NEEDLEBENCH_DATA."""
    for name in ("RODIMUS_LAB_MODEL", "NEEDLEBENCH_DATA"):
        if not os.environ.get(name):
            raise UserError(f"the variable {name} is not set; give the model, or the folder of NeedleBench's files")
    spec = spec_of_environment()
    model = {
        "type": "evals.opencompass.model.RodimusLab",
        "abbr": Path(os.environ["RODIMUS_LAB_MODEL"].removesuffix("/final")).name,
        "path": os.environ["RODIMUS_LAB_MODEL"],
        "max_seq_len": LONGEST_PROMPT + spec.max_new_tokens,
        "batch_size": _whole_number("batch_size", _variable("batch_size") or "8"),
        "run_cfg": {"num_gpus": 0},
    }
    return data_sets(spec, Path(os.environ["NEEDLEBENCH_DATA"])), [model]


def configured() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same for a config: what is wrong is told in one sentence, and OpenCompass does not start."""
    try:
        found = from_environment()
        find_model(os.environ["RODIMUS_LAB_MODEL"])
        open_source(Path(os.environ["NEEDLEBENCH_DATA"]), KINDS, LANGUAGES)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return found


def read_results(folder: Path, spec: Spec) -> dict[str, dict[str, Any]]:
    """Our results of the cells that a folder of OpenCompass's results, one file a data set, has."""
    found: dict[str, dict[str, Any]] = {}
    for cell in spec.cells():
        path = folder / f"{abbreviation(cell)}.json"
        if path.is_file():
            names = [f"Depth{depth}" for depth in spec.depths] if cell.task == "multi_retrieval" else ["score"]
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                found[cell.key] = {"scores": [float(result[name]) for name in names]}
            except (OSError, ValueError, KeyError, TypeError):
                raise UserError(f"{path} has no {' or '.join(names)} in it; run OpenCompass on it again") from None
        else:
            found[cell.key] = {"impossible": "OpenCompass left no result"}
    return found


def main() -> None:
    """Print the means of every model with results under WORK_DIR, with the weights of the built-in NeedleBench."""
    try:
        _summarize_all(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _summarize_all(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UserError("give one argument, OpenCompass's work folder")
    folders = sorted(Path(arguments[0]).glob("*/results/*/"))
    if not folders:
        raise UserError(f"there are no results under {arguments[0]}; give the folder of -w")
    spec = spec_of_environment()
    for folder in folders:
        metrics = summarize(spec, read_results(folder, spec))
        means = {name: round(value, 2) for name, value in metrics.items() if isinstance(value, float)}
        missing = {"not_scored": len(metrics["impossible"])} if metrics["impossible"] else {}
        print(json.dumps({"model": folder.name, "length_tokenizer": spec.length_tokenizer, **means, **missing}))


if __name__ == "__main__":
    main()
