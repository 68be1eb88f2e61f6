"""The command line. Every registered experiment is a command whose options are its function's."""

from __future__ import annotations

import errno
import inspect
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer

from rodimus_lab.bench import app as bench_app
from rodimus_lab.checkpoint_commands import DeviceName, chat, convert, generate
from rodimus_lab.command import COMMANDS
from rodimus_lab.config import did_you_mean
from rodimus_lab.data import describe, list_corpora, padded_vocab_size, prepare
from rodimus_lab.doctor import examine
from rodimus_lab.errors import RunsFailed, UserError
from rodimus_lab.experiment import EXPERIMENTS, Experiment, choose_budget
from rodimus_lab.nn.zoo import MODELS, SIZES, model_config
from rodimus_lab.plan import show_plan
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import load_records
from rodimus_lab.registry import load_plugins
from rodimus_lab.report_commands import figures, report, write_report
from rodimus_lab.runs_commands import app as runs_app
from rodimus_lab.terminal import console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Experiments and benchmarks around Rodimus*, and the efficient sequence models beside it.",
)
data_app = typer.Typer(no_args_is_help=True, help="Corpora, tokenizers and token shards.")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
CLICK_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
INTERRUPTED = 130
LATER_SECONDS = 2.0
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PlanAsJson = Annotated[bool, typer.Option("--json", help="List the runs as JSON; with --dry-run.")]


def main() -> None:
    """Run the command line; what a user can mend ends in one sentence and exit code 2."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # A terminal that cannot show a character is no reason to stop.
    try:
        code = commands()(prog_name="rodimus-lab", standalone_mode=False)
        if code == INTERRUPTED:  # Some versions of typer raise Abort instead.
            raise KeyboardInterrupt
    except UserError as error:
        _complain(f"error: {error}" if error.exit_code == 2 else str(error))
        code = error.exit_code
    except OSError as error:
        _complain(f"error: {_os_sentence(error)}")
        code = 2
    except CLICK_ERROR as error:
        if type(error).__name__ != "NoArgsIsHelpError":
            _complain(f"error: {_usage_sentence(error)}")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the same command goes on with what was finished", file=sys.stderr)
        code = INTERRUPTED
    code = code if isinstance(code, int) else 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from rodimus_lab.train.distributed import end_process

        end_process(code)
    sys.exit(code)


def _complain(sentence: str) -> None:
    """On standard error; later on ranks but 0: mostly all fail alike, and torchrun ends the others once one has."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(LATER_SECONDS)
    print(sentence, file=sys.stderr)


def _os_sentence(error: OSError) -> str:
    place = f"cannot use {error.filename}" if error.filename else "a file cannot be written or read"
    mend = "free the disk" if error.errno in NO_ROOM else "check that it is there and that you may use it"
    return f"{place} ({(error.strerror or str(error)).lower()}); {mend}"


def _usage_sentence(error: Any) -> str:
    """A complaint of the parser, with the names that would have been right and where to read more."""
    text = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
    text = text[0].lower() + text[1:]
    context = getattr(error, "ctx", None)
    if context is None:
        return text
    if text.startswith("no such command"):  # Some versions of click suggest one name themselves.
        text = text.split(". Did you mean")[0] + did_you_mean(text.split("'")[1], context.command.commands)
    return f"{text}; see {context.command_path} --help"


