"""`bench data`: tokenisation throughput with 1, 2, 4 processes and so on up to all; and what one reader can feed."""

from __future__ import annotations

from typing import Annotated

import typer

from rodimus_lab.bench.result import AsJson, Column, Result, Row, app, show, surroundings
from rodimus_lab.data import data_root, measure_reading, measure_tokenization
from rodimus_lab.data.encoding import default_workers
from rodimus_lab.train.distributed import session

TARGET = {"tokens_per_second": 1_000_000, "cores": 2}
SHORTEST = 1.0
READING_SECONDS = 3.0
COLUMNS = (
    Column("corpus", "corpus"),
    Column("tokenizer", "tokenizer"),
    Column("workers", "processes"),
    Column("seconds", "s", 1, 2),
    Column("tokens_per_second", "tokens/s"),
    Column("bytes_per_second", "MB/s", 1e-6, 2),
    Column("tokens_per_second_per_core", "tokens/s a core"),
    Column("speedup", "x 1 process", 1, 2),
    Column("over_target", "x target", 1, 2),
)


@app.command()
def data(
    corpus: Annotated[
        str | None, typer.Option(help="Default: enwiki-25k where RODIMUS_LAB_DATA holds it, else pydoc.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Default: pydoc-4096 for pydoc, else gpt2.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="At most so long for each line.")] = 10.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Instead of one process a core.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise for some seconds, reading included, and write nothing. The target is 1 M tokens/s on 2 cores.

    The last line reads only, as the process does that feeds all others.
    """
    root = data_root()
    corpus = corpus or ("enwiki-25k" if root and (root / "enwiki-25k").is_dir() else "pydoc")
    tokenizer = tokenizer or ("pydoc-4096" if corpus == "pydoc" else "gpt2")
    with session("cpu") as world:
        facts = surroundings(world)
    rows: list[Row] = []
    for count in scale(workers or default_workers()):
        row = measure_tokenization(corpus, tokenizer, seconds, workers=count)
        row["tokens_per_second_per_core"] = row["tokens_per_second"] / min(count, default_workers())
        row["speedup"] = row["tokens_per_second"] / (rows or [row])[0]["tokens_per_second"]
        row["over_target"] = row["tokens_per_second"] / TARGET["tokens_per_second"]
        if row["seconds"] < SHORTEST:
            row["note"] = f"the corpus lasted {row['seconds']:.2f} s only, too short to be relied on"
        rows.append(row)
    reading = measure_reading(corpus, min(seconds, READING_SECONDS))
    one = rows[0]["bytes_per_second"]
    reading["note"] = f"reading alone: one reader feeds some {reading['bytes_per_second'] / one:.0f} workers"
    rows.append(reading)
    show(Result("data", {"seconds": seconds, "target": TARGET}, rows, facts), COLUMNS, as_json)


def scale(workers: int) -> list[int]:
    """1, 2, 4 and so on, and `workers` itself."""
    return [*(2**power for power in range(workers.bit_length()) if 2**power < workers), workers]
