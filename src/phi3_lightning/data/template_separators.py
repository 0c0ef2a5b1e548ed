"""What a chat template writes between contents: learned from marked chats, so that most chats need no marks."""

from typing import Literal

from phi3_lightning.data.conversation import Message
from phi3_lightning.data.sentinels import Rendered

Ending = Literal["end", "generation prompt"]


class TemplateSeparators:
    """The texts that a template has been seen to write between two roles."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, str], str] = {}

    def learn(self, chat: list[Message], rendered: Rendered, ending: Ending) -> None:
        """Take note of what lies around the contents of a chat.

        Args:
            chat: The messages.
            rendered: Where the template has put their contents.
            ending: What the template was asked to end with.
        """
        position = 0
        before = "start"
        for message, (start, end) in zip(chat, rendered.contents, strict=True):
            self._texts.setdefault((before, message["role"]), rendered.text[position:start])
            position, before = end, message["role"]
        self._texts.setdefault((before, ending), rendered.text[position:])

    def place(self, chat: list[Message], text: str, ending: Ending) -> Rendered | None:
        """Find contents in what a template has written.

        Args:
            chat: The messages.
            text: What the template has written, all of which must be accounted for.
            ending: What the template was asked to end with.

        Returns:
            Where the contents are; None where the text is not what was expected.
        """
        parts: list[str] = []
        contents = []
        position = 0
        before = "start"
        for message in chat:
            glue = self._texts.get((before, message["role"]))
            if glue is None:
                return None
            before, content = message["role"], message["content"]
            start = position + len(glue)
            position = start + len(content)
            contents.append((start, position))
            parts += (glue, content)
        parts.append(self._texts.get((before, ending), ""))
        return Rendered(text, contents) if "".join(parts) == text else None
