"""Conversations become token ids and supervised spans. No other file knows chat tokens."""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from phi3_lightning.batch.padding import end_of_text_ids
from phi3_lightning.data.conversation import BadRowError, Conversation, Message, TokenizedDocument
from phi3_lightning.data.native_tools import NativeTools
from phi3_lightning.data.rendering import ChatRenderer
from phi3_lightning.data.sentinels import Rendered
from phi3_lightning.data.special_text import JoinedEncoding, encode_contents_as_text
from phi3_lightning.data.template_text import read_template, templates_of, writes_tools
from phi3_lightning.data.word_cache import VERIFIED_CHATS, Pieces, WordCache, words_are_independent
from phi3_lightning.errors import ConfigError
from phi3_lightning.hub import refusal, with_revision

log = logging.getLogger(__name__)

_RenderedChat = tuple[Conversation, Rendered | BadRowError]


def load_tokenizer(name: str, revision: str | None = None, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Load a tokenizer exactly as its ``tokenizer.json`` defines it, without truncation and padding.

    ``AutoTokenizer`` rebuilds the tokenizer of a folder that names Llama's class, which changes the ids of Phi-3.

    Args:
        name: Folder or hub id.
        chat_template: A file with a Jinja template to use instead of the tokenizer's own.

    Raises:
        ConfigError: If there is no such tokenizer or file, or no chat template.
    """
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = refusal(error, name, revision) or error
        raise ConfigError(
            f"data.tokenizer: cannot load {with_revision(name, revision)!r} ({why}); give a folder with "
            "tokenizer.json, or a hub id"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if any(text.startswith("\ufeff") for text in templates_of(tokenizer)):
        raise ConfigError(
            f"data.tokenizer: the chat template of {name!r} begins with a byte order mark, which would be tokens of "
            "every chat; remove it there, or give data.chat_template a file"
        )
    if tokenizer.chat_template is None:
        raise ConfigError(f"data.tokenizer: {name!r} has no chat template; give one with data.chat_template")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


class ChatTemplate:
    """Renders conversations with a tokenizer's own chat template and finds the supervised tokens.

    Args:
        special_text: Whether a special token's text within a content is plain text, or refused. It is never a turn.

    Raises:
        ConfigError: If the template loses text, doubles the first token, or ends no turn with a token of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special_text: Literal["plain", "refuse"] = "plain") -> None:
        self.tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer)
        definition = tokenizer.backend_tokenizer.to_str()  # takes a while, so it is read once
        self._word_cache = WordCache(tokenizer) if words_are_independent(definition) else None
        self._unverified = VERIFIED_CHATS
        self._allows_special_text = special_text == "plain"
        added = tokenizer.added_tokens_decoder
        self._special_ids = {index for index, token in added.items() if token.special}
        specials = sorted((added[index].content for index in self._special_ids), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self._native_tools = NativeTools(tokenizer, self._special_text)
        self._end_of_turn = self._check()
        self._renderer.end_of_turn = added[self._end_of_turn].content
        parts = [definition, str(tokenizer.chat_template), repr(tokenizer.special_tokens_map)]
        self.fingerprint = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
        """A hash of the whole tokenizer and the template."""

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the template's end of turn, and the ends of text."""
        return list(dict.fromkeys([self._end_of_turn, *end_of_text_ids(self.tokenizer)]))

    @cached_property
    def identity(self) -> dict[str, str]:
        """Hashes of ``tokenizer`` (vocabulary and how it splits texts) and ``template``, which determine the tokens."""
        probes = self._encode_texts([" Grüße,\n\tcafé  ½ 東京 👋\r\n 3.14", *self.tokenizer.get_added_vocab()])
        behaviour = [sorted(self.tokenizer.get_vocab().items()), [probe.ids for probe in probes]]
        texts = {"tokenizer": json.dumps(behaviour), "template": str(self.tokenizer.chat_template)}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template has a way of its own to write tools, their calls or their results."""
        return any(map(writes_tools, templates_of(self.tokenizer)))

    def adapt_tools(self, conversation: Conversation) -> Conversation | BadRowError:
        """Return a conversation with tools as ``apply_chat_template`` takes it, or why the template cannot write it."""
        return self._native_tools.adapt(conversation)

    def verify_word_cache(self) -> None:
        """Compare the next ``VERIFIED_CHATS`` chats with the tokenizer's own tokens, as a new template does."""
        self._unverified = VERIFIED_CHATS

    def encode(
        self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False
    ) -> list[TokenizedDocument | BadRowError]:
        """Return for each conversation its tokens, or why the template cannot render it.

        Args:
            add_generation_prompt: Whether to end with the beginning of the assistant's turn.
        """
        adapted = [self.adapt_tools(conversation) for conversation in conversations]
        usable = [chat for chat in adapted if isinstance(chat, Conversation)]
        rendered = iter(self._renderer.render(usable, add_generation_prompt=add_generation_prompt))
        chats: list[_RenderedChat] = [
            (conversation, chat) if isinstance(chat, BadRowError) else (chat, next(rendered))
            for conversation, chat in zip(conversations, adapted, strict=True)
        ]
        if self._word_cache is None or not self._unverified:
            return self._tokenise(chats, self._word_cache)
        first, rest = chats[: self._unverified], chats[self._unverified :]
        self._unverified -= len(first)
        expected = self._tokenise(first, None)
        if _documents(self._tokenise(first, self._word_cache)) != _documents(expected):
            log.warning(
                "data.tokenizer: encoded word by word, a chat has other tokens than the tokenizer gives it; chats are "
                "encoded as a whole, which takes longer"
            )
            self._word_cache = None
        return expected + self._tokenise(rest, self._word_cache)

    def encode_texts(self, texts: Sequence[str]) -> list[TokenizedDocument | BadRowError]:
        """Return the tokens of texts without turns, or why one is refused.

        Each ends with the end-of-text token, and all of it is supervised.
        """
        encodings = self._encode_texts(list(texts), plain=True, add_special_tokens=True)
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        results: list[TokenizedDocument | BadRowError] = []
        for text, encoding in zip(texts, encodings, strict=True):
            special = None if self._allows_special_text else self._special_text.search(text)
            ids = encoding.ids + end
            results.append(_refuse(special.group()) if special else TokenizedDocument(ids, [(0, len(ids))]))
        return results

    def _encode_texts(
        self, texts: list[str], *, plain: bool = False, add_special_tokens: bool = False
    ) -> list[Encoding]:
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = plain
        try:
            return list(backend.encode_batch(texts, add_special_tokens=add_special_tokens))
        finally:
            backend.encode_special_tokens = False

    def _tokenise(self, chats: list[_RenderedChat], cache: WordCache | None) -> list[TokenizedDocument | BadRowError]:
        items = [item for _, item in chats if isinstance(item, Rendered)]
        by_words = [None if cache is None or item.with_calls else cache.encode(item) for item in items]
        others = [item.text for item, pieces in zip(items, by_words, strict=True) if pieces is None]
        whole = iter(self._encode_texts(others))
        encodings = iter([pieces or next(whole) for pieces in by_words])
        return [
            item if isinstance(item, BadRowError) else self._supervise(conversation, item, next(encodings))
            for conversation, item in chats
        ]

    def _supervise(
        self, chat: Conversation, rendered: Rendered, encoding: Encoding | Pieces | JoinedEncoding
    ) -> TokenizedDocument | BadRowError:
        contents = (m["content"] for index, m in enumerate(chat.messages) if index not in rendered.with_calls)
        matches = filter(None, map(self._special_text.search, contents))
        if not self._allows_special_text and (special := next(matches, None)):
            return _refuse(special.group())
        if rendered.without_thoughts and (fault := self._check_thoughts(chat, rendered)):
            return fault
        if isinstance(encoding, Encoding) and any(matches):  # the word cache makes ordinary tokens of it by itself
            encoding = self._encode_contents_as_text(rendered, encoding)
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
            # A role token may include the white space that a content begins with; it belongs to the template.
            includes_start = chars[0] < start and encoding.ids[first] in self._special_ids
            spans.append((first + includes_start, last + 1))
        return TokenizedDocument(encoding.ids, spans)

    def _check_thoughts(self, chat: Conversation, rendered: Rendered) -> BadRowError | None:
        """The error of a chat of which the template leaves out thoughts that are trained, or that hide special text."""
        for index in sorted(rendered.without_thoughts):
            start, end = rendered.contents[index]
            if chat.trained[index]:
                earlier = "data.train_on: last trains the last answer alone; or " * (index < len(chat.messages) - 1)
                return BadRowError(
                    "the chat template changes thoughts",
                    f"messages[{index}] is trained, and the template leaves out its <think> block or writes it in "
                    f"another form; {earlier}write the block as the template does, or give data.chat_template a file "
                    "with a template that keeps it",
                )
            if index in rendered.with_calls:  # whose special text is refused
                continue
            # The place of the rest of the content is unknown, and leaving out thoughts may have joined special text.
            if special := self._special_text.search(f"{chat.messages[index]['content']}\n{rendered.text[start:end]}"):
                return _refuse(special.group())
        return None

    def _encode_contents_as_text(self, rendered: Rendered, whole: Encoding) -> JoinedEncoding:
        return encode_contents_as_text(rendered, whole, self._special_ids, self._encode_texts)

    def _check(self) -> int:
        """Try the template on a small chat, and return its end-of-turn token."""
        messages: list[Message] = [
            {"role": "user", "content": "first question"},
            {"role": "assistant", "content": "first answer"},
            {"role": "user", "content": "second question"},
            {"role": "assistant", "content": "second answer"},
        ]
        chat = Conversation(messages, [False, True, False, True])
        [encoded] = self.encode([chat])
        [rendered] = self._renderer.render([chat], add_generation_prompt=False)
        if isinstance(encoded, BadRowError) or isinstance(rendered, BadRowError):
            raise ConfigError(f"data.tokenizer: the chat template cannot be used for training ({encoded})")
        ids = encoded.input_ids
        [whole] = self._encode_texts([rendered.text])
        # Some tokenizers treat the beginning of a text differently: their texts cannot be encoded piece by piece.
        self._allows_special_text &= self._encode_contents_as_text(rendered, whole).ids == ids
        if ids[0] == ids[1] == self.tokenizer.bos_token_id:
            raise ConfigError("data.tokenizer: the chat template begins with two bos tokens; remove one from it")
        ends = {ids[end - 1] for _, end in encoded.spans}
        if len(ends) != 1:
            raise ConfigError("data.tokenizer: the chat template ends the assistant's turns with different tokens")
        return ends.pop()


def _refuse(special: str) -> BadRowError:
    return BadRowError("special-token text", f"{special!r} within a content; remove it")


def _documents(results: list[TokenizedDocument | BadRowError]) -> list[TokenizedDocument]:
    return [result for result in results if isinstance(result, TokenizedDocument)]
