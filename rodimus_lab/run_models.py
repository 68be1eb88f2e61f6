"""A finished run's own model, for whatever reads it: the command `runs sample`, evaluators."""

from __future__ import annotations

from safetensors import SafetensorError

from rodimus_lab.data import Tokenizer, load_tokenizer
from rodimus_lab.errors import UserError
from rodimus_lab.generate import stream, stream_text
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.recipe import Recipe
from rodimus_lab.sampling import Sampling
from rodimus_lab.weights import MODEL, RECIPE, find_model, read_tensors


def run_model(run: str) -> tuple[LanguageModel, Tokenizer, Recipe]:
    """The trained model of a run on the CPU, its tokenizer and its recipe.

    Raises `UserError` where the run has no weights on this machine, or was trained on something else than text.
    """
    folder = find_model(run)
    recipe = Recipe.read(folder / RECIPE)
    name = getattr(recipe.data, "tokenizer", None)
    if name is None:
        raise UserError(f"{run} was not trained on text, so it reads none")
    model = recipe.model.build()
    try:
        model.load_state_dict(read_tensors(folder / MODEL))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{folder / MODEL} is damaged or of another model ({reason}); train the run again") from None
    return model.eval(), load_tokenizer(name), recipe


def continue_with(run: str, prompt: str, max_new_tokens: int, seed: int) -> str:
    """What follows `prompt`, drawn at temperature 0.8 from the likeliest 95 %, up to an end of document."""
    model, tokenizer, _ = run_model(run)
    ids = tokenizer.encode(prompt)
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=seed)
    drawn = (next_B[0] for next_B in stream(model, [ids], max_new_tokens, sampling, stop=[tokenizer.eos_id]))
    return "".join(stream_text(tokenizer, ids, drawn))
