"""What the paper trains with, whatever the model: Tables 5 and 8, and their kin at smaller budgets."""

from __future__ import annotations

from typing import Any, NamedTuple

from rodimus_lab.errors import UserError
from rodimus_lab.experiment import BudgetName, shrink
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.recipe import BudgetConfig, DataConfig, OptimizerConfig, Recipe, ScheduleConfig

SHORT_SHARE = 0.06
SMOKE = BudgetConfig(name="smoke", steps=300, batch_size=8, eval_every=100)
SMOKE_SCHEDULE = ScheduleConfig(warmup_steps=30, min_lr=1e-4)
SMOKE_DATA = DataConfig(corpus="pydoc", tokenizer="pydoc-4096", seq_len=256)
SMOKE_LR = 3e-3


class Training(NamedTuple):
    """All of a recipe but its model, its seed and its name."""

    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    budget: BudgetConfig
    precision: str

    def recipe(self, experiment: str, label: str, model: LanguageModelConfig, seed: int = 0) -> Recipe:
        """The recipe of a model trained so."""
        values: dict[str, Any] = self._asdict()
        return Recipe(experiment=experiment, label=label, model=model, seed=seed, **values)


class Setting(NamedTuple):
    """One of the paper's: `steps` of `batch_size` sequences of `seq_len` tokens, `warmup_steps` of them of linear
    warm-up to `peak_lr`. AdamW's other settings are the same in all."""

    corpus: str
    tokenizer: str
    seq_len: int
    batch_size: int
    steps: int
    warmup_steps: int
    peak_lr: float

    def at(self, budget: BudgetName, *, corpus: str | None = None, steps: int | None = None) -> Training:
        """The setting at a budget, on its own corpus unless another stands in.

        Fewer `steps` than the paper's are a short run, whose schedule shrinks with it; without `steps`, short is 6 % of
        the paper's. The smoke budget has data, rates and steps of its own. Raises `UserError` for more steps than the
        paper's.
        """
        if budget == "smoke":
            data = SMOKE_DATA if corpus is None else SMOKE_DATA.replace(corpus=corpus)
            spent, schedule = SMOKE, SMOKE_SCHEDULE
            if steps is not None and steps != SMOKE.steps:
                spent, schedule = shrink(SMOKE, SMOKE_SCHEDULE, steps)
                spent = spent.replace(name="smoke")
            return Training(data, OptimizerConfig(lr=SMOKE_LR), schedule, spent, "fp32")
        if steps is None:
            steps = round(SHORT_SHARE * self.steps) if budget == "short" else self.steps
        if steps > self.steps:
            raise UserError(f"--steps: {steps:,} is more than the paper's {self.steps:,}; give at most these")
        spent = BudgetConfig(name="paper", steps=self.steps, batch_size=self.batch_size, paper_steps=self.steps)
        schedule = ScheduleConfig(warmup_steps=self.warmup_steps)
        if steps < self.steps:
            spent, schedule = shrink(spent, schedule, steps)
        data = DataConfig(corpus=corpus or self.corpus, tokenizer=self.tokenizer, seq_len=self.seq_len)
        return Training(data, OptimizerConfig(lr=self.peak_lr), schedule, spent, "bf16")


def _scaling(steps: int, peak_lr: float) -> Setting:
    # Table 8 has no warm-up: a tenth of the steps, as the authors of Mamba, whose settings these are, say of theirs.
    return Setting("pile", "gpt-neox", 2048, 256, steps, steps // 10, peak_lr)


# Table 5's two columns, then Table 8's rows by size.
SETTINGS = {
    "wikitext-103": Setting("wikitext-103", "gpt2", 512, 256, 25_000, 2_000, 5e-4),
    "pile-7b": Setting("pile", "gpt-neox", 2048, 256, 13_351, 572, 5e-4),
    "125m": _scaling(4_800, 6e-4),
    "350m": _scaling(13_500, 3e-4),
    "760m": _scaling(29_000, 2.5e-4),
    "1.3b": _scaling(50_000, 2e-4),
}
