"""Run records on disk: `results/runs/<experiment>/<id>/` with recipe, environment, metrics and, last, the record.

A run whose `record.json` is missing is not finished. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from rodimus_lab.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pydantic",
    "tokenizers",
    "safetensors",
    "flash-linear-attention",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
    "transformers",
    "datasets",
    "lm-eval",
    "ray",
)
# What stands for the corpus of a model that others trained, and of one in a folder that does not tell its training.
PUBLISHED, FROM_FOLDER, UNTRAINED = "published weights", "weights from a folder", "no corpus"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

RECIPE, ENV, METRICS, RECORD = "recipe.json", "env.json", "metrics.jsonl", "record.json"
SAMPLES = "samples.jsonl"  # Prompts and what the run made of them, where any were kept.


def runs_root() -> Path:
    """`$RODIMUS_LAB_RESULTS`, or `results/runs` under the project's root; tables and figures stand beside it."""
    chosen = os.environ.get("RODIMUS_LAB_RESULTS")
    return Path(chosen).expanduser() if chosen else PROJECT_ROOT / "results" / "runs"


def tables_root() -> Path:
    """Where reports are written: `tables` beside the runs."""
    return runs_root().parent / "tables"


def figures_root() -> Path:
    """Where figures are drawn: `figures` beside the runs."""
    return runs_root().parent / "figures"


def canonical_json(value: Any) -> str:
    """Sorted keys, indent 1, trailing newline. Raises `ValueError` for NaN and infinity, which JSON has not."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def write_atomic(path: Path, text: str | bytes) -> None:
    """Write `text` (as UTF-8) or bytes whole or not at all, making the folder it lies in. Raises `UserError` where the
    disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({_reason(error)}); free the disk or choose another place") from None


@dataclass(frozen=True)
class Record:
    """One finished run, as read back. `metrics` are the final ones, `budget` is the recipe's."""

    experiment: str
    id: str
    label: str
    recipe: dict[str, Any]
    env: dict[str, Any]
    metrics: dict[str, Any]
    corpus: str
    tokenizer: str
    budget: dict[str, Any]
    device: str
    commit: str
    finished: str
    path: Path

    @property
    def budget_text(self) -> str:
        """The budget in words, such as `short budget 1,500 of 25,000 steps, batch 256, 197M tokens`."""
        return describe_budget(self.budget, self.tokens)

    @property
    def tokens(self) -> int | None:
        """Tokens that the budget stands for: its steps of rows of one length; of a model that was scored, those that it
        was trained on. None where the rows have no one length, or nothing is known."""
        data = self.recipe.get("data") or {}
        rows = data.get("train") or [data if "seq_len" in data else self.recipe]
        lengths = {one.get("seq_len") for one in rows}
        if len(lengths) > 1 or None in lengths or not self.budget.get("batch_size"):
            return self.metrics.get("trained_tokens")
        return self.budget["steps"] * self.budget["batch_size"] * lengths.pop()


@dataclass(frozen=True)
class UnfinishedRun:
    """A run that was started and has no record yet. `last` is its last line of metrics, empty where there is none."""

    experiment: str
    id: str
    label: str
    recipe: dict[str, Any]
    last: dict[str, Any]
    path: Path


def describe_budget(budget: Mapping[str, Any], tokens: int | None = None) -> str:
    """A recipe's budget in words, with its tokens where they are given; a fraction of the paper's steps is told as one.

    Weights that others trained have no steps. `scored` says what of the test items counts, and where they are from.
    """
    steps, paper_steps = budget["steps"], budget.get("paper_steps")
    of = "" if paper_steps in (None, steps) else f" of {paper_steps:,}"
    batch = f", batch {budget['batch_size']:,}" if budget.get("batch_size") else ""
    scored = f", {budget['scored']}" if budget.get("scored") else ""
    read = f", {count_text(tokens)} tokens" if tokens else ""
    trained = f" budget {steps:,}{of} steps{batch}{read}" if steps else ""
    return f"{budget['name']}{trained}{scored}"


