"""The paper's own numbers, read from `results/paper/*.csv` (described in the README beside them)."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from rodimus_lab.errors import UserError
from rodimus_lab.records import PROJECT_ROOT

NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")


class Printed(float):
    """A number of the paper that remembers the digits it was printed with."""

    text: str

    def __new__(cls, text: str) -> Printed:
        number = super().__new__(cls, text)
        number.text = text
        return number


PaperValue: TypeAlias = Printed | str | None
PaperRow: TypeAlias = Mapping[str, PaperValue]


class PaperResults:
    """The CSVs of one folder. A row is a dict from column to `Printed`, to text, or to None where nothing is given."""

    def __init__(self, folder: Path | str = PROJECT_ROOT / "results" / "paper"):
        self.folder = Path(folder)

    def table(self, number: int) -> list[PaperRow]:
        """The rows of Table `number`, 1 to 22."""
        return self._read(f"table{number:02d}")

    def figure(self, name: str) -> list[PaperRow]:
        """The points read off a figure, by a name such as `01a`, `01b`, `04` or `05`."""
        return self._read(f"figure{name}")

    def _read(self, name: str) -> list[PaperRow]:
        path = self.folder / f"{name}.csv"
        try:
            with path.open(newline="", encoding="utf-8") as file:
                header, *rows = list(csv.reader(file, strict=True))
        except FileNotFoundError:
            known = ", ".join(sorted(known.stem for known in self.folder.glob("*.csv"))) or "none"
            raise UserError(f"{path} is missing; restore it from the repository (present: {known})") from None
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{path} cannot be read as CSV ({error}); restore it from the repository") from None
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                raise UserError(f"line {number} of {path} has {len(row)} cells, not {len(header)}; restore the file")
        return [dict(zip(header, map(_value, row), strict=True)) for row in rows]


def paper_table(number: int) -> list[PaperRow]:
    """The rows of the paper's Table `number`, 1 to 22."""
    return PaperResults().table(number)


def _value(text: str) -> PaperValue:
    if not text:
        return None
    return Printed(text) if NUMBER.fullmatch(text) else text
