"""Asking a model: prompts of many cells in one batch, greedy, each cell's scores handed over as soon as it is whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from evals.needlebench.ancestry import ancestry_examples
from evals.needlebench.prompts import Example, Impossible, Prompts
from evals.needlebench.scores import of_cell, score, settled
from evals.needlebench.source import Source
from evals.needlebench.spec import Cell, Spec, Task
from rodimus_lab.data import Tokenizer
from rodimus_lab.decoder import Decoder
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.sampling import Sampling

BATCH_TOKENS = 1 << 16
CONTEXT_STEP = 1024
LOOK_EVERY = 16  # Tokens between two looks at whether a prediction's score can still change.
SHOWN = 200
Keep = Callable[[Cell, dict[str, Any]], None]


@dataclass
class _Asked:
    """A cell under way: its examples, and its predictions as far as they are made."""

    cell: Cell
    examples: Sequence[Example]
    tokens: int = 0
    predictions: list[str] = field(default_factory=list)

    @property
    def result(self) -> dict[str, Any]:
        pairs = zip(self.predictions, self.examples, strict=True)
        scores = [score(self.cell.task, prediction, example) for prediction, example in pairs]
        return of_cell(self.cell.task, scores) | {
            "prompts": len(self.examples),
            "prompt_tokens": self.tokens / len(self.examples),
            "first": self.predictions[0][:SHOWN],
        }


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    spec: Spec,
    source: Source,
    *,
    length_tokenizer: Tokenizer | None = None,
    keep: Keep = lambda _cell, _result: None,
    done: Collection[str] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, dict[str, Any]]:
    """The result of every cell of `spec` that is not among the keys `done`, by its key.

    A result holds `scores` (0 to 100; one, or one a depth), the number of `prompts`, their mean length in the model's
    tokens and the beginning of the `first` prediction; or, under `impossible`, why the cell cannot be asked. `keep` is
    called with each as soon as it is there. At most `batch_tokens` tokens of prompts are read at a time, one prompt at
    least; they change a score by no more than rounding does. `length_tokenizer` is the model's by default.
    """
    prompts = Prompts(spec, source, length_tokenizer or tokenizer)
    generate = Generation(model, tokenizer, spec.max_new_tokens)
    results: dict[str, dict[str, Any]] = {}

    def finish(cell: Cell, result: dict[str, Any]) -> None:
        results[cell.key] = result
        keep(cell, result)

    waiting: list[tuple[_Asked, Question]] = []

    def answer() -> None:
        texts = generate([question for _, question in waiting])
        for (asked, _), text in zip(waiting, texts, strict=True):
            asked.predictions.append(text)
            if len(asked.predictions) == len(asked.examples):
                finish(asked.cell, asked.result)
        waiting.clear()

    for cell in spec.cells():
        if cell.key in done:
            continue
        try:
            asked = _Asked(cell, _examples(prompts, source, spec, cell))
        except Impossible as reason:
            finish(cell, {"impossible": str(reason)})
            continue
        for example in asked.examples:
            ids = tokenizer.encode(example.prompt)
            asked.tokens += len(ids)
            longest = max([len(ids), *(len(question.ids) for _, question in waiting)])
            if waiting and rounded(longest) * (len(waiting) + 1) > batch_tokens:
                answer()
            waiting.append((asked, Question(cell.task, example, ids)))
    if waiting:
        answer()
    return results


def _examples(prompts: Prompts, source: Source, spec: Spec, cell: Cell) -> list[Example]:
    if cell.task == "ancestry":
        names = source.names.get(cell.language, ())
        return ancestry_examples(names, cell.language, cell.needles, spec.repeats_of(cell.task))
    return prompts.examples(cell)


class Question(NamedTuple):
    """A prompt in the model's tokens, and what its answer is scored by."""

    task: Task
    example: Example
    ids: list[int]


def rounded(length: int) -> int:
    """The context that prompts of about this length share, and with it a decoder, on CUDA a captured graph."""
    return -(-length // CONTEXT_STEP) * CONTEXT_STEP


class Generation:
    """The likeliest continuation of each of a batch of prompts, up to the end of the document or `max_new_tokens`.

    A row ends as soon as no further text can change its score. Prompts are read in pieces (`Decoder.prefill`), so that
    beside the model there is its state and the activations of a piece, however long the prompt.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self._decoder: Decoder | None = None

    def __call__(self, questions: Sequence[Question]) -> list[str]:
        rows: list[list[int]] = [[] for _ in questions]
        ended = [False] * len(questions)
        for count, tokens in enumerate(self._tokens([question.ids for question in questions]), 1):
            for row, token in enumerate(tokens):
                ended[row] = ended[row] or token == self.tokenizer.eos_id
                if not ended[row]:
                    rows[row].append(token)
            if count % LOOK_EVERY == 0:
                for row, question in enumerate(questions):
                    if not ended[row]:
                        ended[row] = settled(question.task, self.tokenizer.decode(rows[row]), question.example)
            if all(ended):
                break
        return [self.tokenizer.decode(row) for row in rows]

    def _tokens(self, prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        context = rounded(max(map(len, prompts))) + self.max_new_tokens
        if self._decoder is None or (len(self._decoder.token_B), self._decoder.context) != (len(prompts), context):
            self._decoder = None  # Its memory is free before the next one takes any.
            stop = [self.tokenizer.eos_id]
            self._decoder = Decoder(self.model, len(prompts), context, Sampling(temperature=0), stop=stop)
        self._decoder.prefill(prompts)
        return self._decoder.tokens(self.max_new_tokens)


def resumed(lines: Sequence[Mapping[str, Any]], spec: Spec, path: Path) -> dict[str, dict[str, Any]]:
    """The cells' results out of a run's metrics, read from `path`. Raises `UserError` naming a line that is none."""
    known = {cell.key: cell for cell in spec.cells()}
    found = {}
    for number, line in enumerate(lines, 1):
        result = {name: value for name, value in line.items() if name != "cell"}
        if (key := line.get("cell")) not in known or not _whole(result, known[key], spec):
            raise UserError(f"line {number} of {path} is no cell of this grid; delete the run's folder and run again")
        found[key] = result
    return found


def _whole(result: Mapping[str, Any], cell: Cell, spec: Spec) -> bool:
    """Whether a result has all that is summed up of it."""
    if "impossible" in result:
        return isinstance(result["impossible"], str)
    scores = result.get("scores")
    wanted = len(spec.depths) if cell.task == "multi_retrieval" else 1
    if not isinstance(scores, list) or len(scores) != wanted:
        return False
    return all(_is_score(one) for one in (*scores, *([result.get("circular")] if cell.task == "ancestry" else [])))


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 100
