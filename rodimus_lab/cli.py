"""The command line. Every registered experiment is a command whose options are its function's."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from rodimus_lab.data import describe, list_corpora, padded_vocab_size, prepare
from rodimus_lab.doctor import Fact, examine
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import EXPERIMENTS, REPORTS, Experiment, choose_budget
from rodimus_lab.generate import Sampling, stream
from rodimus_lab.nn.zoo import MODELS, SIZES, model_config
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import PROJECT_ROOT, load_records, load_unfinished
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import PaperResults, runs_json, runs_table, to_markdown, write
from rodimus_lab.train import TrainOptions, train
from rodimus_lab.train.distributed import end_process
from rodimus_lab.train.signals import Interrupted
from rodimus_lab.weights import load_model

load_plugins()
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Experiments and benchmarks around Rodimus*, and the efficient sequence models beside it.",
)
data_app = typer.Typer(no_args_is_help=True, help="Corpora, tokenizers and token shards.")
app.add_typer(data_app, name="data")
console = Console(highlight=False, markup=False, soft_wrap=True)
CLICK_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
TABLES = PROJECT_ROOT / "results" / "tables"


def main() -> None:
    """Run the command line; what a user can mend ends in one sentence and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except Interrupted as stop:
        _complain(stop)
        code = stop.exit_code
    except (UserError, OSError) as error:
        _complain(error)
        code = 2
    except CLICK_ERROR as error:
        if type(error).__name__ != "NoArgsIsHelpError":
            _complain(error.format_message())
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    code = code if isinstance(code, int) else 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end_process(code)
    sys.exit(code)


def _complain(error: object) -> None:
    print(f"error: {error}", file=sys.stderr)


RunOptions = [
    ("device", str | None, None, "cpu or cuda; by default cuda where there is one"),
    ("micro_batch_size", int | None, None, "sequences at a time; by default as many as suit the device"),
    ("compile", bool | None, None, "compile the model's blocks; by default on CUDA only"),
    ("checkpoint_every", int, 1000, "steps between checkpoints"),
    ("tensorboard", bool, False, "write TensorBoard event files beside the checkpoints"),
    ("resume", bool, True, "go on from the last checkpoint of an unfinished run"),
    ("stop_at_step", int | None, None, "end this session at a step, with a checkpoint"),
    ("max_seconds", float | None, None, "end this session after so many seconds, with a checkpoint"),
]


def _command_of(experiment: Experiment) -> Callable[..., None]:
    """The CLI command of an experiment: its own options, then those of running anything."""
    own = list(inspect.signature(experiment.recipes, eval_str=True).parameters.values())

    def command(**values: Any) -> None:
        options = {p.name: values[p.name] for p in own}
        if "budget" in options:
            options["budget"], why = choose_budget(options["budget"])
            console.print(f"budget: {options['budget']} ({why})")
        run = TrainOptions(**{name: values[name] for name, *_ in RunOptions})
        run_all(experiment.recipes(**options), run)
        for name in experiment.reports:
            write_report(name)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=keyword, annotation=_option(p.annotation, p.name)) for p in own]
    for name, annotation, default, text in RunOptions:
        option = Annotated[annotation, typer.Option(help=text, rich_help_panel="Running")]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=option))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = inspect.getdoc(experiment.recipes)
    return command


def _option(annotation: Any, name: str) -> Any:
    help_text = {
        "model": f"one of {', '.join(MODELS)}",
        "budget": "paper, a stated fraction of it, or minutes on a CPU; by default paper with a GPU, else smoke",
        "corpus": "a corpus by name, or a folder of text; see `rodimus-lab data list`",
        "steps": "train this many steps, warm-up and evaluations in proportion",
    }.get(name)
    return Annotated[annotation, typer.Option(help=help_text)]


def run_all(recipes: Sequence[Recipe], options: TrainOptions) -> None:
    """Train each recipe (finished ones are skipped) and print what came of it."""
    for recipe in recipes:
        record = train(recipe, options)
        if not record:
            continue
        metrics = record["metrics"]
        shown = [
            f"{name.replace('_', ' ')} {metrics[name]:.2f}" for name in ("test_ppl", "valid_ppl") if metrics.get(name)
        ]
        if metrics.get("tokens_per_second"):
            shown.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        console.print(
            f"{recipe.id}: {', '.join(shown)} (corpus {recipe.data.corpus}, {recipe.budget.name} budget, "
            f"{record['device']})",
        )


