"""NeedleBench (Li et al. 2024), as OpenCompass had it in September 2024, without OpenCompass."""

from evals.needlebench.runner import evaluate
from evals.needlebench.scores import SUBTASKS, WEIGHTS, summarize
from evals.needlebench.source import Source, open_source
from evals.needlebench.spec import PRESETS, Cell, Spec

__all__ = ["PRESETS", "SUBTASKS", "WEIGHTS", "Cell", "Source", "Spec", "evaluate", "open_source", "summarize"]
