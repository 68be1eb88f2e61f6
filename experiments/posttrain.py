"""Post-training as Appendix E.3 names it: supervised fine-tuning, then DPO, through TRL, in the authors' chat format.

The paper gives neither the pairs' format nor a setting; those below are ours. A pair is a line of JSON: `messages` as
the chat format has them, ending with one of HUMAN or OBSERVATION, maybe `system`, and `completion` for fine-tuning,
`chosen` and `rejected` for DPO. Prompts and answers become tokens apart, as a model that is asked reads and writes
them, and the loss is on the answers and the token that ends them. Every tenth pair is held out.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from pydantic import Field

from rodimus_lab.command import command, require_packages
from rodimus_lab.config import Config
from rodimus_lab.convert import CHAT_TEMPLATE, Chat, ChatTokenizer, Checkpoint, open_checkpoint, write_native
from rodimus_lab.convert.provenance import provenance
from rodimus_lab.device import device_name, device_type
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.records import RunDir, environment, runs_root, write_atomic
from rodimus_lab.weights import checkpoints_root

Method = Literal["sft", "dpo"]
EXPERIMENT = "posttrain"
HELD_OUT = 10
SMOKE_STEPS = 60
MADE_UP = "made-up pairs"
ANSWERS: dict[Method, tuple[str, ...]] = {"sft": ("completion",), "dpo": ("chosen", "rejected")}
LEARNING_RATES: dict[Method, float] = {"sft": 1e-5, "dpo": 5e-7}
WORDS = (
    "apple", "bread", "chair", "drum", "eagle", "field", "glass", "horse", "ink", "jacket", "kettle", "lamp", "moon",
    "nail", "orange", "pencil", "queen", "river", "salt", "table", "umbrella", "violin", "window", "yard", "zebra",
)  # fmt: skip
QUESTIONS = ("Say the word {word}.", "Which word is this: {word}?", "Repeat after me: {word}", "Write {word} once.")


class Pair(NamedTuple):
    """A prompt and its answers in tokens: the one to learn, or the better and the worse one."""

    prompt: list[int]
    answers: tuple[list[int], ...]


class PosttrainRecipe(Config):
    """Everything that decides the outcome. `pairs` names their file and the SHA-256 of it."""

    label: str
    method: Method
    version: str
    model: dict[str, str]
    pairs: dict[str, str]
    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    beta: Annotated[float, Field(gt=0)] | None
    max_length: Annotated[int, Field(ge=2)]
    seed: int

    @property
    def id(self) -> str:
        return f"{self.label}-{self.method}-{self.digest()}"


def made_up(method: Method) -> list[dict[str, Any]]:
    """A hundred questions that ask for a word; the better answer is a sentence with it, the worse one has none."""
    found = []
    for number, question in enumerate(QUESTIONS):
        for word in WORDS[number:] + WORDS[:number]:
            good, bad = f"The word is {word}.", "I cannot say that."
            answers = {"completion": good} if method == "sft" else {"chosen": good, "rejected": bad}
            found.append({"messages": [{"role": "HUMAN", "content": question.format(word=word)}], **answers})
    return found


def read_pairs(path: Path, method: Method) -> dict[str, dict[str, Any]]:
    """The pairs of a file by the names of their lines. Raises `UserError` naming the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path} cannot be read ({reason}); give a file of JSON lines") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except ValueError:
            pair = None
        if not isinstance(pair, dict):
            raise UserError(f"line {number} of {path} is no JSON object; give one pair a line")
        if missing := [key for key in ("messages", *ANSWERS[method]) if key not in pair]:
            raise UserError(f"line {number} of {path} has no {missing[0]!r}, which {method} needs; add it")
        found[f"line {number} of {path}"] = pair
    if len(found) < 2:
        raise UserError(f"{path} holds fewer than two pairs; one at least is held out")
    return found


def encode(pairs: Mapping[str, dict[str, Any]], method: Method, encoder: ChatTokenizer, eos: int) -> list[Pair]:
    """The pairs in tokens. Raises `UserError` naming one whose messages or answers are not in the chat format."""
    found = []
    for name, pair in pairs.items():
        try:
            prompt, texts = _parts(pair, method)
        except UserError as error:
            raise UserError(f"{name}: {error}; correct it") from None
        found.append(Pair(encoder.encode(prompt), tuple([*encoder.encode(text), eos] for text in texts)))
    return found


def _parts(pair: dict[str, Any], method: Method) -> tuple[str, list[str]]:
    """The prompt and the answers. Raises `UserError` for what is not in the chat format."""
    messages, system = pair["messages"], pair.get("system")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError("'messages' is no list of objects")
    chat = Chat(messages, system)
    if not messages or messages[-1]["role"] == "ASSISTANT":
        raise UserError("the messages do not end with one of HUMAN or OBSERVATION")
    texts = {key: pair[key] for key in ANSWERS[method]} | ({} if system is None else {"system": system})
    for key, text in texts.items():
        if not isinstance(text, str) or not text:
            raise UserError(f"{key!r} is no text")
    try:
        "".join((chat.prompt, *texts.values())).encode()
    except UnicodeEncodeError:
        raise UserError("half of a surrogate pair is no text") from None
    return chat.prompt, [texts[key] for key in ANSWERS[method]]


