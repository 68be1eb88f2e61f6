"""Benchmarks: each is a command of `app`, in a file of its own."""

from rodimus_lab.bench import decode, loss, operators, recording, tokenization, training
from rodimus_lab.bench.result import app

__all__ = ["app", "decode", "loss", "operators", "recording", "tokenization", "training"]
