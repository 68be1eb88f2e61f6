"""Every benchmark of Tables 21 and 22: its shots and metric, and what it runs through, if anything.

The paper states the shots of C-Eval, CMMLU, MMLU, BBH, GSM8K and MATH, and no metric; those of the others, and the
metrics, are the benchmarks' own. It names CodeFuse-Evaluation as its harness, whose prompts are not reproduced here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Through = Literal["lm-eval", "OpenCompass", "nobody"]


class Benchmark(NamedTuple):
    """`name` and `table` as the paper prints them. `shots` None: the paper states none.

    `tasks` are lm-eval's, `measured` the metrics of their records, of which the score is the mean; `config` is
    OpenCompass's, under `opencompass.configs.datasets`. `note` says what differs, or why nobody packages it.
    """

    table: Literal[21, 22]
    category: Literal["coding", "general", "mathematics"]
    name: str
    shots: int | None
    metric: str
    through: Through
    tasks: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()
    config: str = ""
    note: str = ""


def _lm_eval(
    table: Literal[21, 22],
    category: Literal["coding", "general", "mathematics"],
    name: str,
    metric: str,
    *measured: str,
    shots: int | None = None,
    note: str = "",
) -> Benchmark:
    tasks = tuple(path.partition(".")[0] for path in measured)
    return Benchmark(table, category, name, shots, metric, "lm-eval", tasks, measured, note=note)


def _elsewhere(table: Literal[21, 22], name: str, config: str, note: str = "", metric: str = "pass@1") -> Benchmark:
    return Benchmark(table, "coding", name, None, metric, "OpenCompass", config=config, note=note)


def _nowhere(name: str, metric: str, note: str) -> Benchmark:
    return Benchmark(22, "coding", name, None, metric, "nobody", note=note)


CRUX = "the mean of input and output prediction, ten samples at temperature 0.2"
CEVAL = "on the validation questions; the answers to the test questions are not public"


def _knowledge(table: Literal[21, 22]) -> tuple[Benchmark, ...]:
    return (
        _lm_eval(table, "general", "C-EVAL", "accuracy", "ceval-valid.acc", shots=5, note=CEVAL),
        _lm_eval(table, "general", "CMMLU", "accuracy", "cmmlu.acc", shots=5),
        _lm_eval(table, "general", "MMLU", "accuracy", "mmlu.acc", shots=5),
        _lm_eval(
            table, "general", "BBH", "exact match", "bbh.exact_match.get-answer", shots=3, note="chain of thought"
        ),
        _lm_eval(
            table,
            "mathematics",
            "GSM8K",
            "exact match",
            "gsm8k_cot.exact_match.flexible-extract",
            shots=4,
            note="chain of thought; the last number counts",
        ),
        _lm_eval(
            table,
            "mathematics",
            "MATH",
            "exact match",
            "minerva_math.exact_match",
            shots=4,
            note="Minerva's four examples",
        ),
    )


BENCHMARKS: tuple[Benchmark, ...] = (
    _lm_eval(21, "coding", "HumanEval", "pass@1", "humaneval.pass@1.create_test"),
    _lm_eval(21, "coding", "HumanEval+", "pass@1", "humaneval_plus.pass@1.create_test"),
    _lm_eval(21, "coding", "MBPP", "pass@1", "mbpp.pass_at_1", note="3 shots, as lm-eval has it"),
    _lm_eval(21, "coding", "MBPP+", "pass@1", "mbpp_plus.pass_at_1", note="3 shots, as lm-eval has it"),
    _elsewhere(21, "BCB COMPLETION", "bigcodebench.bigcodebench_full_complete_gen"),
    _elsewhere(21, "MultiPL-E", "multipl_e.multiple_gen", "the paper does not say which languages"),
    _lm_eval(
        21, "coding", "CRUXEval", "pass@1", "cruxeval_input.pass@1.create_test", "cruxeval_output.pass@1.create_test",
        note=CRUX,
    ),
    *_knowledge(21),
    _lm_eval(22, "coding", "HumanEval", "pass@1", "humaneval_instruct.pass@1.create_test"),
    _lm_eval(22, "coding", "HumanEval+", "pass@1", "humaneval_plus_instruct.pass@1.create_test"),
    _lm_eval(22, "coding", "MBPP", "pass@1", "mbpp_instruct.pass_at_1.extract_code", note="3 shots, as lm-eval has it"),
    _lm_eval(22, "coding", "MBPP+", "pass@1", "mbpp_plus_instruct.pass_at_1.extract_code"),
    _elsewhere(
        22, "LCB (24.08-24.11)", "livecodebench.livecodebench_time_split_gen_a4f90b", "with its dates set so"
    ),
    _elsewhere(22, "BCB INSTRUCT", "bigcodebench.bigcodebench_full_instruct_gen"),
    _elsewhere(22, "HumanEval-Mul", "humaneval_multi.humaneval_multi_gen", "the paper does not say which languages"),
    _elsewhere(22, "MBPP-Mul", "multipl_e.multiple_gen", "MBPP's half of it; the paper does not say which languages"),
    _nowhere("MBXP-EN", "pass@1", "MBXP's tests need a toolchain of each language; CodeFuse-Evaluation has them"),
    _nowhere("MBXP-CN", "pass@1", "a translation of MBXP that is in CodeFuse-Evaluation only"),
    _lm_eval(
        22, "coding", "CRUXEval", "pass@1", "cruxeval_input.pass@1.create_test", "cruxeval_output.pass@1.create_test",
        note=CRUX,
    ),
    _nowhere("HumanEvalFix", "pass@1", "OctoPack's task, which bigcode-evaluation-harness has"),
    _nowhere("Spider", "execution accuracy", "it needs Spider's databases and its own evaluation script"),
    *_knowledge(22),
)  # fmt: skip
SHOTS = {task: benchmark.shots for benchmark in BENCHMARKS for task in benchmark.tasks if benchmark.shots is not None}


def coder_tasks(table: Literal[21, 22]) -> tuple[str, ...]:
    """lm-eval's tasks of a table, in its order."""
    return tuple(task for benchmark in BENCHMARKS if benchmark.table == table for task in benchmark.tasks)
