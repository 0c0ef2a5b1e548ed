"""Conversations become token ids and supervised spans. The only room that knows chat tokens."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from phi3_lightning.data.apart import Joined, encode_apart
from phi3_lightning.data.conversation import BadRowError, Conversation, Message, TokenizedDocument
from phi3_lightning.data.sentinels import (
    Rendered,
    has_thoughts,
    insert_sentinels,
    lost,
    remove_end_sentinels,
    remove_sentinels,
    unused_sentinels,
)
from phi3_lightning.data.template_separators import Ending, TemplateSeparators
from phi3_lightning.data.template_text import read_template, templates_of, writes_tools
from phi3_lightning.data.word_cache import Pieces, WordCache, words_are_independent
from phi3_lightning.errors import ConfigError

_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError)


def load_tokenizer(name: str, revision: str | None = None, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Load a tokenizer exactly as its ``tokenizer.json`` defines it.

    ``AutoTokenizer`` rebuilds the tokenizer of a folder that names Llama's class, which changes the ids of Phi-3.

    Args:
        name: Folder or hub id.
        revision: Branch, tag or commit on the hub.
        chat_template: A file with a Jinja template to use instead of the tokenizer's own.

    Returns:
        The tokenizer, without truncation and padding of its own.

    Raises:
        ConfigError: There is no such tokenizer or file, or there is no chat template.
    """
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.tokenizer: cannot load {name!r} ({error}). Give a folder with tokenizer.json, or a hub id."
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if any(text.startswith("\ufeff") for text in templates_of(tokenizer)):
        raise ConfigError(
            f"data.tokenizer: the chat template of {name!r} begins with a byte order mark, which would be tokens of "
            "every chat; remove it there, or give data.chat_template a file."
        )
    if tokenizer.chat_template is None:
        raise ConfigError(f"data.tokenizer: {name!r} has no chat template; give one with data.chat_template.")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


