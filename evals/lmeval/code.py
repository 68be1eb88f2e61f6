"""lm-eval's tasks that run what a model wrote, made to run it in the sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Annotated, Any

from lm_eval.filters import build_filter_ensemble
from pydantic import Field

from evals.execution.pass_at_k import CodeEval, confined
from evals.execution.sandbox import Limits
from rodimus_lab.config import Config
from rodimus_lab.errors import UserError

# Of lm-eval's own tasks in this project's suites, those of these folders run code.
CODE_FOLDERS = {"humaneval", "mbpp", "cruxeval"}
TOP_P = 0.95
FENCE = "```"


class CodeConfig(Config):
    """How code is asked for and run: one greedy sample a problem, or several at a temperature, and each one's limits:
    seconds, and MiB of memory for each process."""

    samples: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 0.2
    seconds: Annotated[int, Field(ge=1)] = 10
    memory_mib: Annotated[int, Field(ge=64)] = 1024

    @property
    def limits(self) -> Limits:
        return Limits(seconds=self.seconds, memory=self.memory_mib << 20)


class CodeRunner:
    """Whether generated code may run, and how. Raises `UserError` where it may and cannot be shut off."""

    def __init__(self, allowed: bool, config: CodeConfig):
        self.config = config
        self.metric = CodeEval(config.limits) if allowed else None

    @property
    def isolation(self) -> str | None:
        return None if self.metric is None else self.metric.isolation

    def require(self, name: str) -> None:
        """Raise `UserError` where code may not run."""
        if self.metric is None:
            raise UserError(
                f"code that the model writes would be run ({name}); give --allow-code-execution to run it in a sandbox"
            )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Tasks that are read within have their programs run in the sandbox."""
        if self.metric is None:
            yield
        else:
            with confined(self.metric):
                yield

    def confine(self, task: Any) -> None:
        """Hold a task that runs code to the sandbox and to the number of samples. Raises `UserError` for one that runs
        it in a way of its own."""
        if not getattr(task, "UNSAFE_CODE", False):
            return
        name = task.config.task
        self.require(name)
        assert self.metric is not None
        for function in task._metric_fn_list.values():
            _confine_function(name, function, self.metric)
        if self.config.samples is not None:
            sampled = {"do_sample": True, "temperature": self.config.temperature, "top_p": TOP_P}
            how = sampled if self.config.samples > 1 else {"do_sample": False, "temperature": 0.0}
            task.set_config("repeats", self.config.samples)
            task.set_config("generation_kwargs", how, update=True)
            if not task.config.filter_list:  # Its filter would keep the first sample only.
                task._filters = [build_filter_ensemble("none", [("take_first_k", {"k": self.config.samples})])]


def unfenced(replies: Sequence[Sequence[str]], docs: Any) -> list[list[str]]:
    """The code of answers whose prompt has opened a fence: up to where it closes, or what an own fence holds.

    lm-eval 0.4.13 takes the first word of such an answer, `def`, for the name of a language and drops it.
    """
    return [[_unfenced(reply) for reply in of_doc] for of_doc in replies]


def _unfenced(reply: str) -> str:
    head, fence, rest = reply.partition(FENCE)
    if head.strip() or not fence:
        return head
    language, line_end, code = rest.partition("\n")
    return (code if line_end and language.strip().isalnum() else rest.removeprefix("\n")).partition(FENCE)[0]


def _confine_function(name: str, function: Any, metric: CodeEval) -> None:
    function = getattr(function, "__self__", function)  # lm-eval keeps the function's __call__.
    names = function.__globals__ if isinstance(function, FunctionType) else {}
    loaded = [key for key, value in names.items() if isinstance(value, CodeEval)]
    if loaded:
        names.update(dict.fromkeys(loaded, metric))  # lm-eval reads a task's functions once for all its tasks.
    elif not isinstance(names.get("check_correctness"), FunctionType):
        raise UserError(f"{name} runs generated code in a way of its own, which is not shut off; leave it out")
    else:
        names["check_correctness"] = _checked(metric)


def _checked(metric: CodeEval) -> Callable[..., bool]:
    def check_correctness(program: str, timeout: float | None = None) -> bool:
        scores, _ = metric.compute(references=[""], predictions=[[program]], k=[1])
        return scores["pass@1"] == 1

    return check_correctness
