"""`rodimus-lab eval`: models on downstream, recall and coding tasks, through lm-eval."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from evals.open_models import OPEN_MODELS
from rodimus_lab.command import command, require_packages
from rodimus_lab.errors import UserError
from rodimus_lab.records import load_records
from rodimus_lab.report import overlaps


def require_lm_eval() -> None:
    """Raise `UserError` where lm-eval or what it needs for transformers' models is not installed."""
    require_packages("eval", "lm_eval", "accelerate", "transformers")


@command("eval", panel="Evaluation")
def evaluate_models(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Run ids, checkpoint directories, or names of the Hub.", show_default=False),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="downstream (Tables 2 and 10), recall (Table 11), coder and coder-chat (Tables 21 and 22), or "
            "lm-eval's tasks, with commas between."
        ),
    ] = "downstream",
    open_models: Annotated[bool, typer.Option("--open-models", help="The open models of Table 2 as well.")] = False,
    fresh_weights: Annotated[
        bool,
        typer.Option("--fresh-weights", help="Beside each of our models the same one untrained: what chance scores."),
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Read the test items from files in this folder. Default: from the Hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task: for trying.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Default: 32 for runs; on the Hub 8, and 1 for recurrent models.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="The most tokens a model is given. Default: 2,048 for runs, else its own.")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Default: cuda where there is one.")] = None,
    recall_context: Annotated[int, typer.Option(min=51, help="Tokens of a recall prompt; upstream has 1,000.")] = 1024,
    recall_generation: Annotated[int, typer.Option(min=1, help="Tokens of a recall answer; upstream has 48.")] = 512,
    recall_whitespace: Annotated[
        Literal["strip", "keep"], typer.Option(help="Around recall prompts and answers; keep is the old behaviour.")
    ] = "strip",
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. Default: the paper's, else lm-eval's.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the chat format, as the suite coder-chat does.")] = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that models write, in a sandbox.")
    ] = False,
    code_samples: Annotated[
        int | None, typer.Option(min=1, help="Programs drawn for each problem. Default: lm-eval's, mostly 1, greedy.")
    ] = None,
    code_temperature: Annotated[float, typer.Option(min=0.01, help="Of several samples.")] = 0.2,
    code_seconds: Annotated[int, typer.Option(min=1, help="The most that a program may take.")] = 10,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a model of the Hub bring its own code.")
    ] = False,
) -> None:
    """Score models on downstream, recall or coding tasks; a task that is finished is skipped."""
    require_lm_eval()
    from evals.lmeval.code import CodeConfig
    from evals.lmeval.evaluation import evaluate
    from evals.lmeval.recall import RecallConfig
    from evals.lmeval.subject import LoadOptions, find_subject
    from evals.lmeval.tasks import Tasks

    names = [*(models or []), *(model.hub for model in OPEN_MODELS if open_models)]
    if not names:
        raise UserError("no model is named; give a run id, a folder or a name of the Hub, or --open-models")
    recall = RecallConfig(context=recall_context, generation=recall_generation, whitespace=recall_whitespace)
    code = CodeConfig(samples=code_samples, temperature=code_temperature, seconds=code_seconds)
    tasks = Tasks(suite, data_dir, recall, code=code, allow_code=allow_code_execution, shots=shots, chat=chat)
    options = LoadOptions(device, dtype, batch_size, max_length, trust_remote_code)
    failed = 0
    asked = [(name, fresh) for name in names for fresh in ((False, True) if fresh_weights else (False,))]
    for name, fresh in asked:
        try:
            run = evaluate(find_subject(name, options, fresh=fresh), tasks, options, limit)
            said = f"{name}{', untrained' if fresh else ''}"
            print(f"{said}: kept as {run.experiment}/{run.id}; rodimus-lab report rebuilds the tables")
            for warning in overlaps(
                record for record in load_records(experiment=run.experiment) if record.id == run.id
            ):
                print(warning)
        except UserError as error:
            if len(asked) == 1:
                raise
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of {len(asked)} models could not be evaluated, as said above")
