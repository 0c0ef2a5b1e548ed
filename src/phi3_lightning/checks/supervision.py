"""Supervision follows the template: trained are the answers, after the prompts that generation continues."""

import re
from typing import Any

from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.checks.rows import Row
from phi3_lightning.data.collate import Document, collate
from phi3_lightning.data.conversation import BadRowError, Conversation
from phi3_lightning.data.template import ChatTemplate


def find_faults(rows: list[Row], template: ChatTemplate) -> list[str]:
    """Return place and fault of each row, of those with turns, whose supervision differs from the template."""
    faults = [
        (row.place, _fault(chat, document, template))
        for row in rows
        if row.conversations
        for chat, document in zip(row.conversations, row.document.sides(), strict=True)
    ]
    return [f"{place}: {fault}" for place, fault in faults if fault is not None]


def _fault(chat: Conversation, document: Document, template: ChatTemplate) -> str | None:
    ids = document.input_ids.tolist()
    spans = _labelled(document)
    adapted = template.adapt_tools(chat)
    if isinstance(adapted, BadRowError):
        return str(adapted)
    trained = [message for message, on in zip(chat.messages, chat.trained, strict=True) if on]
    render: Any = template.tokenizer.apply_chat_template  # its annotations know no TypedDict
    rendered = render(adapted.messages, tools=adapted.tools, tokenize=True, return_dict=False)
    if not _special_text(chat, template) and ids != rendered:
        return "its tokens are not those of tokenizer.apply_chat_template"
    if len(spans) != len(trained):
        return f"{len(spans)} spans are trained, and {len(trained)} messages should be"
    for message, (start, end) in zip(trained, spans, strict=True):
        content = message["content"]
        if ids[end - 1] not in template.stop_ids:
            return f"the answer {_short(content)} is trained without a token that ends it"
        if "tool_calls" in message:  # in the template's own words
            continue
        text = _decoded(ids[start : end - 1], template)
        encoded = template.tokenizer.backend_tokenizer.encode(content.strip(), add_special_tokens=False)
        if text not in (content.strip(), _decoded(encoded.ids, template)):
            return f"{_short(text)} is trained, and the message is {_short(content)}"
    return _prompt_fault(chat, ids, spans, template)


def _prompt_fault(
    chat: Conversation, ids: list[int], spans: list[tuple[int, int]], template: ChatTemplate
) -> str | None:
    """Compare the prompts of generation with what precedes each answer in training."""
    trained = [index for index, on in enumerate(chat.trained) if on]
    for index, (start, _) in zip(trained, spans, strict=True):
        if chat.messages[index]["role"] != "assistant":
            continue
        before = Conversation(chat.messages[:index], [False] * index, chat.tools)
        [prompt] = template.encode([before], add_generation_prompt=True)
        if isinstance(prompt, BadRowError):
            return f"the template makes no prompt of the messages before messages[{index}] ({prompt})"
        if prompt.input_ids != ids[:start]:
            ends = [_short(_decoded(part[-4:], template)) for part in (prompt.input_ids, ids[:start])]
            return f"generation starts an answer after {ends[0]}, and training after {ends[1]}"
    return None


def _labelled(document: Document) -> list[tuple[int, int]]:
    """The supervised ranges, read from the labels that the model gets."""
    labels = collate([[document]], pad_token_id=0)["labels"][0]
    marks = "".join("x" if label != IGNORE_INDEX else "." for label in labels.tolist())
    return [match.span() for match in re.finditer("x+", marks)]


def _special_text(chat: Conversation, template: ChatTemplate) -> bool:
    """Whether a content holds the text of a special token, which transformers would read as a turn."""
    special = [token.content for token in template.tokenizer.added_tokens_decoder.values() if token.special]
    return any(token in message["content"] for token in special for message in chat.messages)


def _decoded(ids: list[int], template: ChatTemplate) -> str:
    return str(template.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip()


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
