"""What was said so far, and what of it the model is asked to continue."""

from typing import Literal, NamedTuple

from phi3_lightning.data.conversation import BadRowError, Conversation, Message
from phi3_lightning.data.messages import check_text
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.errors import ConfigError, DataError


class Prompt(NamedTuple):
    """What the model is to continue.

    Args:
        ids: Its tokens.
        forgotten: Exchanges that were left out of the history to make room.
    """

    ids: list[int]
    forgotten: int


class Dialogue:
    """The history of a chat, within the model's window.

    Args:
        template: Renders it. The text of a special token in a message is never a turn.
        window: Tokens that the model reads.
        room: Tokens that an answer may have.
        place: What becomes of the system message, as in ``data.system``.
        system: The system message.

    Raises:
        ConfigError: If there is a system message and ``place`` refuses it.
    """

    def __init__(
        self,
        template: ChatTemplate,
        window: int,
        room: int,
        place: Literal["keep", "merge_into_user", "refuse"] = "keep",
        system: str | None = None,
    ) -> None:
        self._template = template
        self._window = window
        self._limit = window - min(room, window // 2)
        self._place = place
        self._messages: list[Message] = []
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message; a new one holds for what has been said already, too."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text and self._place == "refuse":
            raise ConfigError("system: the model was trained without system messages (data.system: refuse)")
        self._system = text and check_text(text, "the system message")

    def forget(self) -> None:
        """Begin anew; the system message stays."""
        self._messages = []

    def ask(self, text: str) -> Prompt:
        """Add a message of the user's.

        Args:
            text: What is said.

        Returns:
            The prompt. Where history and answer do not fit into the window, the oldest exchanges are left out for good.

        Raises:
            DataError: If the message alone is too long, or the template cannot render it; it is not kept.
        """
        before = list(self._messages)
        self._messages.append({"role": "user", "content": check_text(text, "the message")})
        forgotten = 0
        try:
            ids = self._render()
            while len(ids) > self._limit and len(self._messages) > 1:
                del self._messages[:2]
                forgotten += 1
                ids = self._render()
            if len(ids) >= self._window:
                raise DataError(
                    f"the message is too long: with the system message it has {len(ids)} tokens, and the model reads "
                    f"{self._window} with its answer; shorten it"
                )
        except DataError:
            self._messages = before
            raise
        return Prompt(ids, forgotten)

    def answer(self, text: str) -> None:
        """Add the model's answer to the last message.

        Args:
            text: What it said, which may be nothing.
        """
        self._messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Take the last message back, which nothing has answered."""
        self._messages.pop()

    def _render(self) -> list[int]:
        messages = list(self._messages)
        if self._system and self._place == "merge_into_user":
            messages[0] = {"role": "user", "content": f"{self._system}\n\n{messages[0]['content']}"}
        elif self._system:
            messages.insert(0, {"role": "system", "content": self._system})
        conversation = Conversation(messages, [False] * len(messages))
        [encoded] = self._template.encode([conversation], add_generation_prompt=True)
        if isinstance(encoded, BadRowError):
            raise encoded
        return encoded.input_ids
