"""Truncating documents that are too long. An end-of-turn token is never added."""

from collections.abc import Sequence
from dataclasses import replace

from phi3_lightning.data.conversation import BadRowError, Conversation, TokenizedDocument
from phi3_lightning.data.messages import TOOL_RESPONSE
from phi3_lightning.data.template import ChatTemplate


def split(document: TokenizedDocument, limit: int) -> list[TokenizedDocument]:
    """Split a document into pieces of ``limit`` tokens or fewer."""
    pieces = []
    for start in range(0, len(document.input_ids), limit):
        end = start + limit
        spans = [(max(first, start) - start, min(last, end) - start) for first, last in document.spans]
        spans = [(first, last) for first, last in spans if first < last]
        pieces.append(TokenizedDocument(document.input_ids[start:end], spans))
    return pieces


def truncate_turns(
    conversations: Sequence[Conversation], template: ChatTemplate, limit: int, prompt_length: int | None = None
) -> list[TokenizedDocument] | None:
    """Leave out as few whole exchanges as possible from the beginning; a system message before them stays.

    Args:
        conversations: One, or two that begin with the same prompt: the same exchanges are left out of both.
        template: Renders them.
        limit: Tokens that each may have.
        prompt_length: Messages of the prompt, whose last exchange stays. None: all but the last exchange may go.

    Returns:
        The tokens of each conversation; None if even the last exchange is too long.
    """
    starts = [
        index
        for index, message in enumerate(conversations[0].messages[:prompt_length])
        if message["role"] == "user" and not message["content"].startswith(TOOL_RESPONSE)
    ]
    if not starts:
        return None
    shortest = None
    low, high = 1, len(starts)  # the fewest exchanges to leave out lie in [low, high); one exchange always stays
    while low < high:
        middle = (low + high) // 2
        encoded = template.encode([_without(starts[0], starts[middle], each) for each in conversations])
        documents = [each for each in encoded if not isinstance(each, BadRowError) and len(each.input_ids) <= limit]
        if len(documents) < len(encoded):
            low = middle + 1
        else:
            shortest, high = documents, middle
    return shortest


def _without(start: int, end: int, conversation: Conversation) -> Conversation:
    """A conversation without the messages of a range."""
    messages, trained = conversation.messages, conversation.trained
    return replace(conversation, messages=messages[:start] + messages[end:], trained=trained[:start] + trained[end:])
