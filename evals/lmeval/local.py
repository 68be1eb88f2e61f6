"""Test items in local files, in the columns of the Hub's data sets, so that lm-eval's own task definitions read them.

A file holds one JSON object a line: either the Hub's own columns, or those of llm-foundry's evaluation files
(`query`, `choices`, `gold`; `context`, `continuation`; `context_options`, `continuation`, `gold`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rodimus_lab.errors import UserError

Row = dict[str, Any]
QUESTION = "Question: "


class LocalForm(NamedTuple):
    """`file` in the data folder, which may end in .gz, the `split` that lm-eval scores, a column that only the Hub's
    rows have, what makes a row of llm-foundry's into one of the Hub's (None: there is no such form), the `columns` that
    the task reads and what must stand in them (a dot leads into an object), and which of the rows are in the split."""

    file: str
    split: str
    column: str
    convert: Callable[[Row], Row] | None
    columns: Mapping[str, str]
    keep: Callable[[Row], bool] = lambda _: True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


TEXT, NAME, TEXTS, LABEL = "text", "text that is not blank", "a list of texts", "a label: a whole number or text"
KINDS: dict[str, Callable[[Any], bool]] = {
    TEXT: _is_text,
    NAME: lambda value: _is_text(value) and bool(value.strip()),
    TEXTS: _is_list,
    LABEL: lambda value: isinstance(value, int | str) and not isinstance(value, bool),
}
CHOICES = {"choices.text": TEXTS, "choices.label": TEXTS, "answerKey": TEXT}
KEYED = {"text": TEXT, "key": NAME, "value": TEXT}
ASKED = {"context": TEXT, "question": TEXT, "answers": TEXTS}


def _check(row: Row, columns: Mapping[str, str]) -> None:
    """Raises `KeyError` for a column that a row lacks, and `TypeError` for one that holds something else."""
    for column, kind in columns.items():
        value: Any = row
        for part in column.split("."):
            if not isinstance(value, dict) or part not in value:
                raise KeyError(column)
            value = value[part]
        if not KINDS[kind](value):
            raise TypeError(f"its {column!r} is {_shown(value)}, not {kind}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _choices(row: Row) -> Row:
    labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    return {"choices": {"text": row["choices"], "label": labels}, "answerKey": labels[row["gold"]]}


def _arc(row: Row) -> Row:
    return {"question": row["query"].removeprefix(QUESTION), **_choices(row)}


def _openbookqa(row: Row) -> Row:
    return {"question_stem": row["query"], **_choices(row)}


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    goal = row["query"].removeprefix(QUESTION).removesuffix("\n")
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def _hellaswag(row: Row) -> Row:
    activity, _, context = row["query"].partition(": ")
    return {
        "activity_label": activity,
        "ctx_a": context,
        "ctx_b": "",
        "endings": row["choices"],
        "label": str(row["gold"]),
    }


def _winogrande(row: Row) -> Row:
    """The task asks for the sentence up to the blank with either option in it: here that is the option."""
    first, second = row["context_options"]
    sentence = f"_ {row['continuation']}"
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(row["gold"] + 1)}


def _triviaqa(row: Row) -> Row:
    question = row["context"].removeprefix(QUESTION).removesuffix("\nAnswer:")
    return {"question": question, "answer": {"aliases": [row["answer"], *row["aliases"]]}}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['context']} {row['continuation'].strip()}"}


def _mbpp_test(row: Row) -> bool:
    """The 500 problems of MBPP's test split, of the 974 that its file holds."""
    return 11 <= row["task_id"] <= 510


def _human_eval(name: str = "HumanEval.jsonl.gz") -> LocalForm:
    return LocalForm(name, "test", "entry_point", None, {"prompt": TEXT, "test": TEXT, "entry_point": TEXT})


def _mbpp(name: str = "mbpp.jsonl", asked: str = "text", keep: Callable[[Row], bool] = _mbpp_test) -> LocalForm:
    return LocalForm(name, "test", "test_list", None, {asked: TEXT, "test_list": TEXTS}, keep)


def _mbpp_plus() -> LocalForm:
    return _mbpp("MbppPlus.jsonl.gz", "prompt", lambda _: True)


