"""Benchmarks: each is a command of `app`, in a file of its own."""

from rodimus_lab.bench import loss, operators, tokenization, training
from rodimus_lab.bench.result import app

__all__ = ["app", "loss", "operators", "tokenization", "training"]
