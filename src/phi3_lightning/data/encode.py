"""Chunks of rows become chunks of token arrays, in this process or in several."""

import hashlib
import json
import multiprocessing
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.chunk import Chunk, Job, flat_arrays
from phi3_lightning.data.conversation import (
    BadRowError,
    Conversation,
    LabelledConversation,
    PlainText,
    PreferencePair,
    TokenizedDocument,
)
from phi3_lightning.data.formats import ParsedRow, parse_prompt, parse_row
from phi3_lightning.data.keys import group_hash, row_id
from phi3_lightning.data.pairs import (
    conversations,
    is_trained,
    join_sides,
    prompt_length,
    sides,
    with_label,
    with_sides,
)
from phi3_lightning.data.readers import decode_line
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.data.truncation import split, truncate_turns
from phi3_lightning.data.word_cache import VERIFIED_CHATS
from phi3_lightning.errors import ConfigError

_Item = ParsedRow | BadRowError


class _ParsedRow(NamedTuple):
    number: int
    item: _Item
    id: str | None = None
    group: int = 0


class Encoder:
    """Turns rows into tokens; with ``prompts`` they are prompts to answer instead of chats to train on."""

    def __init__(self, template: ChatTemplate, options: RowOptions, *, prompts: bool = False) -> None:
        self.template = template
        self.options = options
        if options.tools == "native" and not template.writes_tools:
            raise ConfigError(
                "data.tools: native is given, and the chat template writes no tools; set data.tools: render to write "
                "them as text by the convention of Hermes, or give data.chat_template a file with a template that does"
            )
        if options.tools == "auto":
            self.options = replace(options, tools="native" if template.writes_tools else "render")
        self.prompts = prompts

    def fingerprint(self) -> str:
        """Return a hash of what determines the tokens besides the code: tokenizer, template and options."""
        text = json.dumps([self.template.fingerprint, self.prompts, asdict(self.options)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def encode(self, job: Job) -> Chunk:
        """Tokenise the rows that can be used, and report why others cannot."""
        documents: list[tuple[_ParsedRow, TokenizedDocument]] = []
        bad: list[tuple[int, str]] = []
        dropped: defaultdict[str, list[int]] = defaultdict(list)
        unused: Counter[str] = Counter()
        cut = empty = 0
        parsed = [self._parse(number, row, unused) for number, row in job.rows]
        for row, encoded in zip(parsed, self._tokenise([row.item for row in parsed]), strict=True):
            if isinstance(encoded, BadRowError):
                bad.append((row.number, str(encoded)))
                dropped[encoded.reason].append(row.number)
                continue
            has_empty_answer = not self.prompts and isinstance(row.item, Conversation) and row.item.has_empty_answer
            if has_empty_answer and self.options.empty_answer == "drop":
                dropped["empty answer"].append(row.number)
                continue
            pieces = self._fit(row.item, encoded)
            usable = [piece for piece in pieces if self.prompts or is_trained(piece)]
            documents += [(row, piece) for piece in usable]
            if usable:
                cut += pieces != [encoded]
                empty += has_empty_answer
            else:
                reason = "nothing to train" if pieces else f"longer than max_length {self.options.max_length}"
                dropped[reason].append(row.number)
        return Chunk(
            source=job.source,
            read=len(job.rows),
            dropped_rows=dict(dropped),
            bad=bad,
            cut=cut,
            empty=empty,
            unused=dict(unused),
            ids=[row.id for row, _ in documents],
            groups=np.array([row.group for row, _ in documents], dtype=np.int64),
            **flat_arrays([document for _, document in documents], [row.number for row, _ in documents]),
        )

    def _parse(self, number: int, row: object, unused: Counter[str]) -> _ParsedRow:
        if isinstance(row, BadRowError):
            return _ParsedRow(number, row)
        try:
            fields: Any = decode_line(row) if isinstance(row, bytes) else row
            parse = parse_prompt if self.prompts else parse_row
            item = parse(fields, self.options, unused)  # raises unless the row is an object
            return _ParsedRow(number, item, row_id(fields), group_hash(fields, self.options.group_by))
        except BadRowError as error:
            return _ParsedRow(number, error)

    def _tokenise(self, items: list[_Item]) -> list[TokenizedDocument | BadRowError]:
        chats = [chat for item in items for chat in conversations(item)]
        texts = [item.text for item in items if isinstance(item, PlainText)]
        encoded_chats = iter(self.template.encode(chats, add_generation_prompt=self.prompts))
        encoded_texts = iter(self.template.encode_texts(texts))
        results: list[TokenizedDocument | BadRowError] = []
        for item in items:
            if isinstance(item, Conversation):
                results.append(self._check_prompt(next(encoded_chats)) if self.prompts else next(encoded_chats))
            elif isinstance(item, PlainText):
                results.append(next(encoded_texts))
            elif isinstance(item, PreferencePair):
                results.append(self._check_split(join_sides(next(encoded_chats), next(encoded_chats))))
            elif isinstance(item, LabelledConversation):
                results.append(self._check_split(with_label(next(encoded_chats), item.preferred)))
            else:
                results.append(self._check_ids(item) if isinstance(item, TokenizedDocument) else item)
        return results

    def _check_ids(self, document: TokenizedDocument) -> TokenizedDocument | BadRowError:
        count = len(self.template.tokenizer)
        if not document.input_ids or max(document.input_ids) < count:
            return document
        return BadRowError("not tokens", f"id {max(document.input_ids)} is not one of the tokenizer's {count}")

    def _check_prompt(self, prompt: TokenizedDocument | BadRowError) -> TokenizedDocument | BadRowError:
        if isinstance(prompt, BadRowError) or len(prompt.input_ids) <= self.options.max_length:
            return prompt
        fault = f"{len(prompt.input_ids)} tokens do not fit into {self.options.max_length}; shorten it"
        return BadRowError("prompt too long", fault)

    def _check_split(self, document: TokenizedDocument | BadRowError) -> TokenizedDocument | BadRowError:
        if isinstance(document, BadRowError) or self.options.truncation != "split" or self._fits(document):
            return document
        fault = f"longer than max_length {self.options.max_length}, and an answer in pieces cannot be compared"
        return BadRowError("a preference cannot be split", f"{fault}; set data.truncation: drop or truncate_turns")

    def _fits(self, document: TokenizedDocument) -> bool:
        return all(len(side.input_ids) <= self.options.max_length for side in sides(document))

    def _fit(self, item: _Item, document: TokenizedDocument) -> list[TokenizedDocument]:
        """The document, or what is left of it after truncation."""
        limit = self.options.max_length
        if self._fits(document):
            return [document]
        if self.options.truncation == "split":
            return split(document, limit)
        if self.options.truncation == "truncate_end":
            return with_sides(document, [split(side, limit)[0] for side in sides(document)])
        if self.options.truncation == "truncate_turns" and (chats := conversations(item)):
            shorter = truncate_turns(chats, self.template, limit, prompt_length(item))
            return [] if shorter is None else with_sides(document, shorter)
        return []


def encode_all(jobs: Iterator[Job], encoder: Encoder, num_proc: int) -> Iterator[Chunk]:
    """Tokenise chunk after chunk, in the order of the jobs, whatever the number of processes."""
    encoder.template.verify_word_cache()
    if num_proc == 1:
        yield from map(encoder.encode, jobs)
        return
    # Forking needs no second import of everything; where a platform cannot, its own default does.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with fork_safe_tokenizers(), ProcessPoolExecutor(num_proc, context, _set_encoder, (encoder,)) as pool:
        rows = 0
        for job in jobs:  # here, before the pool starts its processes, so that all use the word cache or none does
            yield encoder.encode(job)
            rows += len(job.rows)
            if rows >= VERIFIED_CHATS:
                break
        waiting: deque[Future[Chunk]] = deque()
        for job in jobs:
            waiting.append(pool.submit(_encode, job))
            if len(waiting) > 2 * num_proc:  # no further ahead, so that memory stays flat
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_encoder: Encoder  # of a worker process


def _set_encoder(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode(job: Job) -> Chunk:
    return _encoder.encode(job)


@contextmanager
def fork_safe_tokenizers() -> Iterator[None]:
    """Keep tokenizers from using threads in a forked process, which only its parent has."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
