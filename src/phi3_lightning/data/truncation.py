"""Truncating documents that are too long. An end-of-turn token is never added."""

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


def truncate_turns(conversation: Conversation, template: ChatTemplate, limit: int) -> TokenizedDocument | None:
    """Leave out as few whole exchanges as possible from the beginning; a system message before them stays.

    Returns:
        A chat of ``limit`` tokens or fewer; None if even the last exchange is too long.
    """
    messages = conversation.messages
    starts = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "user" and not message["content"].startswith(TOOL_RESPONSE)
    ]
    if not starts:
        return None
    head = starts[0]
    shortest = None
    low, high = 1, len(starts)  # the fewest exchanges to leave out lie in [low, high); one exchange always stays
    while low < high:
        middle = (low + high) // 2
        rest = [*range(head), *range(starts[middle], len(messages))]
        shorter = Conversation([messages[i] for i in rest], [conversation.trained[i] for i in rest])
        [encoded] = template.encode([shorter])
        if isinstance(encoded, BadRowError) or len(encoded.input_ids) > limit:
            low = middle + 1
        else:
            shortest, high = encoded, middle
    return shortest
