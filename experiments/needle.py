"""Teaching a small model to find a needle: NeedleBench's single-needle retrieval at a context of 2k, learned.

The paper's models score on NeedleBench after a trillion tokens; a small one trained on plain text does not. This trains
it on documents of that form (`rodimus_lab/data/needle.py`) with needles of our own, none of them NeedleBench's. Test
accuracy is the share of held-out needles whose whole answer is the likeliest; `rodimus-lab needlebench RUN` then tells
what of it carries over to NeedleBench itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated

from pydantic import Field

from evals.needlebench.prompts import DOCUMENT, END, INTRODUCTION, QUESTION, guided
from rodimus_lab.data import padded_vocab_size
from rodimus_lab.data.needle import NeedleConfig, Relation
from rodimus_lab.experiment import BudgetName, choose_budget, experiment, report
from rodimus_lab.nn.zoo import SIZES, model_config, slug
from rodimus_lab.recipe import BudgetConfig, OptimizerConfig, Recipe, ScheduleConfig
from rodimus_lab.records import Record
from rodimus_lab.report import Metric, PaperResults, Table, paper_vs_measured

CONTEXT = 2048
SMOKE_CONTEXT = 48
STEPS, SMOKE_STEPS = 4000, 256
WORDS = 3  # of a key or a value, at most
# Most words of a sentence are drawn anew for each document, so that there is no sentence to learn: only that the answer
# has the form that is asked for, and goes on as the sentence that shares its words.
HEADS = (
    "The {word1}",
    "The {word1} {word2}",
    "The {word1} {word2} {word3}",
    "Every {word1} {word2}",
    "The {word1} and the {word2}",
)
PLACES = (
    "of {key}",
    "in {key}",
    "near the {key} {word4}",
    "of the {key} {word4} {word5}",
    "that {key} {word4}",
    "for the {word4} and {key}",
    "{word4} {word5} {key}",
    "{word4} {word5} {word6} {key} {word7}",
)
LINKS = ("is", "is the", "was", "was the", "belongs to")
ASKED = ("What {link} {said} {place}?", "{Place}, what {link} {said}?", "Which {word1} {place} {link} it?")


def relations() -> tuple[Relation, ...]:
    """As NeedleBench asks: the question, the hint to think first, and the sentence to fill in.

    The hidden sentence is in turn as in the answer; with its parts in another order; with "the" where the sentence to
    fill in leaves it out; and in another order without all of the words that are asked for.
    """
    made = []
    for number, (head, place, link) in enumerate(product(HEADS, PLACES, LINKS)):
        said, Place = head[0].lower() + head[1:], place[0].upper() + place[1:]
        verb = link.removesuffix(" the")
        answer = needle = f"{head} {place} {link} {{value}}."
        gap = answer.replace(" {value}", "________")
        if number % 4 == 1:
            needle = f"{Place} {said} {link} {{value}}."
        elif number % 4 == 2:
            answer = needle = f"{head} {place} {verb} the {{value}}."
            gap = f"{head} {place} {verb}________."
        elif number % 4 == 3:
            needle = f"{Place} {link} {{word1}} {{value}}."
        question = ASKED[number % 3].format_map(
            {"link": verb, "said": said, "place": place, "Place": Place, "word1": "{word1}"}
        )
        asked = guided(f"{question} Please answer in the format '{gap}'", "en")
        made.append(Relation(needle=needle, question=QUESTION["en"] + asked + END, answer=answer))
    return tuple(made)


# Words of the documentation, keys common in it and values rare: most are one token each.
SHORT_KEYS = (
    "time", "size", "name", "path", "line", "file", "type", "code", "list", "set", "class", "text", "string", "number",
    "value", "error",
)  # fmt: skip
SHORT_VALUES = ("again", "better", "double", "short", "page", "later", "free", "kind")
SHORT_FORM = Relation(needle="The word of {key} is {value}.", question="The word of {key} is", answer=" {value}.")


@experiment("needle", reports=("needle",))
def needle(
    model: str = "rodimus",
    budget: BudgetName | None = None,
    corpus: str | None = None,
    steps: Annotated[int | None, Field(ge=1)] = None,
    answers_only: bool | None = None,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Sequence[Recipe]:
    """Teach one model to find a needle in a context of 2k tokens.

    The paper has no such run. The smoke budget trains on a short form of 48 tokens over the documentation that Python
    carries.
    """
    name, _ = choose_budget(budget)
    small = name == "smoke"
    if small:
        data = NeedleConfig(
            corpus=corpus or "pydoc",
            tokenizer="pydoc-4096",
            seq_len=SMOKE_CONTEXT,
            shortest=24,
            before="",
            after="\n",
            relations=(SHORT_FORM,),
            keys=SHORT_KEYS,
            values=(SHORT_VALUES,),
            hold_out="pair",
            answers_only=answers_only is not False,
        )
    else:
        data = NeedleConfig(
            corpus=corpus or "wikitext-103",
            tokenizer="gpt2",
            seq_len=CONTEXT,
            shortest=288,
            before=INTRODUCTION["en"] + DOCUMENT["en"],
            after="",
            relations=relations(),
            keys=WORDS,
            values=WORDS,
            answers_only=bool(answers_only),
        )
    size = SIZES["mqar" if small else "wikitext103"]._replace(context=data.seq_len)
    steps = steps or (SMOKE_STEPS if small else STEPS)
    return [
        Recipe(
            experiment="needle",
            label=slug(model),
            model=model_config(model, size=size, vocab_size=padded_vocab_size(data.tokenizer)),
            data=data,
            optimizer=OptimizerConfig(lr=2e-2 if small else 1e-3),
            schedule=ScheduleConfig(warmup_steps=min(steps - 1, steps // 20), min_lr=1e-4),
            budget=BudgetConfig(
                name="smoke" if small else "short",
                steps=steps,
                batch_size=24 if small else 32,
                eval_every=max(1, steps // 4 if small else steps // 8),
            ),
            precision="fp32" if small else "bf16",
            seed=seed,
        )
    ]


@report("needle", experiments=("needle",))
def needle_table(records: Sequence[Record], paper: PaperResults) -> Table:
    """How many held-out needles each model finds in its training context."""
    return paper_vs_measured(
        [],
        records,
        title="Needles found after training on such documents",
        metrics=(
            Metric("Params (M)", "params", None, better=None, scale=1e-6),
            Metric("Test accuracy (%)", "test_accuracy", None, "higher", scale=100),
            Metric("Test PPL of the answer", "test_ppl", None),
        ),
        caption="Accuracy is the share of held-out needles whose whole answer is the likeliest, token by token.",
        notes=["The paper has no such run."],
    )