class ChatTemplate:
    """Renders conversations with a tokenizer's own chat template and finds the supervised tokens.

    Args:
        tokenizer: A tokenizer with a chat template.
        special_text: Whether a special token's text within a content is plain text, or refused. It is never a turn.

    Raises:
        ConfigError: The template loses text, doubles the first token, or ends no turn with a token of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special_text: Literal["plain", "refuse"] = "plain") -> None:
        self.tokenizer = tokenizer
        self._glue = TemplateSeparators()
        self._words = WordCache(tokenizer) if words_are_independent(tokenizer) else None
        self._can_defuse = special_text == "plain"
        added = tokenizer.added_tokens_decoder
        self._special_ids = {index for index, token in added.items() if token.special}
        specials = sorted((added[index].content for index in self._special_ids), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self._end_of_turn = self._check()

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the template's end of turn, and the tokenizer's end of text."""
        eos = self.tokenizer.eos_token_id
        return [self._end_of_turn] if eos in (None, self._end_of_turn) else [self._end_of_turn, eos]

    @cached_property
    def identity(self) -> dict[str, str]:
        """What the tokenizer does and what the template says, as hashes: other ones make other tokens of a chat.

        Returns:
            ``tokenizer``, of its vocabulary and of how it takes texts apart, and ``template``, of its text.
        """
        probes = self._encode_texts([" Grüße,\n\tcafé  ½ 東京 👋\r\n 3.14", *self.tokenizer.get_added_vocab()])
        behaviour = [sorted(self.tokenizer.get_vocab().items()), [probe.ids for probe in probes]]
        texts = {"tokenizer": json.dumps(behaviour), "template": str(self.tokenizer.chat_template)}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template has a way of its own to write tools, their calls or their results."""
        return any(map(writes_tools, templates_of(self.tokenizer)))

    def encode(
        self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False
    ) -> list[TokenizedDocument | BadRowError]:
        """Tokenise many conversations at once.

        Args:
            conversations: What is said, and which messages are trained.
            add_generation_prompt: End where the assistant is to speak.

        Returns:
            For each conversation its tokens, or why the template cannot render it.
        """
        rendered = self._render([conversation.messages for conversation in conversations], add_generation_prompt)
        encodings = self._encode_rendered([item for item in rendered if isinstance(item, Rendered)])
        return [
            item if isinstance(item, BadRowError) else self._supervise(conversation, item, next(encodings))
            for conversation, item in zip(conversations, rendered, strict=True)
        ]

    def encode_texts(self, texts: Sequence[str]) -> list[TokenizedDocument | BadRowError]:
        """Tokenise texts without turns; each ends with the end-of-text token, and all of it is supervised.

        Args:
            texts: The texts.

        Returns:
            For each text its tokens, or why it is refused.
        """
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        try:
            encodings = backend.encode_batch(list(texts), add_special_tokens=True)
        finally:
            backend.encode_special_tokens = False
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        results: list[TokenizedDocument | BadRowError] = []
        for text, encoding in zip(texts, encodings, strict=True):
            special = None if self._can_defuse else self._special_text.search(text)
            ids = encoding.ids + end
            results.append(_refused(special.group()) if special else TokenizedDocument(ids, [(0, len(ids))]))
        return results

    def _render(self, chats: list[list[Message]], add_generation_prompt: bool) -> list[Rendered | BadRowError]:
        ending: Ending = "generation prompt" if add_generation_prompt else "end"

        def apply(batch: list[list[Message]]) -> list[str]:
            render: Any = self.tokenizer.apply_chat_template  # its annotations know no TypedDict
            texts: list[str] = render(batch, tokenize=False, add_generation_prompt=add_generation_prompt)
            return texts

        def one(chat: list[Message]) -> Rendered | BadRowError:
            try:
                marks = unused_sentinels(chat)
                plain, outer, inner = apply(
                    [chat, insert_sentinels(chat, *marks), insert_sentinels(chat, *marks, strip=True)]
                )
                if found := remove_sentinels(chat, plain, outer, marks) or remove_sentinels(chat, plain, inner, marks):
                    self._glue.learn(chat, found, ending)
                    return found
                if not has_thoughts(chat):
                    return lost(chat, plain)
                outer, inner = apply(
                    [insert_sentinels(chat, "", marks[1]), insert_sentinels(chat, "", marks[1], strip=True)]
                )
            except _TEMPLATE_ERRORS as error:
                return BadRowError("the chat template refuses it", str(error))
            found = remove_end_sentinels(chat, plain, outer, marks[1]) or remove_end_sentinels(
                chat, plain, inner, marks[1]
            )
            return found or lost(chat, plain)

        try:
            texts = apply(chats)
        except _TEMPLATE_ERRORS:  # of one chat, which must not spoil the others
            return [one(chat) for chat in chats]
        return [self._glue.place(chat, text, ending) or one(chat) for chat, text in zip(chats, texts, strict=True)]

    def _encode_texts(self, texts: list[str], *, plain: bool = False) -> list[Encoding]:
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = plain
        try:
            return list(backend.encode_batch(texts, add_special_tokens=False))
        finally:
            backend.encode_special_tokens = False

    def _encode_rendered(self, rendered: list[Rendered]) -> Iterator[Encoding | Pieces]:
        by_words = [self._words.encode(item) if self._words else None for item in rendered]
        others = [item.text for item, found in zip(rendered, by_words, strict=True) if found is None]
        whole = iter(self._encode_texts(others))
        return (found or next(whole) for found in by_words)

    def _supervise(
        self, chat: Conversation, rendered: Rendered, encoding: Encoding | Pieces | Joined
    ) -> TokenizedDocument | BadRowError:
        found = (self._special_text.search(message["content"]) for message in chat.messages)
        if not self._can_defuse and (special := next(filter(None, found), None)):
            return _refused(special.group())
        if rendered.thoughtless and (fault := self._thoughtless(chat, rendered)):
            return fault
        if isinstance(encoding, Encoding) and any(found):  # words have it as plain text already
            encoding = self._defuse(rendered, encoding)
        spans = []
        for index, (start, end) in enumerate(rendered.contents):
            if not chat.trained[index]:
                continue
            last = encoding.char_to_token(end)
            if last is None or encoding.ids[last] not in self._special_ids:
                return BadRowError("no end of turn", f"messages[{index}]: no special token follows the content")
            first = encoding.char_to_token(start)
            chars = None if first is None else encoding.token_to_chars(first)
            if first is None or chars is None:
                return BadRowError("the tokenizer loses text", f"messages[{index}] begins with a character it drops")
            # A role token may swallow the white space that a content begins with; it stays the template's.
            swallowed = chars[0] < start and encoding.ids[first] in self._special_ids
            spans.append((first + swallowed, last + 1))
        return TokenizedDocument(encoding.ids, spans)

    def _thoughtless(self, chat: Conversation, rendered: Rendered) -> BadRowError | None:
        """What is wrong with a chat of whose thoughts the template leaves some out."""
        for index in sorted(rendered.thoughtless):
            start, end = rendered.contents[index]
            if chat.trained[index]:
                earlier = "data.train_on: last trains the last answer alone; or " * (index < len(chat.messages) - 1)
                return BadRowError(
                    "the chat template changes thoughts",
                    f"messages[{index}] is trained, and the template leaves out its <think> block or writes it in "
                    f"another form; {earlier}write the block as the template does, or give data.chat_template a file "
                    "with a template that keeps it",
                )
            # Where the rest of the content is, nobody knows, and leaving thoughts out may have made the text.
            if special := self._special_text.search(f"{chat.messages[index]['content']}\n{rendered.text[start:end]}"):
                return _refused(special.group())
        return None

    def _defuse(self, rendered: Rendered, whole: Encoding) -> Joined:
        return encode_apart(rendered, whole, self._special_ids, self._encode_texts)

    def _check(self) -> int:
        """Try the template on a small chat and return its end-of-turn token."""
        chat: list[Message] = [
            {"role": "user", "content": "first question"},
            {"role": "assistant", "content": "first answer"},
            {"role": "user", "content": "second question"},
            {"role": "assistant", "content": "second answer"},
        ]
        conversation = Conversation(chat, [False, True, False, True])
        [encoded] = self.encode([conversation])
        [rendered] = self._render([chat], add_generation_prompt=False)
        if isinstance(encoded, BadRowError) or isinstance(rendered, BadRowError):
            raise ConfigError(f"data.tokenizer: the chat template cannot be trained with ({encoded}).")
        ids = encoded.input_ids
        [whole] = self._encode_texts([rendered.text])
        # Some tokenizers treat a text's beginning differently: their texts cannot be encoded piece by piece.
        self._can_defuse &= self._defuse(rendered, whole).ids == ids
        if ids[0] == ids[1] == self.tokenizer.bos_token_id:
            raise ConfigError("data.tokenizer: the chat template begins with two bos tokens; remove one from it.")
        ends = {ids[end - 1] for _, end in encoded.spans}
        if len(ends) != 1:
            raise ConfigError("data.tokenizer: the chat template ends the assistant's turns with different tokens.")
        return ends.pop()


def _refused(special: str) -> BadRowError:
    return BadRowError("special-token text", f"{special!r} within a content; remove it")
