"""Runs and checkpoint directories: the authors', flash-linear-attention's, and this project's own."""

from rodimus_lab.convert.chat import CHAT_TEMPLATE, Chat
from rodimus_lab.convert.directory import (
    ChatTokenizer,
    Checkpoint,
    Layout,
    find_directory,
    layout_of,
    open_checkpoint,
    open_directory,
    write_native,
    write_official,
)

__all__ = [
    "CHAT_TEMPLATE",
    "Chat",
    "ChatTokenizer",
    "Checkpoint",
    "Layout",
    "find_directory",
    "layout_of",
    "open_checkpoint",
    "open_directory",
    "write_native",
    "write_official",
]
