"""What is asked: the grid of lengths and depths, and the buffers that a length keeps free of haystack.

Lengths, buffers and haystacks are counted in tokens of the length tokenizer, depths in percent of the haystack.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from rodimus_lab.config import Config

Language = Literal["en", "zh"]
Task = Literal["single_retrieval", "multi_retrieval", "multi_reasoning", "ancestry"]
Positive = Annotated[int, Field(ge=1)]
Percent = Annotated[int, Field(ge=0, le=100)]

DEPTHS = tuple(int(100 / 19 * step) for step in range(20))
PRESETS = {
    "4k": tuple(range(1000, 5000, 1000)),
    "8k": tuple(range(5000, 9000, 1000)),
    "32k": (9000, 13000, 17000, 21000, 25000, 29000, 31000, 32000),
    "16k": tuple(range(1000, 17000, 1000)),
}
# Of the published sets of up to 4k, 8k and 32k. A length of any grid has the buffer of the set it would belong to.
BANDS = (4000, 8000)
ENGLISH_BUFFERS: dict[Task, tuple[int, int, int]] = {
    "single_retrieval": (600, 800, 3000),
    "multi_retrieval": (1000, 1300, 3000),
    "multi_reasoning": (600, 1000, 3000),
}
CHINESE_BUFFER = 200
REPEATS: dict[Task, int] = {"single_retrieval": 10, "multi_retrieval": 25, "multi_reasoning": 10, "ancestry": 10}
CHAINS = (2, 3, 4, 5)  # Needles of a question in multi-needle reasoning.
SPACING = 10  # Percent of the haystack between two of these.


class Spec(Config):
    """The cells to score. `repeats` and `buffer` are NeedleBench's own where they are None; `model` as length tokenizer
    is the model's.

    A haystack without any token is not scored unless `score_empty`, with which it is, as NeedleBench's code does.
    `names` are the people of an ancestry question.
    """

    lengths: Annotated[tuple[Positive, ...], Field(min_length=1)]
    depths: Annotated[tuple[Percent, ...], Field(min_length=1)] = DEPTHS
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = ("single_retrieval", "multi_retrieval", "multi_reasoning")
    languages: Annotated[tuple[Language, ...], Field(min_length=1)] = ("en", "zh")
    names: tuple[Annotated[int, Field(ge=2)], ...] = tuple(range(2, 20))
    repeats: Positive | None = None
    buffer: Annotated[int, Field(ge=0)] | None = None
    length_tokenizer: str = "gpt-4"
    max_new_tokens: Positive = 2000
    score_empty: bool = False

    @model_validator(mode="after")
    def _each_once(self) -> Spec:
        for field in ("lengths", "depths", "tasks", "languages", "names"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field!r} names one thing twice")
        if list(self.depths) != sorted(self.depths):
            raise ValueError("'depths' must rise")
        return self

    def repeats_of(self, task: Task) -> int:
        return self.repeats or REPEATS[task]

    def buffer_of(self, cell: Cell) -> int:
        """Tokens of a cell's length that are left to the prompt around the haystack."""
        if self.buffer is not None:
            return self.buffer
        return ENGLISH_BUFFERS[cell.task][band(cell.length)] if cell.language == "en" else CHINESE_BUFFER

    def cells(self) -> list[Cell]:
        """Every cell, the shorter lengths first. Multi-needle retrieval asks for all depths at once."""
        cells: list[Cell] = []
        for length in sorted(self.lengths):
            for task in self.tasks:
                for language in self.languages:
                    if task == "single_retrieval":
                        cells += [Cell(task, language, length, 1, depth) for depth in self.depths]
                    elif task == "multi_retrieval":
                        cells.append(Cell(task, language, length, len(self.depths)))
                    elif task == "multi_reasoning":
                        cells += [Cell(task, language, length, n, depth) for n in CHAINS for depth in self.depths]
        if "ancestry" in self.tasks:
            cells += [Cell("ancestry", language, 0, count) for language in self.languages for count in self.names]
        return cells


class Cell(NamedTuple):
    """The prompts that make one score. `needles` are those hidden at once, or the people of an ancestry question;
    `depth` is None where all depths are asked at once or there is none."""

    task: Task
    language: Language
    length: int
    needles: int
    depth: int | None = None

    @property
    def dataset(self) -> str:
        """The cells of one dataset make one grid, such as `multi_reasoning_3_en`."""
        number = f"_{self.needles}" if self.task == "multi_reasoning" else ""
        return f"{self.task}{number}_{self.language}"

    @property
    def key(self) -> str:
        """What names the cell in a record."""
        if self.task == "ancestry":
            return f"{self.dataset}/{self.needles}"
        return f"{self.dataset}/{self.length}" + ("" if self.depth is None else f"/{self.depth}")


def band(length: int) -> int:
    """0, 1 or 2 for a length of the published 4k, 8k and 32k sets."""
    return sum(length > end for end in BANDS)
