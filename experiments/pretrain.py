"""The three-stage pre-training of Appendix E.3, from which Rodimus+-Coder comes, over any corpora.

The paper states the stages' tokens (6 T, 1.5 T, 500 B) and of their mixtures: 20 % code in the first, 60 % code in the
second, more than 50 % synthetic data in the third. Ours to state: 60 % synthetic data in the third and the rest in two
halves, a cosine from 3e-4 over all stages, and 1,024 sequences of 4,096 tokens a step. Its corpora are not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rodimus_lab.data import padded_vocab_size
from rodimus_lab.data.mixture import MixtureConfig, StageConfig, mixed
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import BudgetName, choose_budget, experiment, report
from rodimus_lab.nn.zoo import SIZES, model_config, slug
from rodimus_lab.recipe import BudgetConfig, OptimizerConfig, Recipe, ScheduleConfig
from rodimus_lab.records import Record
from rodimus_lab.report import Metric, PaperResults, Table, paper_vs_measured

TOKENS = {"initial": 6_000_000_000_000, "coding": 1_500_000_000_000, "annealing": 500_000_000_000}
CODE = {"initial": 0.2, "coding": 0.6}
CONTEXT, BATCH = 4096, 1024
SMOKE_STEPS = 80
FEWEST_STEPS = 9  # Of fewer the last stage has none.
Part = Annotated[float, Field(ge=0, le=1)]


@experiment("pretrain", reports=("pretrain",))
def pretrain(
    model: str = "rodimus+",
    budget: BudgetName | None = None,
    language: str | None = None,
    code: str | None = None,
    synthetic: str | None = None,
    tokenizer: str | None = None,
    size: str = "1.6b",
    initial_code: Part = CODE["initial"],
    coding_code: Part = CODE["coding"],
    annealing_synthetic: Part = 0.6,
    steps: Annotated[int | None, Field(ge=FEWEST_STEPS)] = None,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Sequence[Recipe]:
    """Pre-train in three stages over a corpus of language, one of code and one of synthetic data.

    Each is a corpus by name or a folder of texts; the options of the stages are the shares of code and of synthetic
    data. The smoke budget trains a small model, on the documentation that Python carries for each that is not given.
    """
    name, _ = choose_budget(budget)
    small = name == "smoke"
    corpora = {"--language": language, "--code": code, "--synthetic": synthetic}
    if missing := [option for option, corpus in corpora.items() if corpus is None and not small]:
        raise UserError(f"the paper's corpora are not public; give {' and '.join(missing)}, a corpus or a folder each")
    wanted = SIZES[_known(size)]
    text, source, made = (corpus or "pydoc" for corpus in corpora.values())
    rest = (1 - annealing_synthetic) / 2
    mixtures = {
        "initial": mixed([(text, 1 - initial_code), (source, initial_code)]),
        "coding": mixed([(text, 1 - coding_code), (source, coding_code)]),
        "annealing": mixed([(made, annealing_synthetic), (text, rest), (source, rest)]),
    }
    total = sum(TOKENS.values())
    data = MixtureConfig(
        tokenizer=tokenizer or ("pydoc-4096" if small else "gpt-neox"),
        seq_len=128 if small else CONTEXT,
        stages=tuple(
            StageConfig(name=stage, share=tokens / total, weights=mixtures[stage]) for stage, tokens in TOKENS.items()
        ),
    )
    whole = round(total / (CONTEXT * BATCH))
    many = SMOKE_STEPS if small else whole if name == "paper" else round(0.001 * whole)
    many = steps or many
    if not small and many > whole:
        raise UserError(
            f"--steps: {many:,} is more than the {whole:,} that the paper's tokens come to; give at most these"
        )
    architecture = model_config(
        model,
        size=(SIZES["smoke"] if small else wanted)._replace(context=data.seq_len),
        vocab_size=padded_vocab_size(data.tokenizer),
    )
    return [
        Recipe(
            experiment="pretrain",
            label=slug(model),
            model=architecture,
            data=data,
            optimizer=OptimizerConfig(lr=3e-3 if small else 3e-4),
            schedule=ScheduleConfig(warmup_steps=min(2000, many // 20), min_lr=1e-5),
            budget=BudgetConfig(
                name="smoke" if small else "paper" if many == whole else "short",
                steps=many,
                batch_size=8 if small else BATCH,
                paper_steps=None if small else whole,
                eval_every=max(1, many // 4 if small else many // 100),
            ),
            precision="fp32" if small else "bf16",
            seed=seed,
        )
    ]


def _known(size: str) -> str:
    if size not in SIZES:
        raise UserError(f"--size: {size!r} is no size; choose among {', '.join(SIZES)}")
    return size


@report("pretrain", experiments=("pretrain",))
def pretrain_table(records: Sequence[Record], paper: PaperResults) -> Table:
    """Runs of the three-stage pre-training."""
    return paper_vs_measured(
        [],
        records,
        title="Three-stage pre-training (Appendix E.3)",
        metrics=(
            Metric("Params (M)", "params", None, better=None, scale=1e-6),
            Metric("Valid PPL", "valid_ppl", None),
            Metric("Test PPL", "test_ppl", None),
        ),
        caption="Perplexity is per token over the held-out splits of all corpora of the mixture together.",
        notes=["The paper prints no perplexity of these runs; its corpora are not public."],
    )
