"""Tasks that run what a model wrote: lm-eval's own, their programs in the sandbox, scored by the unbiased estimator."""

from __future__ import annotations

import gzip
import json
from itertools import combinations

import pytest

from evals.coder import BENCHMARKS, SHOTS, coder_tasks
from evals.execution.pass_at_k import CodeEval, confined, pass_at_k
from rodimus_lab.convert import Chat
from rodimus_lab.errors import UserError
from rodimus_lab.records import load_records
from rodimus_lab.report import PaperResults

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")

from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from evals.lmeval.code import CodeConfig, unfenced
from evals.lmeval.tasks import SUITES, Tasks

ADD = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}
DOUBLE = ADD | {
    "task_id": "HumanEval/1",
    "prompt": "def double(a):\n",
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
SUM = {
    "task_id": 11,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


class Scripted(LM):
    """Says the next of its answers to each request, and keeps what it was asked."""

    def __init__(self, *answers):
        super().__init__()
        self.answers, self.asked = list(answers), []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [self.answers.pop(0) for _ in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def folder(tmp_path):
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, [ADD, DOUBLE])))
    rows = [SUM | {"task_id": number} for number in (10, 11, 510, 511)]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps({"question": "How many?", "answer": "#### 3"}))
    return tmp_path


def scores(model, task, folder, **options):
    tasks = Tasks(task, folder, allow_code=True, **options)
    given = simple_evaluate(
        model=model, tasks=tasks.load(task, model), task_manager=tasks.manager, confirm_run_unsafe_code=True
    )
    return given["results"][task]


