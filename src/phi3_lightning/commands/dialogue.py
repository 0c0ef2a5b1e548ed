"""The history of a chat, and the prompt that the model continues."""

from typing import Literal, NamedTuple

from phi3_lightning.data.conversation import BadRowError, Conversation, Message
from phi3_lightning.data.messages import check_text
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.errors import ConfigError, DataError


class Prompt(NamedTuple):
    """The tokens that the model continues, and the number of old exchanges that were dropped to make room."""

    ids: list[int]
    dropped: int


class Dialogue:
    """The history of a chat, within the model's context.

    Args:
        context_length: Tokens of the model's context.
        answer_length: Tokens that an answer may have.
        place: What becomes of the system message, as in ``data.system``.

    Raises:
        ConfigError: If there is a system message and ``place`` refuses it.
    """

    def __init__(
        self,
        template: ChatTemplate,
        context_length: int,
        answer_length: int,
        place: Literal["keep", "merge_into_user", "refuse"] = "keep",
        system: str | None = None,
    ) -> None:
        self._template = template
        self._context_length = context_length
        self._limit = context_length - min(answer_length, context_length // 2)
        self._place = place
        self._messages: list[Message] = []
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message; a new one applies to the history too."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text and self._place == "refuse":
            raise ConfigError("system: the model was trained without system messages (data.system: refuse)")
        self._system = text and check_text(text, "the system message")

    def forget(self) -> None:
        """Clear the history; the system message stays."""
        self._messages = []

    def ask(self, text: str) -> Prompt:
        """Add a message of the user's, and return the prompt.

        Where history and answer do not fit into the context, the oldest exchanges are dropped for good.

        Raises:
            DataError: If the message alone is too long, or the template cannot render it; it is not added.
        """
        before = list(self._messages)
        self._messages.append({"role": "user", "content": check_text(text, "the message")})
        dropped = 0
        try:
            ids = self._render()
            while len(ids) > self._limit and len(self._messages) > 1:
                del self._messages[:2]
                dropped += 1
                ids = self._render()
            if len(ids) >= self._context_length:
                raise DataError(
                    f"the message is too long: with the system message it has {len(ids)} tokens, and the model reads "
                    f"{self._context_length} with its answer; shorten it"
                )
        except DataError:
            self._messages = before
            raise
        return Prompt(ids, dropped)

    def answer(self, text: str) -> None:
        """Add the model's answer to the last message; it may be empty."""
        self._messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Remove the last message, which has no answer."""
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
