"""The open models of Table 2: where each row's weights are on the Hub.

Rows without an entry have none that transformers reads: the models that the authors trained for the comparison, and
Rodimus itself, whose checkpoints are evaluated from a folder.
"""

from __future__ import annotations

from typing import NamedTuple


class OpenModel(NamedTuple):
    """`model`, `params_b` and `tokens_b` name the row as the paper prints it. `hub` is a conversion of the weights
    where their authors' own are not in the form that transformers reads."""

    model: str
    params_b: str
    tokens_b: str
    hub: str


OPEN_MODELS = (
    OpenModel("GPT-Neo", "0.13", "300", "EleutherAI/gpt-neo-125m"),
    OpenModel("OPT", "0.13", "300", "facebook/opt-125m"),
    OpenModel("Pythia", "0.16", "300", "EleutherAI/pythia-160m"),
    OpenModel("mamba", "0.13", "300", "state-spaces/mamba-130m-hf"),
    OpenModel("mamba2", "0.13", "300", "AntonV/mamba2-130m-hf"),
    OpenModel("rwkv4", "0.17", "300", "RWKV/rwkv-4-169m-pile"),
    OpenModel("OPT", "0.35", "300", "facebook/opt-350m"),
    OpenModel("Pythia", "0.41", "300", "EleutherAI/pythia-410m"),
    OpenModel("BLOOM", "0.56", "300", "bigscience/bloom-560m"),
    OpenModel("mamba", "0.37", "300", "state-spaces/mamba-370m-hf"),
    OpenModel("mamba2", "0.37", "300", "AntonV/mamba2-370m-hf"),
    OpenModel("rwkv4", "0.43", "300", "RWKV/rwkv-4-430m-pile"),
    OpenModel("Qwen2", "0.5", "7000", "Qwen/Qwen2-0.5B"),
    OpenModel("GPT-Neo", "1.3", "300", "EleutherAI/gpt-neo-1.3B"),
    OpenModel("OPT", "1.3", "300", "facebook/opt-1.3b"),
    OpenModel("Pythia", "1.0", "300", "EleutherAI/pythia-1b"),
    OpenModel("Pythia", "1.4", "300", "EleutherAI/pythia-1.4b"),
    OpenModel("BLOOM", "1.1", "300", "bigscience/bloom-1b1"),
    OpenModel("gla", "1.3", "100", "fla-hub/gla-1.3B-100B"),
    OpenModel("retnet", "1.3", "100", "fla-hub/retnet-1.3B-100B"),
    OpenModel("hgrn", "1.3", "100", "fla-hub/hgrn-1.3B-100B"),
    OpenModel("hgrn2", "1.3", "100", "fla-hub/hgrn2-1.3B-100B"),
    OpenModel("mamba", "1.3", "300", "state-spaces/mamba-1.4b-hf"),
    OpenModel("mamba2", "1.4", "300", "AntonV/mamba2-1.3b-hf"),
    OpenModel("rwkv4", "1.5", "300", "RWKV/rwkv-4-1b5-pile"),
    OpenModel("rwkv6", "1.6", "1420", "RWKV/v6-Finch-1B6-HF"),
    OpenModel("RecurrentGemma", "2.0", "2000", "google/recurrentgemma-2b"),
    OpenModel("Qwen2", "1.5", "7000", "Qwen/Qwen2-1.5B"),
)
