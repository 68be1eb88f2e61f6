"""A small NeedleBench of made-up text, in memory and as files, and a tokenizer with one token a byte."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers as backends

from evals.needlebench.source import Chain, Needle, Source
from rodimus_lab.data import Tokenizer

EN_NEEDLES = [
    Needle(
        "en",
        f"The baker of {place} hid the {thing}.",
        f"What did the baker of {place} hide? Please answer in the format 'The baker of {place} hid the ________.'",
        thing,
        place,
    )
    for place, thing in (("Ulm", "brass key"), ("Bern", "blue map"), ("Oslo", "last coin"))
]
ZH_NEEDLES = [
    Needle(
        "zh",
        f"{place}的面包师藏了{thing}。",
        f"{place}的面包师藏了什么？请按照'面包师藏了________。'的格式回答。",
        thing,
        place,
    )
    for place, thing in (("乌尔姆", "铜钥匙"), ("伯尔尼", "蓝地图"), ("奥斯陆", "旧硬币"))
]
SOURCE = Source(
    haystacks={
        "en": [f"{word} rain falls on the roof. " * 40 for word in ("Soft", "Cold", "Late", "Warm")],
        "zh": [f"{word}雨落在屋顶上。" * 40 for word in ("春", "夏", "秋", "冬")],
    },
    needles=[*EN_NEEDLES, *ZH_NEEDLES],
    chains={
        language: [
            Chain(
                size, tuple(f"Step {step} of {size}." for step in range(1, size + 1)), "Where does it end?", "Far Away"
            )
            for size in (2, 3, 4, 5)
        ]
        for language in ("en", "zh")
    },
    names={"en": [f"Name{n} Smith" for n in range(8)], "zh": [f"名{n}" for n in range(8)]},
    digest="0" * 16,
    origin="made up",
)


def byte_tokenizer() -> Tokenizer:
    """A token a byte, so that a length in English is a number of characters."""
    alphabet = sorted(backends.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {letter: number for number, letter in enumerate(alphabet, 1)}
    backend = backends.Tokenizer(backends.models.BPE(vocabulary, []))
    backend.pre_tokenizer = backends.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = backends.decoders.ByteLevel()
    backend.add_special_tokens([backends.AddedToken("<|endoftext|>", normalized=False)])
    return Tokenizer("bytes", backend)


def write_files(folder: Path, source: Source = SOURCE) -> Path:
    """The source as NeedleBench's files."""
    folder.mkdir(parents=True, exist_ok=True)
    spelled = {"en": "English", "zh": "Chinese"}
    for language, name in (("en", "PaulGrahamEssays.jsonl"), ("zh", "zh_finance.jsonl")):
        write_lines(folder / name, [{"title": "", "text": text} for text in source.haystacks[language]])
        chains = [
            {
                "derivation_count": chain.size,
                "derivations": chain.needles,
                "question": chain.question,
                "answer": chain.answer,
            }
            for chain in source.chains[language]
        ]
        (folder / f"multi_needle_reasoning_{language}.json").write_text(json.dumps(chains))
    write_lines(
        folder / "needles.jsonl",
        [
            {
                "needle": needle.text,
                "retrieval_question": needle.question,
                "arg1": needle.subject,
                "arg2": needle.keyword,
                "language": spelled[needle.language],
            }
            for needle in source.needles
        ],
    )
    names = {spelled[language]: ",".join(names) for language, names in source.names.items()}
    (folder / "names.json").write_text(json.dumps(names))
    return folder


def write_lines(path: Path, values: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