def _show_version(asked: bool) -> None:
    if asked:
        print(f"rodimus-lab {version('rodimus-lab')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


RUN_OPTIONS = (
    ("device", DeviceName | None, None, "Default: cuda where there is one."),
    ("micro_batch_size", int | None, None, "Sequences at a time. Default: as many as suit the device."),
    ("compile", bool | None, None, "Compile the model's blocks. Default: on CUDA only."),
    ("capture", bool | None, None, "Make micro-batches CUDA graphs. Default: for one process with CUDA."),
    ("recompute", bool, False, "Keep less for the backward pass and make it again: less memory, more time."),
    ("checkpoint_every", int, 1000, "Steps between checkpoints."),
    ("async_save", bool, False, "Go on training while a checkpoint is written."),
    ("replicas", int, 1, "With torchrun: groups of ranks that each hold the whole model (HSDP)."),
    ("sequence_parallel", int, 1, "With torchrun: ranks that share each sequence, for long ones."),
    ("tensorboard", bool, False, "Write TensorBoard event files beside the checkpoints."),
    ("resume", bool, True, "Go on from the last checkpoint of an unfinished run."),
    ("stop_at_step", int | None, None, "Stop at a step, with a checkpoint."),
    ("max_seconds", float | None, None, "Stop after so many seconds, with a checkpoint."),
)
SWEEP_OPTIONS = (
    ("jobs", int | None, None, "At most so many at once. Default: as many as there is room for."),
    ("runs_per_gpu", int | None, None, "Runs that share a GPU. Default: 1."),
    ("cpus_per_run", int | None, None, "Default: the cores divided among the runs; on a cluster 1."),
    ("retries", int, 2, "Attempts more for a run whose worker was lost or that broke."),
    ("ray_address", str | None, None, "A Ray cluster, HOST:PORT or auto. Default: this machine."),
    ("serial", bool, False, "One after another in this process, as without Ray."),
)
OPTION_HELP = {
    "budget": "The paper's; a stated fraction of its steps; or minutes on a CPU. "
    "Default: paper with a GPU, smoke without.",
    "corpus": "A corpus by name, or a file or folder of text; see rodimus-lab data list. "
    "Default: wikitext-103, or pydoc at the smoke budget.",
    "steps": "Train this many steps, warm-up and evaluations in proportion.",
    "dropout": "From 0 up to, but not with, 1.",
    "seed": "Of the weights and of the order of the data.",
    "figure": "The figure whose runs these are.",
    "length": "Tokens of an example. Default: every length of the figure.",
    "width": "The model's width d. Default: every width of the figure.",
    "expansion": "The state expansion n. Default: every one of the figure.",
    "lr": "The peak learning rate. Default: every one of the figure.",
    "precision": "Of matrix products.",
    "size": "A size of the table or of the ladder. Default: all of them.",
    "table": "The table whose sizes and settings these are, at the paper budget.",
    "packed": "Let each token see its own document only, not those before it in a block.",
    "ratio": "Tokens a parameter beside the embedding, at the short and smoke budgets. Default: 8 and 2.",
}


@cache
def commands() -> Any:
    """The whole command line: also a command of every registered experiment, and those that modules bring along."""
    load_plugins()
    for name in COMMANDS:
        app.command(name, rich_help_panel=COMMANDS[name].panel)(COMMANDS[name].run)
    for name in EXPERIMENTS:
        app.command(name, rich_help_panel="Experiments")(_command_of(EXPERIMENTS[name]))
    return typer.main.get_command(app)


def _command_of(experiment: Experiment) -> Callable[..., None]:
    """The CLI command of an experiment: its own options, then those of running anything."""
    own = experiment.options

    def command(**values: Any) -> None:
        dry_run, as_json = values.pop("dry_run"), values.pop("as_json")
        if as_json and not dry_run:
            raise UserError("--json lists the runs that would be trained; add --dry-run, or leave it out")
        chosen = {name: _listed(values.pop(name), own[name]) for name in own}
        if "budget" in chosen:
            budget, why = choose_budget(chosen["budget"][0])
            if not as_json:
                console.print(f"budget: {budget} ({why})")
            chosen["budget"] = [budget]
        combinations = [dict(zip(chosen, each, strict=True)) for each in product(*chosen.values())]
        recipes = [recipe for options in combinations for recipe in experiment.recipes(**options)]
        if dry_run:
            rounds: list[Sequence[Recipe]] = []
            experiment.run(recipes, rounds.append)
            listed = [recipe for some in rounds for recipe in some]
            later = len(listed) - len(rounds[0])
            show_plan(listed, load_records(), console, as_json=as_json, estimate=experiment.hours, later=later)
            return
        failures: list[str | None] = []
        experiment.run(recipes, lambda some: failures.append(run_all(some, values)))
        for name in experiment.reports:
            write_report(name, show=False)
        if failed := "\n".join(filter(None, failures)):
            raise RunsFailed(failed)

    parameters = []
    for name, parameter in own.items():
        annotation, default, text = _repeatable(parameter)
        text = text or (f"One of {', '.join(MODELS)}." if name == "model" else OPTION_HELP.get(name))
        parameters.append(_option(name, annotation, default, help=text))
    parameters.append(_option("dry_run", bool, False, help="List the runs with their ids, and train none."))
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("as_json", keyword, default=False, annotation=PlanAsJson))
    command.__doc__ = (
        f"{inspect.getdoc(experiment.function)}\n\n"
        "--model and the like may be given several times: a run of each value, side by side where there is room."
    )
    return _with_run_options(command, parameters)


def _repeatable(parameter: inspect.Parameter) -> tuple[Any, Any, str | None]:
    """An experiment's option as one that may be given several times, with its default and what it says of itself;
    flags, choices and lists stay."""
    plain, text = _plain(parameter)
    members = [member for member in get_args(plain) if member is not NoneType]
    kind = members[0] if NoneType in get_args(plain) and len(members) == 1 else plain
    if kind not in (str, int, float):
        return plain, parameter.default, text
    return list[kind] | None, None if parameter.default is None else [parameter.default], text  # type: ignore[valid-type]


def _plain(parameter: inspect.Parameter) -> tuple[Any, str | None]:
    """The annotation without what pydantic reads, and the description that is in it."""
    if get_origin(parameter.annotation) is not Annotated:
        return parameter.annotation, None
    plain, field = get_args(parameter.annotation)[:2]
    return plain, field.description


def _listed(value: Any, parameter: inspect.Parameter) -> list[Any]:
    """The values of an option, one a combination."""
    if isinstance(value, list) and _repeatable(parameter)[0] != _plain(parameter)[0]:
        return value or [parameter.default]
    return [parameter.default if value is None else value]


