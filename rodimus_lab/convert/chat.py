"""The chat format of the authors' checkpoints.

    <role>SYSTEM</role>system text<role>HUMAN</role>question<role>ASSISTANT</role>answer ... <role>ASSISTANT</role>

Nothing stands between the parts, the system part is left out where there is none, and the model writes what follows the
last marker, up to its end-of-document token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rodimus_lab.errors import UserError

ROLES = ("HUMAN", "ASSISTANT", "OBSERVATION")

# The same, for transformers' apply_chat_template(messages, system=...).
CHAT_TEMPLATE = (
    "{%- if system %}{{ '<role>SYSTEM</role>' + system }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['HUMAN', 'ASSISTANT', 'OBSERVATION'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + '; known: HUMAN, ASSISTANT, OBSERVATION') }}"
    "{%- endif %}"
    "{{ '<role>' + message['role'] + '</role>' + message['content'] }}"
    "{%- endfor %}"
    "{{ '<role>ASSISTANT</role>' }}"
)


class Chat:
    """A conversation: `messages` are {"role": one of HUMAN, ASSISTANT and OBSERVATION, "content": text}.

    Raises `UserError` for another role or a message without text.
    """

    def __init__(self, messages: Sequence[Mapping[str, str]] = (), system: str | None = None):
        self.system = system
        self.messages: list[dict[str, str]] = []
        for message in messages:
            if set(message) != {"role", "content"}:
                raise UserError("a message has other keys than 'role' and 'content'; give these two")
            self.add(message["role"], message["content"])

    def add(self, role: str, content: str) -> None:
        if role not in ROLES:
            raise UserError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"the content of a message is {type(content).__name__}, not text; give text")
        self.messages.append({"role": role, "content": content})

    @property
    def prompt(self) -> str:
        """The text that the model goes on from."""
        parts = [("SYSTEM", self.system)] if self.system else []
        parts += [(message["role"], message["content"]) for message in self.messages]
        return "".join(f"<role>{role}</role>{content}" for role, content in [*parts, ("ASSISTANT", "")])