def answer_logps(model: LanguageModel, pairs: Sequence[Pair], which: int) -> list[float]:
    """log p in nats of an answer of every pair, given its prompt."""
    found = []
    device = model.embedding.weight.device
    with torch.no_grad():
        for pair in pairs:
            answer = pair.answers[which]
            ids = torch.tensor([pair.prompt + answer], device=device)
            log_p_BTV = model(ids[:, :-1])[0].float().log_softmax(-1)
            log_p_BT = log_p_BTV.gather(-1, ids[:, 1:, None]).squeeze(-1)
            found.append(log_p_BT[0, -len(answer) :].double().sum().item())
    return found


def measure(model: LanguageModel, reference: LanguageModel, pairs: Sequence[Pair], method: Method) -> dict[str, float]:
    """On held-out pairs: nats a token of the (better) answers and, for DPO, the share of pairs whose better answer
    gained more over the reference than the worse one, and by how much on average, in nats."""
    model.eval()
    good = answer_logps(model, pairs, 0)
    metrics = {"valid_loss": -sum(good) / sum(len(pair.answers[0]) for pair in pairs)}
    if method == "dpo":
        bad = answer_logps(model, pairs, 1)
        before = [answer_logps(reference, pairs, which) for which in (0, 1)]
        margins = [(g - rg) - (b - rb) for g, b, rg, rb in zip(good, bad, *before, strict=True)]
        metrics |= {"accuracy": sum(m > 0 for m in margins) / len(margins), "margin": sum(margins) / len(margins)}
    return metrics


def diverged(step: int, recipe: PosttrainRecipe) -> UserError:
    """What is said of a loss that is not finite."""
    return UserError(f"the loss of {recipe.id} is not finite at step {step:,}; give a lower --lr than {recipe.lr:g}")


