"""NeedleBench's data: haystacks, needles, chains of reasoning and names, from a folder or from the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from evals.needlebench.spec import Language, Task
from rodimus_lab.data import data_root
from rodimus_lab.data.hub import quiet_hub
from rodimus_lab.errors import UserError

HUB = "opencompass/NeedleBench"
HAYSTACKS: dict[Language, str] = {"en": "PaulGrahamEssays.jsonl", "zh": "zh_finance.jsonl"}
NEEDLES = "needles.jsonl"
CHAINS: dict[Language, str] = {"en": "multi_needle_reasoning_en.json", "zh": "multi_needle_reasoning_zh.json"}
NAMES = "names.json"
LANGUAGES: dict[str, Language] = {"English": "en", "Chinese": "zh"}


class Needle(NamedTuple):
    """A sentence to hide, the question about it, and the words that an answer must hold. `subject` is what it is of."""

    language: Language
    text: str
    question: str
    keyword: str
    subject: str


class Chain(NamedTuple):
    """Sentences to hide, of which all are needed for the answer. `size` is how many the file says there are, by which a
    chain is chosen; in the Chinese file it is wrong once."""

    size: int
    needles: tuple[str, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Source:
    """`haystacks` are documents by language, `needles` those of both languages in the file's order. What a run does not
    ask for may be left out. `digest` names the content, `origin` where it is from."""

    haystacks: Mapping[Language, Sequence[str]] = field(default_factory=dict)
    needles: Sequence[Needle] = ()
    chains: Mapping[Language, Sequence[Chain]] = field(default_factory=dict)
    names: Mapping[Language, Sequence[str]] = field(default_factory=dict)
    digest: str = ""
    origin: str = ""


def open_source(folder: Path | None, tasks: Iterable[Task], languages: Iterable[Language]) -> Source:
    """What `tasks` need in `languages`: from `folder`, else from `needlebench` under the data root where that is there,
    else from the Hub.

    Raises `UserError` naming a file that is missing or is not what it should be.
    """
    tasks, languages = set(tasks), sorted(set(languages))
    if folder is None and (root := data_root()) is not None and (root / "needlebench").is_dir():
        folder = root / "needlebench"
    files = _Files(folder)
    in_text = bool(tasks - {"ancestry"})
    haystacks = {language: files.lines(HAYSTACKS[language], _document) for language in languages if in_text}
    needles = files.lines(NEEDLES, _needle) if tasks & {"single_retrieval", "multi_retrieval"} else []
    if "multi_retrieval" in tasks:
        _check_formats(needles)
    chains = {language: files.chains(CHAINS[language]) for language in languages if "multi_reasoning" in tasks}
    names = files.names(languages) if "ancestry" in tasks else {}
    return Source(haystacks, needles, chains, names, files.digest.hexdigest()[:16], files.origin)


class _Files:
    def __init__(self, folder: Path | None):
        self.folder = folder
        self.origin = f"Hub: {HUB}" if folder is None else "local files"
        self.digest = hashlib.sha256()

    def lines(self, name: str, parse: Any) -> list[Any]:
        found = []
        for number, line in enumerate(self._read(name).splitlines(), 1):
            if line.strip():
                found.append(self._parsed(parse, line, f"line {number} of {name}"))
        return found

    def chains(self, name: str) -> list[Chain]:
        return self._parsed(_chains, self._read(name), name)

    def names(self, languages: Iterable[Language]) -> dict[Language, list[str]]:
        spelled = {language: name for name, language in LANGUAGES.items()}
        text = self._read(NAMES)
        return {
            language: self._parsed(lambda text, key=spelled[language]: json.loads(text)[key].split(","), text, NAMES)
            for language in languages
        }

    def _parsed(self, parse: Any, text: str, where: str) -> Any:
        try:
            return parse(text)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{where} in {self._place()} is not in NeedleBench's form; restore the file") from None

    def _read(self, name: str) -> str:
        path = self._hub_file(name) if self.folder is None else self.folder / name
        try:
            content = path.read_bytes()
            self.digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
            return content.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(f"cannot read {path} ({reason}); give a folder with {HUB}'s files as --data-dir") from None

    def _hub_file(self, name: str) -> Path:
        try:
            from huggingface_hub import hf_hub_download

            quiet_hub()
            return Path(hf_hub_download(HUB, name, repo_type="dataset"))
        except Exception as error:
            raise UserError(
                f"{name} is not local and the Hub does not give {HUB}; set RODIMUS_LAB_DATA to a folder that holds "
                "needlebench, or give --data-dir"
            ) from error

    def _place(self) -> str:
        return str(self.folder or HUB)


def _check_formats(needles: Iterable[Needle]) -> None:
    for needle in needles:
        if needle.question.count("'") < 2:
            raise UserError(
                f"the question {needle.question!r} of {NEEDLES} has no format of its answer in single quotes, which "
                "multi_retrieval joins; add it, or leave that task out"
            )


def _document(line: str) -> str:
    text = json.loads(line)["text"]
    if not isinstance(text, str):
        raise TypeError
    return text


def _needle(line: str) -> Needle:
    value = json.loads(line)
    texts = [value[key] for key in ("needle", "retrieval_question", "arg2", "arg1")]
    if not all(isinstance(text, str) for text in texts) or not texts[2]:
        raise TypeError
    return Needle(LANGUAGES[value["language"]], *texts)


def _chains(text: str) -> list[Chain]:
    values = json.loads(text)
    if not isinstance(values, list):
        raise TypeError
    return [_chain(value) for value in values]


def _chain(value: Mapping[str, Any]) -> Chain:
    chain = Chain(value["derivation_count"], tuple(value["derivations"]), value["question"], value["answer"])
    if not isinstance(chain.size, int) or not isinstance(value["derivations"], list):
        raise TypeError
    if not chain.answer.split() or not all(isinstance(text, str) for text in (*chain.needles, chain.question)):
        raise TypeError
    return chain
