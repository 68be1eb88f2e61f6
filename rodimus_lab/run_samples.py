"""A finished run's own continuation of a prompt, as `rodimus-lab runs sample` keeps it."""

from __future__ import annotations

from safetensors import SafetensorError

from rodimus_lab.data import load_tokenizer
from rodimus_lab.errors import UserError
from rodimus_lab.generate import stream, stream_text
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import Record
from rodimus_lab.sampling import Sampling
from rodimus_lab.weights import MODEL, RECIPE, find_model, read_tensors


def continue_with(record: Record, prompt: str, max_new_tokens: int, seed: int) -> str:
    """What follows `prompt`, drawn at temperature 0.8 from the likeliest 95 %, up to an end of document.

    Raises `UserError` where the run has no weights on this machine, or reads something else than text.
    """
    folder = find_model(record.id)
    recipe = Recipe.read(folder / RECIPE)
    name = getattr(recipe.data, "tokenizer", None)
    if name is None:
        raise UserError(f"{record.id} was not trained on text, so it continues no prompt")
    model = recipe.model.build()
    try:
        model.load_state_dict(read_tensors(folder / MODEL))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{folder / MODEL} cannot be read ({str(error).splitlines()[-1]}); train the run again"
        ) from None
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(prompt)
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=seed)
    drawn = (next_B[0] for next_B in stream(model.eval(), [ids], max_new_tokens, sampling, stop=[tokenizer.eos_id]))
    return "".join(stream_text(tokenizer, ids, drawn))