def train(
    model: Any, reference: Any, tokenizer: Any, pairs: Sequence[Pair], recipe: PosttrainRecipe, folder: str
) -> None:
    """Train `model`, a `TrlModel`, in place, by TRL's trainer of the method.

    Raises `UserError` naming the step whose loss is not finite.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class Watched:
        """A trainer that stops at a loss which is not finite."""

        def training_step(self, *given: Any, **options: Any) -> Any:
            loss = super().training_step(*given, **options)  # type: ignore[misc]
            if not loss.isfinite().all():
                raise diverged(self.state.global_step + 1, recipe)  # type: ignore[attr-defined]
            return loss

    class FineTuning(Watched, SFTTrainer):
        pass

    class InTokens(Watched, DPOTrainer):
        """Over pairs that are tokens already, of which TRL has a form for fine-tuning only."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    device = model.device.type
    shared: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.steps // 10,
        "max_length": recipe.max_length,
        "seed": recipe.seed,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": max(1, recipe.steps // 10),
    }
    trainer: Any
    if recipe.method == "sft":
        rows = [
            {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}
            for prompt, (answer,) in pairs
        ]
        settings = SFTConfig(**shared, completion_only_loss=True)
        trainer = FineTuning(
            model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    else:
        rows = [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for prompt, (chosen, rejected) in pairs
        ]
        trainer = InTokens(
            model=model,
            ref_model=reference,
            args=DPOConfig(**shared, beta=recipe.beta or 0.0),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    trainer.train()


@command("posttrain", panel="Experiments")
def posttrain(
    source: Annotated[str, typer.Argument(help="A run id, or a checkpoint directory of any layout.")],
    method: Annotated[Method, typer.Option(help="Supervised fine-tuning, or DPO on top of it.")] = "sft",
    pairs: Annotated[
        Path | None, typer.Option(help="A file of JSON lines. Default, with the smoke budget: made-up pairs.")
    ] = None,
    budget: Annotated[
        Literal["full", "smoke"], typer.Option(help="smoke: 60 steps at a high rate, to see that it works.")
    ] = "full",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    lr: Annotated[float | None, typer.Option(min=0, help="Default: 1e-5 for SFT, 5e-7 for DPO.")] = None,
    beta: Annotated[float, typer.Option(min=1e-6, help="Of DPO: how dear it is to leave the reference.")] = 0.1,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a prompt with its answer; longer pairs are left out.")
    ] = 4096,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Default: cuda where there is one.")] = None,
) -> None:
    """Fine-tune a model on answers, or on preferences between answers, in the authors' chat format, through TRL."""
    require_packages("posttrain", "trl", "datasets", "transformers")
    if pairs is None and budget != "smoke":
        raise UserError("the authors' pairs are not public; give --pairs FILE, or --budget smoke for made-up ones")
    for option, rate in (("--lr", lr), ("--beta", beta)):
        if rate is not None and not 0 < rate < math.inf:
            raise UserError(f"{option} is {rate:g}; give a finite number above 0")
    if pairs is None:
        given = {f"pair {number}": pair for number, pair in enumerate(made_up(method), 1)}
    else:
        given = read_pairs(pairs, method)
    checkpoint = open_checkpoint(source)
    tokenizer = checkpoint.tokenizer()
    encoded = encode(given, method, ChatTokenizer(tokenizer), tokenizer.eos_id)
    fitting = [pair for pair in encoded if len(pair.prompt) + max(map(len, pair.answers)) <= max_length]
    held_out, trained = fitting[::HELD_OUT], [pair for n, pair in enumerate(fitting) if n % HELD_OUT]
    if not trained:
        raise UserError(
            f"only {len(fitting)} pairs are of at most {max_length} tokens; give more, or a larger --max-length"
        )
    small = budget == "smoke"
    digest = hashlib.sha256(json.dumps([*given.values()], sort_keys=True).encode()).hexdigest()[:16]
    origin = provenance(checkpoint)
    recipe = PosttrainRecipe(
        label=origin.label,
        method=method,
        version=version("trl"),
        model=origin.identity,
        pairs={"source": MADE_UP if pairs is None else pairs.name, "sha256": digest},
        steps=steps or (SMOKE_STEPS if small else max(1, epochs * len(trained) // batch_size)),
        batch_size=batch_size,
        lr=lr if lr is not None else 1e-3 if small else LEARNING_RATES[method],
        beta=beta if method == "dpo" else None,
        max_length=max_length,
        seed=seed,
    )
    folder = checkpoints_root() / EXPERIMENT / recipe.id
    run = RunDir(runs_root(), EXPERIMENT, recipe.id)
    if run.finished and (folder / "config.json").is_file():
        print(f"{run.experiment}/{run.id} is finished; its weights are in {folder}")
        return
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is no folder, and the weights are written there; move it away")
    if folder.exists() and folder.samefile(checkpoint.directory):
        raise UserError(f"{folder} is to be written and is the model to train; copy it elsewhere")
    try:
        metrics = _run(recipe, checkpoint, trained, held_out, folder, run, device, budget)
    except UserError:
        if not run.finished:  # It cannot go on where it stopped.
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    print(f"{recipe.id}: {', '.join(f'{name} {value:.4g}' for name, value in metrics.items())}")
    print(f"its weights are in {folder}: rodimus-lab chat {folder}")


def _run(
    recipe: PosttrainRecipe,
    checkpoint: Checkpoint,
    trained: Sequence[Pair],
    held_out: Sequence[Pair],
    folder: Path,
    run: RunDir,
    device: Literal["cpu", "cuda"] | None,
    budget: str,
) -> dict[str, float]:
    from tempfile import TemporaryDirectory

    from rodimus_lab.hf import RodimusLabConfig, RodimusLabTokenizer
    from rodimus_lab.hf.trl import TrlModel

    kind = device_type(device)

    def loaded() -> Any:
        model: Any = TrlModel(RodimusLabConfig(checkpoint.config))
        model.lm.load_state_dict({name: tensor.float() for name, tensor in checkpoint.tensors.items()})
        return model.to(kind)

    torch.manual_seed(recipe.seed)
    model, reference = loaded(), loaded().eval()
    run.create(recipe.to_dict())
    env = environment()
    where = device_name(torch.device(kind))
    run.write_env(env | {"device": where})
    run.truncate_metrics(0)
    before = measure(model.lm, reference.lm, held_out, recipe.method)
    if not all(map(math.isfinite, before.values())):
        raise UserError(f"{checkpoint.directory} has no finite loss before any training; give another model")
    run.append_metrics({"step": 0, **before})
    with TemporaryDirectory() as scratch:
        train(model, reference, RodimusLabTokenizer.of(checkpoint.tokenizer()), trained, recipe, scratch)
    after = measure(model.lm, reference.lm, held_out, recipe.method)
    if not all(map(math.isfinite, after.values())):
        raise diverged(recipe.steps, recipe)
    run.append_metrics({"step": recipe.steps, **after})
    stored = next(iter(checkpoint.tensors.values())).dtype
    tensors = {name: tensor.detach().cpu().to(stored) for name, tensor in model.lm.state_dict().items()}
    if folder.is_dir():  # What is left of a run that was cut off; its name is this recipe's own.
        shutil.rmtree(folder)
    write_native(checkpoint._replace(tensors=tensors), folder)
    _speak(folder)
    metrics = after | {"valid_loss_before": before["valid_loss"], "held_out": len(held_out), "pairs": len(trained)}
    run.finish(
        {
            "label": recipe.label,
            "corpus": recipe.pairs["source"],
            "tokenizer": checkpoint.tokenizer().name,
            "budget": {"name": budget, "steps": recipe.steps, "batch_size": recipe.batch_size},
            "device": where,
            "commit": env["commit"],
            "metrics": metrics,
        }
    )
    return metrics


def _speak(folder: Path) -> None:
    """Tell transformers of the chat format that the model now has."""
    path = folder / "tokenizer_config.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    write_atomic(path, json.dumps(facts | {"chat_template": CHAT_TEMPLATE}, indent=1, ensure_ascii=False))
