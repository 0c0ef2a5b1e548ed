"""Two conversations with one prompt as one document: the tokens of the chosen one, then those of the rejected one."""

from dataclasses import replace
from itertools import takewhile

from phi3_lightning.data.conversation import (
    BadRowError,
    Conversation,
    LabelledConversation,
    PreferencePair,
    TokenizedDocument,
    common_length,
)


def conversations(item: object) -> list[Conversation]:
    """Return the conversations of a parsed row, in the order of their tokens; a text and tokens have none."""
    if isinstance(item, PreferencePair):
        return [item.chosen, item.rejected]
    if isinstance(item, LabelledConversation):
        return [item.conversation]
    return [item] if isinstance(item, Conversation) else []


def prompt_length(item: object) -> int | None:
    """Return the number of messages before the answers of a preference; None of any other row."""
    if isinstance(item, PreferencePair):
        return len(item.prompt.messages)
    if isinstance(item, LabelledConversation):
        return sum(1 for _ in takewhile(lambda trained: not trained, item.conversation.trained))
    return None


def join_sides(
    chosen: TokenizedDocument | BadRowError, rejected: TokenizedDocument | BadRowError
) -> TokenizedDocument | BadRowError:
    """Return the document of a pair, or why it cannot be used."""
    if isinstance(chosen, BadRowError):
        return BadRowError(chosen.reason, f"in 'chosen': {chosen.detail}")
    if isinstance(rejected, BadRowError):
        return BadRowError(rejected.reason, f"in 'rejected': {rejected.detail}")
    if chosen.input_ids == rejected.input_ids:
        return BadRowError("chosen equals rejected", "the chat template renders both alike; remove the row")
    length = len(chosen.input_ids)
    return TokenizedDocument(
        chosen.input_ids + rejected.input_ids,
        chosen.spans + [(start + length, end + length) for start, end in rejected.spans],
        chosen_length=length,
        shared_length=_shared_length(chosen, rejected),
    )


def with_label(document: TokenizedDocument | BadRowError, preferred: bool) -> TokenizedDocument | BadRowError:
    """Return the document of an answer with a label, or why it cannot be used."""
    return document if isinstance(document, BadRowError) else replace(document, preferred=preferred)


def sides(document: TokenizedDocument) -> list[TokenizedDocument]:
    """Return the two documents of a pair; any other document as it is."""
    length = document.chosen_length
    if not length:
        return [document]
    spans = [(start - length, end - length) for start, end in document.spans if start >= length]
    return [
        TokenizedDocument(document.input_ids[:length], document.spans[: len(document.spans) - len(spans)]),
        TokenizedDocument(document.input_ids[length:], spans),
    ]


def with_sides(document: TokenizedDocument, shorter: list[TokenizedDocument]) -> list[TokenizedDocument]:
    """Return a document with shorter sides in place of its own; no document of a pair whose sides are now equal."""
    if not document.chosen_length:
        return [replace(side, preferred=document.preferred) for side in shorter]
    pair = join_sides(*shorter)
    return [] if isinstance(pair, BadRowError) else [pair]


def is_trained(document: TokenizedDocument) -> bool:
    """Whether a document has a token to train; a pair needs one on each side."""
    return all(any(end > max(start, 1) for start, end in side.spans) for side in sides(document))


def _shared_length(chosen: TokenizedDocument, rejected: TokenizedDocument) -> int:
    before = [max(start, 1) - 1 for side in (chosen, rejected) for start, _ in side.spans]
    return min([common_length(chosen.input_ids, rejected.input_ids), *before])