def _with_run_options(command: Callable[..., None], own: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """`command` with the parameters `own`, `RUN_OPTIONS` and `SWEEP_OPTIONS`, as typer reads them."""
    running = [
        _option(name, annotation, default, help=text, rich_help_panel=panel)
        for panel, options in (("Running", RUN_OPTIONS), ("Several runs", SWEEP_OPTIONS))
        for name, annotation, default, text in options
    ]
    signature = inspect.Signature([*own, *running])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    return command


def _option(name: str, annotation: Any, default: Any, **facts: Any) -> inspect.Parameter:
    # Without a --no- twin, which would say of an ablation that its subject is left out.
    names = ["--" + name.replace("_", "-")] if annotation is bool and default is False else []
    annotation = Annotated[annotation, typer.Option(*names, **facts)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def run_all(recipes: Sequence[Recipe], options: dict[str, Any]) -> str | None:
    """See `sweep/campaign.py`; `options` are `TrainOptions`' and `SweepOptions`'."""
    from rodimus_lab import sweep, train  # Slow to import, and few commands train.
    from rodimus_lab.sweep import campaign

    training = train.TrainOptions(**{name: options[name] for name, *_ in RUN_OPTIONS})
    spread = sweep.SweepOptions(**{name: options[name] for name, *_ in SWEEP_OPTIONS})
    return campaign.run_all(recipes, training, spread, console)


def _train(recipes: list[Path], **options: Any) -> None:
    """Train the recipes in files, such as finished runs' recipe.json."""
    if failed := run_all([Recipe.read(path) for path in recipes], options):
        raise RunsFailed(failed)


_argument = inspect.Parameter(
    "recipes",
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    annotation=Annotated[list[Path], typer.Argument(help="A recipe.json, or several.", show_default=False)],
)
app.command("train", rich_help_panel="Experiments")(_with_run_options(_train, [_argument]))


app.command(rich_help_panel="Results")(report)
app.command(rich_help_panel="Results")(figures)
app.add_typer(runs_app, name="runs", rich_help_panel="Results")


@app.command(rich_help_panel="Models")
def params(
    name: Annotated[str, typer.Argument(help="A model, such as rodimus.")],
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "wikitext103",
    vocab_size: Annotated[int | None, typer.Option(help="Default: the size's own.", min=2)] = None,
    as_json: AsJson = False,
) -> None:
    """Count a model's parameters, FLOPs and state without building it."""
    import torch

    config = model_config(name, size=size, vocab_size=vocab_size)
    context = SIZES[size].context
    sublayers: dict[str, int] = {}
    for block in config.blocks:
        for sublayer in block.sublayers:
            sublayers[sublayer.kind] = sublayers.get(sublayer.kind, 0) + sublayer.num_params(config.d_model)
    total = config.num_params()
    embedding = config.vocab_size * config.d_model
    facts = {
        "model": MODELS.canonical(name),
        "size": size,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "blocks": len(config.blocks),
        "params": total,
        "params_embedding": embedding,
        "params_by_sublayer": sublayers,
        "params_other": total - embedding - sum(sublayers.values()),
        "context": context,
        "flops_per_token": config.flops_per_token(context),
        "state_bytes_bf16": config.state_bytes(1, context, torch.bfloat16),
    }
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    console.print(f"{facts['model']} at {size}: {total:,} parameters")
    for kind, count in {"embedding": embedding, **sublayers, "norms and the rest": facts["params_other"]}.items():
        console.print(f"  {kind:<20}{count:>16,}")
    console.print(
        f"  {facts['flops_per_token']:,} forward FLOPs a token and {facts['state_bytes_bf16']:,} bytes of bf16 state "
        f"after {context:,} tokens",
    )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, which devices there are, and which backend each operator would choose and why."""
    facts = examine()
    if as_json:
        print(json.dumps([fact._asdict() for fact in facts], indent=1))
        return
    for fact in facts:
        console.print(f"{fact.topic:<14}{fact.name:<26}{fact.value}")


for command in (generate, chat, convert):
    app.command(rich_help_panel="Models")(command)


@data_app.command("list")
def data_list() -> None:
    """Name the corpora and say where each comes from."""
    for name in list_corpora():
        facts = describe(name)
        for source in dict.fromkeys(split["source"] for split in facts["splits"].values()):
            console.print(f"{name:<14}{source}")
            name = ""
        console.print(f"{'':<14}{facts['note']}")


@data_app.command("prepare")
def data_prepare(
    corpus: Annotated[str, typer.Argument(help="A corpus by name, or a folder of txt, jsonl, jsonl.zst or parquet.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="gpt2, gpt-neox, pydoc-4096 or a tokenizer.json. Default: pydoc-4096 for pydoc, gpt2 for all else."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one a core.", min=1)] = None,
) -> None:
    """Tokenise a corpus into memory-mapped shards; what is done already is kept."""
    chosen = tokenizer or ("pydoc-4096" if corpus == "pydoc" else "gpt2")
    prepared = prepare(corpus, chosen, workers=workers)
    for split in prepared.splits:
        facts = prepared.split(split)
        console.print(
            f"{split:<6}{facts.tokens:>14,} tokens{facts.words:>14,} words{facts.documents:>10,} documents",
        )
    console.print(f"{prepared.folder} (vocabulary {padded_vocab_size(chosen):,})")


if __name__ == "__main__":
    main()