def count_text(count: float) -> str:
    """Three digits and a power of a thousand: 131M, 3.28B."""
    for letter, worth in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * worth:
            return f"{float(f'{count / worth:.3g}'):g}{letter}"
    return f"{count:g}"


class RunDir:
    """The folder of one run, `root/experiment/id`. Nothing is made on disk before `create`."""

    def __init__(self, root: Path | str, experiment: str, id: str):
        for what, name in (("experiment", experiment), ("run id", id)):
            _check_name(what, name)
        self.experiment, self.id = experiment, id
        self.path = Path(root) / experiment / id

    @classmethod
    def of(cls, root: Path | str, experiment: str, recipe: Mapping[str, Any]) -> RunDir:
        """The folder of what was measured and not trained, named after the recipe's label and its digest."""
        return cls(root, experiment, f"{recipe['label']}-{sha256(canonical_json(recipe).encode()).hexdigest()[:8]}")

    @property
    def finished(self) -> bool:
        return (self.path / RECORD).is_file()

    def read_record(self) -> dict[str, Any]:
        """The record of a finished run. Raises `UserError` for one that is not whole or not this run's."""
        path = self.path / RECORD
        mend = "restore the file, or delete it and run again"
        values = _read_object(path, mend)
        for name, kind in _RECORD_FIELDS.items():
            if not isinstance(values.get(name), kind):
                raise UserError(f"{path} has no valid {name!r}; {mend}")
        if not isinstance(values["budget"].get("steps"), int) or not isinstance(values["budget"].get("name"), str):
            raise UserError(f"{path} has no valid budget; {mend}")
        if (values["experiment"], values["id"]) != (self.experiment, self.id):
            raise UserError(
                f"{path} is the record of {values['experiment']}/{values['id']}; move it back to that folder"
            )
        return values

    def create(self, recipe: Mapping[str, Any]) -> None:
        """Write `recipe.json`; one that is there already must hold the same recipe, else `UserError`."""
        path = self.path / RECIPE
        text = canonical_json(recipe)
        if not path.exists():
            write_atomic(path, text)
        elif _read_object(path) != json.loads(text):
            raise UserError(f"{path} holds another recipe than this run's; move that folder away or delete it")

    def write_env(self, env: Mapping[str, Any]) -> None:
        write_atomic(self.path / ENV, canonical_json(env))

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one JSON line, whole or not at all. NaN and infinity raise `ValueError`."""
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        path = self.path / METRICS
        start = self.metrics_size()
        try:
            with path.open("ab", buffering=0) as file:
                if file.write(line) != len(line):
                    raise OSError("no space left on the device")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, start)
            raise UserError(f"cannot append to {path} ({_reason(error)}); free the disk and resume the run") from None

    def metrics_size(self) -> int:
        """Bytes in the metrics file: what a checkpoint stores, so that `truncate_metrics` can return to it."""
        path = self.path / METRICS
        return path.stat().st_size if path.exists() else 0

    def truncate_metrics(self, byte_length: int) -> None:
        """Forget the metrics after `byte_length`, so that a resumed run's file equals an uninterrupted one's."""
        path, size = self.path / METRICS, self.metrics_size()
        if byte_length > size:
            raise UserError(
                f"{path} has {size} bytes, fewer than the {byte_length} of the checkpoint; restore it, or start the "
                "run again with --no-resume"
            )
        if size:
            os.truncate(path, byte_length)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metrics lines. A last line without its end, left by a run that was cut off, is passed over."""
        path = self.path / METRICS
        if not path.exists():
            return []
        *lines, _torn = path.read_bytes().split(b"\n")
        return [_parse_object(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write `record.json`, which makes the run finished. `finished` is now (UTC) where `record` does not say.

        Raises `ValueError` for a record that lacks a field, names another run, or holds NaN or infinity.
        """
        own = {"experiment": self.experiment, "id": self.id}
        whole = own | {"finished": datetime.now(UTC).isoformat(timespec="seconds")} | dict(record)
        if lacking := sorted(_RECORD_FIELDS.keys() - whole.keys()):
            raise ValueError(f"the record of {self.id} lacks {', '.join(lacking)}")
        if any(whole[key] != name for key, name in own.items()):
            raise ValueError(f"{self.experiment}/{self.id} was given the record of {whole['experiment']}/{whole['id']}")
        if not (self.path / RECIPE).is_file():
            raise ValueError(f"{self.path} has no recipe; call create first")
        write_atomic(self.path / RECORD, canonical_json(whole))


def load_records(root: Path | str | None = None, experiment: str | None = None) -> list[Record]:
    """Every finished run under `root` (by default `runs_root()`), sorted by experiment and id.

    Raises `UserError` naming a file that cannot be read.
    """
    return [_load_record(run) for run in _runs(root, experiment) if run.finished]


def load_unfinished(root: Path | str | None = None, experiment: str | None = None) -> list[UnfinishedRun]:
    """Every run that was started and not finished, sorted by experiment and id."""
    unfinished = []
    for run in _runs(root, experiment):
        if not run.finished and (run.path / RECIPE).is_file():
            recipe = _read_object(run.path / RECIPE)
            metrics = run.read_metrics()
            last = metrics[-1] if metrics else {}
            label = str(recipe.get("label", run.id))
            unfinished.append(UnfinishedRun(run.experiment, run.id, label, recipe, last, run.path))
    return unfinished


def environment() -> dict[str, Any]:
    """What a run depends on besides its recipe: commit, versions and machine. The trainer adds device and data.

    `$RODIMUS_LAB_COMMIT` and `$RODIMUS_LAB_DIRTY` speak for a tree that came without its git history.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit, dirty = _revision()
    return {
        "commit": commit,
        "dirty": dirty,
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
    }


_RECORD_FIELDS: dict[str, type] = {
    "experiment": str,
    "id": str,
    "label": str,
    "finished": str,
    "metrics": dict,
    "device": str,
    "commit": str,
    "corpus": str,
    "tokenizer": str,
    "budget": dict,
}


def _load_record(run: RunDir) -> Record:
    values = run.read_record()
    return Record(
        **{name: values[name] for name in _RECORD_FIELDS},
        recipe=_read_object(run.path / RECIPE),
        env=_read_object(run.path / ENV),
        path=run.path,
    )


def _runs(root: Path | str | None, experiment: str | None) -> Iterator[RunDir]:
    base = runs_root() if root is None else Path(root)
    if experiment is not None:
        _check_name("experiment", experiment)
    if not base.is_dir():
        return
    for group in sorted(base.iterdir()) if experiment is None else [base / experiment]:
        if group.is_dir() and NAME.fullmatch(group.name):
            for path in sorted(group.iterdir()):
                if path.is_dir() and NAME.fullmatch(path.name):
                    yield RunDir(base, group.name, path.name)


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is not a valid {what}; use letters, digits and . _ + - only")


MEND = "restore the file, or delete the run's folder and run again"


def _read_object(path: Path, mend: str = MEND) -> dict[str, Any]:
    try:
        return _parse_object(path.read_bytes(), str(path), mend)
    except OSError as error:
        raise UserError(f"cannot read {path} ({_reason(error)}); {mend}") from None


def _parse_object(text: bytes, where: str, mend: str = MEND) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object; {mend}")
    return value


def _revision() -> tuple[str, bool | str]:
    commit = os.environ.get("RODIMUS_LAB_COMMIT")
    if commit:
        flag = os.environ.get("RODIMUS_LAB_DIRTY", "unknown").lower()
        known: dict[str, bool | str] = {"1": True, "true": True, "0": False, "false": False, "unknown": "unknown"}
        if flag not in known:
            raise UserError(f"RODIMUS_LAB_DIRTY is {flag!r}; set it to 1 or 0")
        return commit, known[flag]
    top = _git("rev-parse", "--show-toplevel")
    head = _git("rev-parse", "--verify", "HEAD")
    if top is None or head is None or Path(top).resolve() != PROJECT_ROOT:
        return "unknown", "unknown"
    # What runs and reports write is not part of what they depend on.
    status = _git("status", "--porcelain", "--", ".", ":(exclude)results")
    return head, "unknown" if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