LOCAL = {
    "arc_challenge": LocalForm("arc_challenge.jsonl", "test", "answerKey", _arc, {"question": TEXT} | CHOICES),
    "arc_easy": LocalForm("arc_easy.jsonl", "test", "answerKey", _arc, {"question": TEXT} | CHOICES),
    "hellaswag": LocalForm(
        "hellaswag.jsonl",
        "validation",
        "ctx_a",
        _hellaswag,
        {"activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "endings": TEXTS, "label": LABEL},
    ),
    "lambada_openai": LocalForm("lambada_openai.jsonl", "test", "text", _lambada, {"text": TEXT}),
    "openbookqa": LocalForm("openbook_qa.jsonl", "test", "answerKey", _openbookqa, {"question_stem": TEXT} | CHOICES),
    "piqa": LocalForm(
        "piqa.jsonl", "validation", "goal", _piqa, {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": LABEL}
    ),
    "winogrande": LocalForm(
        "winogrande.jsonl",
        "validation",
        "sentence",
        _winogrande,
        {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": TEXT},
    ),
    "nq_open": LocalForm("nq_open_dev.jsonl", "validation", "question", None, {"question": TEXT, "answer": TEXTS}),
    "triviaqa": LocalForm(
        "triviaqa_sm_sub.jsonl", "validation", "question", _triviaqa, {"question": TEXT, "answer.aliases": TEXTS}
    ),
    "recall_fda": LocalForm("fda.jsonl", "validation", "text", None, KEYED),
    "recall_swde": LocalForm("swde.jsonl", "validation", "text", None, KEYED),
    "recall_squad": LocalForm("squad.jsonl", "validation", "text", None, {"text": TEXT, "value": TEXT}),
    "recall_drop": LocalForm("drop.jsonl", "validation", "context", None, ASKED),
    "recall_nq": LocalForm("nq.jsonl", "validation", "context", None, ASKED),
    "recall_triviaqa": LocalForm("triviaqa.jsonl", "validation", "context", None, ASKED),
    "humaneval": _human_eval(),
    "humaneval_instruct": _human_eval(),
    "humaneval_plus": _human_eval("HumanEvalPlus.jsonl.gz"),
    "humaneval_plus_instruct": _human_eval("HumanEvalPlus.jsonl.gz"),
    "mbpp": _mbpp(),
    "mbpp_instruct": _mbpp(),
    "mbpp_plus": _mbpp_plus(),
    "mbpp_plus_instruct": _mbpp_plus(),
    "gsm8k_cot": LocalForm("gsm8k_test.jsonl", "test", "question", None, {"question": TEXT, "answer": TEXT}),
    "recall_squad_questions": LocalForm("squad_dev_v1.1.json", "validation", "context", None, ASKED),
}


def local_file(task: str, folder: Path) -> Path:
    """Where the items of a task lie. Raises `UserError` for a task without a local form or a file that is missing."""
    if task not in LOCAL:
        raise UserError(
            f"the task {task!r} has no local form; leave out --data-dir to read it from the Hub, or choose among "
            f"{', '.join(LOCAL)}"
        )
    path = folder / LOCAL[task].file
    if not path.is_file():
        here = [name for name, form in LOCAL.items() if (folder / form.file).is_file()]
        raise UserError(
            f"{path} is missing, which {task} reads; tasks with their file there: {', '.join(here) or 'none'}"
        )
    return path


def read_rows(task: str, folder: Path) -> list[Row]:
    """The items of a task in the Hub's columns. Raises `UserError` naming the file and the line that are wrong."""
    path, form = local_file(task, folder), LOCAL[task]
    try:
        text = _read(path)
        rows = _squad(json.loads(text)) if path.suffix == ".json" else _lines(text, path)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); fetch it again") from None
    if not rows:
        raise UserError(f"{path} holds no items; fetch it again")
    items = []
    for number, row in enumerate(rows, 1):
        try:
            given = form.column in row
            if not given and form.convert is None:
                raise KeyError(form.column)
            if form.keep(row):
                item = row if given or form.convert is None else form.convert(row)
                _check(item, form.columns)
                items.append(item)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"item {number} of {path} is not one of {task} ({_reason(error)}); fetch it again"
            ) from None
    if not items:
        raise UserError(f"{path} holds no items of the {form.split} split; fetch it again")
    return items


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def fingerprint(path: Path) -> str:
    """The first 16 hex digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _lines(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            rows.append(row)
    return rows


def _squad(values: Row) -> list[Row]:
    """SQuAD v1.1 as it is published: a question of a paragraph each, with its answers."""
    return [
        {"context": paragraph["context"], "question": asked["question"], "answers": _answers(asked["answers"])}
        for article in values["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]


def _answers(answers: list[Any]) -> list[str]:
    return list(dict.fromkeys(answer["text"] if isinstance(answer, dict) else answer for answer in answers))


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
