"""Conversations in the form of transformers' chat messages, checked and written as prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from clipflow.errors import InputError
from clipflow.pipelines.image_io import ImageInput
from clipflow.pipelines.prompts import Prompts, check_text

ROLES = ("system", "user", "assistant")
MOST_SHOWN = 40  # characters of a text, in an error

# {"role": "system" | "user" | "assistant", "content": str or a list of
#  {"type": "text", "text": str} and {"type": "image", "image": ImageInput}}
Message = Mapping[str, object]
Messages = Sequence[Message]
Check = Callable[[str, object], str]  # as `check_text`


@dataclass
class Conversation:
    """One conversation that ends with a user's message.

    Attributes:
        turns: (role, parts); a part is a text, or None where the next picture is.
        images: the pictures, in the order of their places.
    """

    turns: list[tuple[str, list[str | None]]] = field(default_factory=list)
    images: list[ImageInput] = field(default_factory=list)

    @classmethod
    def of_question(cls, image: ImageInput, question: str) -> Conversation:
        """A question about one picture."""
        return cls([("user", [None, question])], [image])

    @classmethod
    def of_messages(
        cls, messages: Messages, name: str = "messages", check: Check = check_text
    ) -> Conversation:
        """Check `messages`; `name` is how errors call them, `check` what checks their texts.

        Raises:
            InputError: they are no list of messages, one of them is malformed, or the last one is
                not the user's.
        """
        if not isinstance(messages, (list, tuple)) or not messages:
            raise InputError(
                f"{name} must be a list of at least one message, got {_shown(messages)}"
            )
        conversation = cls()
        for index, message in enumerate(messages):
            conversation._add(message, f"{name}[{index}]", check)
        last = conversation.turns[-1][0]
        if last != "user":
            raise InputError(f"{name} must end with a message of the user, got {last!r}")
        return conversation

    def write(self, prompts: Prompts, sizes: Sequence[int]) -> str:
        """The prompt; `sizes` are those of the pictures, as `Prompts.picture` counts them."""
        counts = iter(sizes)
        turns = []
        for role, parts in self.turns:
            texts = [prompts.picture(next(counts)) if part is None else part for part in parts]
            turns.append((role, "".join(texts)))
        return prompts.chat(turns)

    def _add(self, message: Message, name: str, check: Check) -> None:
        if not isinstance(message, Mapping):
            raise InputError(f"{name} must be a dict of role and content, got {_shown(message)}")
        unknown = [key for key in message if key not in ("role", "content")]
        missing = [key for key in ("role", "content") if key not in message]
        if unknown or missing:
            found = ", ".join(map(repr, message)) or "nothing"
            raise InputError(f"{name} must have the keys 'role' and 'content', got {found}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"{name}: role must be one of {', '.join(ROLES)}, got {_shown(role)}")
        if role == "system" and self.turns:
            raise InputError(f"{name}: a system message must be the first, got it later")
        if role == "system" and isinstance(content, str) and not content:
            self.turns.append((role, []))  # instead of the model's own
            return
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)) or not content:
            raise InputError(f"{name}: content must be a text or a list, got {_shown(content)}")
        parts = [
            self._part(part, role, f"{name}: content[{index}]", check)
            for index, part in enumerate(content)
        ]
        self.turns.append((role, parts))

    def _part(self, part: object, role: str, name: str, check: Check) -> str | None:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in ("text", "image"):
            found = _shown(part if kind is None else kind)
            raise InputError(f"{name} must be a dict of type 'text' or 'image', got {found}")
        if part.get(kind) is None:
            found = ", ".join(map(repr, part))
            raise InputError(f"{name} of type {kind!r} must have the key {kind!r}, got {found}")
        if kind == "text":
            return check(name, part["text"])
        if role != "user":
            raise InputError(
                f"{name}: only a user's message may have pictures, got one of {role!r}"
            )
        self.images.append(part["image"])
        return None


def conversations_of(
    messages: Messages | Sequence[Messages], check: Check = check_text
) -> tuple[list[Conversation], bool]:
    """The conversations in `messages`, and whether it is a list of several.

    Raises:
        InputError: as `Conversation.of_messages`.
    """
    several = (
        isinstance(messages, (list, tuple))
        and bool(messages)
        and all(isinstance(one, (list, tuple)) for one in messages)
    )
    if not several:
        return [Conversation.of_messages(messages, check=check)], False
    return [
        Conversation.of_messages(one, f"messages[{index}]", check)
        for index, one in enumerate(messages)
    ], True


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)) and not value:
        return "an empty list"
    if isinstance(value, str):
        return repr(value if len(value) <= MOST_SHOWN else value[:MOST_SHOWN] + "...")
    return type(value).__name__