@pytest.mark.parametrize(
    ("samples", "passed", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (10, 9, 5), (1, 1, 1)]
)
def test_pass_at_k_is_the_share_of_draws_with_one_that_passes(samples, passed, k):
    draws = list(combinations([True] * passed + [False] * (samples - passed), k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("impossible", [(3, 4, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1)])
def test_pass_at_k_of_too_few(impossible):
    with pytest.raises(ValueError, match=r"cannot be had"):
        pass_at_k(*impossible)


def test_the_metric_in_the_form_of_code_eval():
    given, verdicts = CodeEval().compute(
        references=["assert f(1) == 2", "assert f(1) == 3"],
        predictions=[
            ["f = lambda x: x + 1", "f = lambda x: x"],
            ["f = lambda x: x + 1", "import nothing_of_this_name"],
        ],
        k=[1, 2, 3],
    )
    assert given == {"pass@1": 0.25, "pass@2": 0.5}
    assert verdicts[0][0] == (0, {"passed": True, "result": "passed"})
    assert verdicts[1][1][1]["result"].startswith("ModuleNotFoundError")


def test_other_metrics_are_loaded_as_ever(monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda path, *_: path)
    metric = CodeEval()
    with confined(metric):
        assert evaluate.load("code_eval") is metric
        assert evaluate.load("rouge") == "rouge"
    assert evaluate.load("code_eval") == "code_eval"


class TestTasks:
    def test_human_eval(self, folder):
        model = Scripted("    return a + b\n", "    return a\n")
        assert scores(model, "humaneval", folder)["pass@1,create_test"] == 0.5
        (prompt, how), _ = model.asked
        assert prompt == ADD["prompt"]
        assert how["max_gen_toks"] == 1024
        assert not how["do_sample"]

    def test_several_samples(self, folder):
        """Two of four of one problem and none of the other: 0.5 and 0, at any number of samples."""
        answers = ["    return a + b\n", "    return a\n"] * 2 + ["    return 1\n"] * 4
        model = Scripted(*answers)
        given = scores(model, "humaneval", folder, code=CodeConfig(samples=4, temperature=0.7))
        assert given["pass@1,create_test"] == 0.25
        assert len(model.asked) == 8
        assert model.asked[0][1]["temperature"] == 0.7
        assert model.asked[0][1]["do_sample"]

    def test_mbpp(self, folder):
        """Problems 11 to 510 of the file; three examples before each; every sample counts."""
        right, wrong = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a\n"
        model = Scripted(right, wrong)
        assert scores(model, "mbpp", folder)["pass_at_1,none"] == 0.5
        assert model.asked[0][0].count("[BEGIN]") == 4
        sampled = Scripted(right, wrong, wrong, wrong, right, wrong, wrong, wrong)
        assert scores(sampled, "mbpp", folder, code=CodeConfig(samples=4))["pass_at_1,none"] == 0.25

    def test_code_in_fences(self, folder):
        model = Scripted("def add(a, b):\n    return a + b\n```\nDone.", "nothing")
        assert scores(model, "mbpp_instruct", folder)["pass_at_1,extract_code"] == 0.5

    def test_the_papers_shots_unless_others_are_asked_for(self, folder):
        for shots, count in ((None, 4), (2, 2)):
            model = Scripted("The answer is 3.")
            tasks = Tasks("gsm8k_cot", folder, shots=shots)
            given = simple_evaluate(model=model, tasks=tasks.load("gsm8k_cot", model), task_manager=tasks.manager)
            assert given["results"]["gsm8k_cot"]["exact_match,flexible-extract"] == 1
            assert model.asked[0][0].count("Q: ") == count + 1
            assert tasks.shots == {"gsm8k_cot": count}

    def test_code_that_ends_the_process_is_a_failure(self, folder):
        model = Scripted("    import os; os._exit(0)\n", "    import os, signal; os.kill(os.getppid(), 9)\n")
        assert scores(model, "humaneval", folder)["pass@1,create_test"] == 0

    def test_without_being_allowed(self, folder):
        with pytest.raises(UserError, match=r"--allow-code-execution"):
            Tasks("humaneval", folder)
        with pytest.raises(UserError, match=r"\(humaneval, mbpp\)"):
            Tasks("gsm8k_cot,humaneval,mbpp", folder)

    def test_a_task_with_a_way_of_its_own_to_run_code(self, folder):
        tasks = Tasks("humaneval", folder, allow_code=True)
        (task,) = tasks.load("humaneval", None)
        task._metric_fn_list = {"own": (lambda references, predictions: 1.0).__call__}
        with pytest.raises(UserError, match="humaneval runs generated code in a way of its own"):
            tasks.runner.confine(task)

    def test_cruxeval_runs_in_the_sandbox_as_well(self):
        """Its own runner is replaced, and found again by the function that scores."""
        from lm_eval.tasks.cruxeval import utils

        from evals.lmeval.code import _confine_function

        ran = []

        class Watched(CodeEval):
            def compute(self, **given):
                ran.extend(given["predictions"][0])
                return super().compute(**given)

        original = utils.check_correctness
        try:
            _confine_function("cruxeval_input", utils.pass_at_k.__call__, Watched())
            assert utils.pass_at_k([""], [["assert 1 == 1", "assert 1 == 2"]], k=[1]) == {"pass@1": 0.5}
        finally:
            utils.check_correctness = original
        assert ran == ["assert 1 == 1", "assert 1 == 2"]


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("def f():\n  return 1\n```\nThat is it.", "def f():\n  return 1\n"),
        ("def f(): pass", "def f(): pass"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("\n```\nx = 1\n```", "x = 1\n"),
        ("", ""),
    ],
)
def test_code_in_an_answer(reply, code):
    assert unfenced([[reply]], None) == [[code]]


class TestManifest:
    @pytest.mark.parametrize("table", [21, 22])
    def test_every_benchmark_of_the_paper_is_there(self, table):
        printed = {(row["benchmark"], row["category"]) for row in PaperResults().table(table)}
        ours = {(benchmark.name, benchmark.category) for benchmark in BENCHMARKS if benchmark.table == table}
        averages = {name for name, _ in printed - ours}
        assert ours <= printed
        assert averages == {"Coding Avg.", "General Avg.", "Mathematics Avg.", "Overall"}

    def test_each_says_what_it_runs_through(self):
        for benchmark in BENCHMARKS:
            assert bool(benchmark.tasks) == (benchmark.through == "lm-eval"), benchmark
            assert bool(benchmark.config) == (benchmark.through == "OpenCompass"), benchmark
            assert benchmark.note or benchmark.through != "nobody", benchmark
        assert SHOTS["mmlu"] == SHOTS["cmmlu"] == SHOTS["ceval-valid"] == 5
        assert (SHOTS["bbh"], SHOTS["gsm8k_cot"], SHOTS["minerva_math"]) == (3, 4, 4)

    def test_lm_eval_has_the_tasks_of_the_suites(self):
        """Read by their names, without their data."""
        tasks = Tasks("coder", allow_code=True)
        assert tasks.names == coder_tasks(21) == SUITES["coder"]
        assert not tasks.chat
        assert Tasks("coder-chat", allow_code=True).chat


def test_a_run_from_end_to_end(cli, smoke_run, folder):
    command = ("eval", smoke_run.id, "--suite", "humaneval,mbpp", "--limit", 1, "--data-dir", folder, "--device", "cpu")
    refused = cli(*command)
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "give --allow-code-execution" in refused.err
    result = cli(*command, "--allow-code-execution")
    assert result.code == 0, result.err
    (record,) = load_records(experiment="eval")
    assert record.metrics["humaneval.pass@1.create_test"] == record.metrics["mbpp.pass_at_1"] == 0
    assert record.metrics["humaneval.items"] == record.metrics["mbpp.items"] == 1
    assert record.recipe["code"] == {"samples": None, "temperature": 0.2, "seconds": 10, "memory_mib": 1024}
    assert record.env["isolation"] in ("namespaces", "hooks")
    assert cli("report", "table21").code == 0
    assert "HumanEval" in (smoke_run.root / "tables" / "table21.md").read_text()


def test_the_chat_format(smoke_run):
    from evals.lmeval.adapter import RodimusLabLM
    from rodimus_lab.convert import open_checkpoint

    model = RodimusLabLM(open_checkpoint(smoke_run.id), device="cpu")
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    whole = Chat([{"role": "HUMAN", "content": "Hi"}], "Be brief.").prompt
    assert model.apply_chat_template(said) == whole
    begun = [*said, {"role": "assistant", "content": "```python\n"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == whole + "```python\n"
    (end,) = [
        token["content"]
        for token in json.loads(model.vocabulary.to_json())["added_tokens"]
        if token["id"] == model.eot_token_id
    ]
    plain = model.tok_encode(f"a{end}")
    assert "ASSISTANT" in model.chat_template(True)
    assert model.eot_token_id in model.tok_encode(f"a{end}")
    assert model.eot_token_id not in plain
    with pytest.raises(UserError, match="unknown role 'tool'"):
        model.apply_chat_template([{"role": "tool", "content": "x"}])


def test_groups_are_averaged_over_all_items():
    """As lm-eval does: weighted by the number of items; the errors as those of independent means."""
    from evals.lmeval.evaluation import _flat

    results = {
        "mmlu_a": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "a"},
        "mmlu_b": {"acc,none": 0.9, "acc_stderr,none": 0.2, "alias": "b"},
    }
    given = {"results": results, "n-samples": {"mmlu_a": {"effective": 30}, "mmlu_b": {"effective": 10}}}
    flat = dict(_flat(given, "mmlu"))
    assert flat["acc"] == pytest.approx(0.6)
    assert flat["acc_stderr"] == pytest.approx(((30 * 0.1) ** 2 + (10 * 0.2) ** 2) ** 0.5 / 40)
    assert flat["mmlu_b.acc"] == 0.9
    assert flat["items"] == 40
