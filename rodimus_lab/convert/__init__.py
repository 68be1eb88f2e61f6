"""Checkpoint directories as others lay them out: the authors', flash-linear-attention's, and this project's own."""

from rodimus_lab.convert.chat import CHAT_TEMPLATE, Chat
from rodimus_lab.convert.directory import (
    ChatTokenizer,
    Checkpoint,
    Layout,
    layout_of,
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
    "layout_of",
    "open_directory",
    "write_native",
    "write_official",
]
