"""Teaching a small model to find a needle: NeedleBench's single-needle retrieval at a context of 2k, learned.

The paper's models score on NeedleBench after a trillion tokens; a small one trained on plain text does not. This trains
it on documents of that form (`rodimus_lab/data/needle.py`) with needles of our own, none of them NeedleBench's. Test
accuracy is the share of held-out needles whose whole answer is the likeliest; `rodimus-lab needlebench RUN` then tells
what of it carries over to NeedleBench itself.
"""

from __future__ import annotations

from collections.abc import Sequence
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
PLACES = (
    "Lisbon", "Prague", "Dublin", "Geneva", "Naples", "Vienna", "Madrid", "Boston", "Athens", "Warsaw", "Lima", "Cairo",
    "Quebec", "Nairobi", "Seoul", "Havana", "Tallinn", "Bergen", "Porto", "Krakow", "Salta", "Perth", "Osaka", "Malta",
)  # fmt: skip
MANNERS = (
    "Silent", "Golden", "Broken", "Gentle", "Hidden", "Frozen", "Crimson", "Ancient", "Hollow", "Velvet", "Distant",
    "Eager", "Marble", "Northern", "Painted", "Quiet", "Rusty", "Scarlet", "Tender", "Upper", "Violet", "Wooden",
    "Yellow", "Bitter",
)  # fmt: skip
THINGS = (
    "River", "Garden", "Mirror", "Castle", "Lantern", "Harbor", "Feather", "Compass", "Window", "Forest", "Needle",
    "Bridge", "Candle", "Desert", "Engine", "Falcon", "Hammer", "Island", "Jacket", "Kettle", "Ladder", "Meadow",
    "Orchard", "Pillow",
)  # fmt: skip
ENDS = ("Society", "Club", "Company", "Circle", "Union", "League", "Guild", "Order")
# What was said of a place, and the words that the question and the answer say it in.
SAID = (
    ("The oldest choir to sing in {key} was the {value}.", "Which choir was the oldest to sing in {key}?"),
    ("The best remembered team of {key} is the {value}.", "Which team of {key} is the best remembered?"),
    ("The only library in {key} belongs to the {value}.", "To whom does the only library in {key} belong?"),
    ("The tallest tower in {key} was built by the {value}.", "Who built the tallest tower in {key}?"),
    ("The yearly feast of {key} is held by the {value}.", "Who holds the yearly feast of {key}?"),
    ("The first train to {key} was paid for by the {value}.", "Who paid for the first train to {key}?"),
    ("The night market of {key} was opened by the {value}.", "Who opened the night market of {key}?"),
    ("The last letter from {key} was sent to the {value}.", "Who was sent the last letter from {key}?"),
)


def relations() -> tuple[Relation, ...]:
    """As NeedleBench asks: the question, the hint to think first, and the sentence to fill in."""
    made = []
    for needle, question in SAID:
        gap = needle.replace(" {value}", "________")
        asked = guided(f"{question} Please answer in the format '{gap}'", "en")
        made.append(Relation(needle=needle, question=QUESTION["en"] + asked + END, answer=needle))
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
            shortest=192,
            before=INTRODUCTION["en"] + DOCUMENT["en"],
            after="",
            relations=relations(),
            keys=PLACES,
            values=(MANNERS, THINGS, ENDS),
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
