"""Training: one loop for every recipe."""

from rodimus_lab.train.signals import Interrupted
from rodimus_lab.train.trainer import Trainer, TrainOptions, train

__all__ = ["Interrupted", "TrainOptions", "Trainer", "train"]