def write_report(name: str) -> None:
    """Build a report from all records, write it under results/tables and say where."""
    report = REPORTS[name]
    records = [record for experiment in report.experiments for record in load_records(experiment=experiment)]
    table = report.make(records, PaperResults())
    paths = write(table, TABLES, name)
    console.print(Markdown(to_markdown(table)))
    places = ", ".join(str(path.relative_to(PROJECT_ROOT)) for path in paths)
    console.print(f"written: {places}")


for _name in EXPERIMENTS:
    app.command(_name)(_command_of(EXPERIMENTS[_name]))


@app.command("train")
def train_recipe(
    recipe: Annotated[Path, typer.Argument(help="a recipe.json, such as a finished run's")],
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="sequences at a time")] = None,
) -> None:
    """Train a recipe read from a file."""
    try:
        values = json.loads(recipe.read_bytes())
    except ValueError as error:
        raise UserError(f"{recipe} is not JSON ({error}); give a recipe.json") from None
    if not isinstance(values, dict):
        raise UserError(f"{recipe} holds no recipe; give a recipe.json")
    run_all([Recipe.from_dict(values)], TrainOptions(device=device, micro_batch_size=micro_batch_size))


@app.command()
def report(
    names: Annotated[list[str] | None, typer.Argument(help="which; by default all")] = None,
) -> None:
    """Rebuild tables from the run records, the paper's numbers beside ours."""
    for name in names or list(REPORTS):
        write_report(name)


@app.command()
def runs(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """List the runs on disk."""
    records, unfinished = load_records(), load_unfinished()
    if as_json:
        print(json.dumps(runs_json(records, unfinished), indent=1))
    else:
        console.print(runs_table(records, unfinished))


@app.command()
def params(
    name: Annotated[str, typer.Argument(help="a model, such as rodimus")],
    size: Annotated[str, typer.Option(help=f"one of {', '.join(SIZES)}")] = "wikitext103",
    vocab_size: Annotated[int | None, typer.Option(help="by default the size's own")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
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
        print(json.dumps(facts))
        return
    console.print(f"{facts['model']} at {size}: {total:,} parameters")
    for kind, count in {"embedding": embedding, **sublayers, "norms and the rest": facts["params_other"]}.items():
        console.print(f"  {kind:<20}{count:>16,}")
    console.print(
        f"  {facts['flops_per_token']:,} forward FLOPs a token and {facts['state_bytes_bf16']:,} bytes of bf16 state "
        f"after {context:,} tokens",
    )


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Say what is installed, which devices there are, and which backend each operator would choose and why."""
    facts: list[Fact] = examine()
    if as_json:
        print(json.dumps([fact._asdict() for fact in facts], indent=1))
        return
    for fact in facts:
        console.print(f"{fact.topic:<14}{fact.name:<26}{fact.value}")


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="a run id, or a folder with model.safetensors")],
    prompt: Annotated[str, typer.Option(help="the text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int | None = None,
    device: str = "cpu",
) -> None:
    """Continue a prompt with a trained run."""
    from rodimus_lab.data import load_tokenizer

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    model, recipe = load_model(run, device=device)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    ids = tokenizer.encode(prompt)
    shown = len(tokenizer.decode(ids))
    print(prompt, end="", flush=True)
    for tokens in stream(model, [ids], max_new_tokens, sampling):
        if tokens[0] == tokenizer.eos_id:
            break
        ids.append(tokens[0])
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # A character may take several tokens.
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()


@data_app.command("list")
def data_list() -> None:
    """Name the corpora and say where each comes from."""
    for name in list_corpora():
        console.print(f"{name:<14}{describe(name).get('summary', '')}")


@data_app.command("prepare")
def data_prepare(
    corpus: Annotated[str, typer.Argument(help="a corpus by name, or a folder of txt, jsonl, jsonl.zst or parquet")],
    tokenizer: Annotated[str | None, typer.Option(help="gpt2, gpt-neox, pydoc-4096 or a tokenizer.json")] = None,
    workers: Annotated[int | None, typer.Option(help="processes; by default all cores", min=1)] = None,
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
