"""transformers' classes for every model of the zoo; importing this makes the Auto classes know them."""

from rodimus_lab.hf.cache import StateCache
from rodimus_lab.hf.configuration import RodimusLabConfig
from rodimus_lab.hf.modeling import RodimusLabForCausalLM, RodimusLabModel
from rodimus_lab.hf.tokenization import RodimusLabTokenizer

__all__ = ["RodimusLabConfig", "RodimusLabForCausalLM", "RodimusLabModel", "RodimusLabTokenizer", "StateCache"]
