"""AdamW and which parameters it decays.

Weight decay is for matrices: parameters of two and more dimensions. It spares embeddings that are not also the output
head (a tied one is decayed), and every parameter that a module names in its class attribute `NO_DECAY`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.recipe import OptimizerConfig


class DecayGroups(NamedTuple):
    """Names of the model's parameters, in the model's order."""

    decay: tuple[str, ...]
    no_decay: tuple[str, ...]


def decay_groups(model: LanguageModel) -> DecayGroups:
    """Sort the parameters. Raises `ValueError` where a module's `NO_DECAY` names what it does not have."""
    spared: set[int] = set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        listed: frozenset[str] = getattr(module, "NO_DECAY", frozenset())
        for name in listed:
            # A gate that the config leaves out is None and stays in the module's table of parameters.
            if name not in own and getattr(module, name, ...) is not None:
                raise ValueError(f"{type(module).__name__} at {path!r} has no parameter {name!r} of its NO_DECAY")
        if isinstance(module, nn.Embedding) and module.weight is not model.head_weight_VD:
            listed = listed | {"weight"}
        spared |= {id(own[name]) for name in listed if name in own}
    named = list(model.named_parameters())
    decay = tuple(name for name, p in named if p.ndim >= 2 and id(p) not in spared)
    return DecayGroups(decay, tuple(name for name, _ in named if name not in set(decay)))


def without_block_numbers(names: Iterable[str]) -> list[str]:
    """Parameter names with `*` for the number of the block, each once."""
    return list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))


def build_optimizer(model: nn.Module, groups: DecayGroups, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW whose moments exist from the start, so that a checkpoint can be read into them.

    `optimizer.found_inf` (a float32 scalar on the device) suppresses an update where it is 1.
    """
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in groups.decay], "weight_decay": config.weight_decay},
            {"params": [parameters[name] for name in groups.no_decay], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's memory by name, the tensors themselves: `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def set_updates(optimizer: torch.optim.AdamW, count: int) -> None:
    """Tell the bias correction how many updates were made."""
    for state in optimizer.state.values():
        state["step"].fill_(count)


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_capturable(optimizer: torch.optim.AdamW, device: torch.device) -> None:
    """Let updates be captured as CUDA graphs. The learning rate, still set by `set_learning_rate`, is on the device."""
    for group in optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = torch.full((), group["lr"], dtype=torch.float32, device=device)
