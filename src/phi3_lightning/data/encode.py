"""Chunks of rows become chunks of token arrays, in this process or in several."""

import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation, PlainText, TokenizedDocument
from phi3_lightning.data.formats import parse_prompt, parse_row
from phi3_lightning.data.keys import group_hash, row_id, token_hashes
from phi3_lightning.data.readers import Row, decode_line
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.data.truncation import split, truncate_end, truncate_turns


class Job(NamedTuple):
    """Rows to tokenise.

    Args:
        source: The index of their source.
        rows: Number and content of each.
    """

    source: int
    rows: list[Row]


class Chunk(NamedTuple):
    """Tokenised rows, as flat arrays.

    Args:
        source: The index of their source.
        read: Rows that came in.
        rows: The number of each kept row, shape (kept,), int64.
        input_ids: Tokens, document by document, shape (tokens,), int32.
        lengths: Tokens of each document, shape (kept,), int32.
        spans: Supervised ranges, document by document, shape (2 * ranges,), int32.
        span_lengths: Entries of ``spans`` of each document, shape (kept,), int32.
        dropped: Rows left out, by reason.
        bad: Number and fault of each row that cannot be used.
        cut: Rows of which something was cut off.
        unused: Rows with each field that nothing reads, by the field's name.
        ids: The own id of each kept row as JSON, where it has one.
        groups: A number for the group of each kept row, shape (kept,), int64.
        hashes: A number for the tokens of each document, shape (kept,), int64.
    """

    source: int
    read: int
    rows: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    spans: NDArray[np.int32]
    span_lengths: NDArray[np.int32]
    dropped: dict[str, int]
    bad: list[tuple[int, str]]
    cut: int
    unused: dict[str, int]
    ids: list[str | None]
    groups: NDArray[np.int64]
    hashes: NDArray[np.int64]


Parsed = Conversation | PlainText | TokenizedDocument | BadRowError


class _Keyed(NamedTuple):
    """A row, its number, its own id and its group."""

    number: int
    item: Parsed
    id: str | None
    group: int


class Encoder:
    """Turns rows into tokens.

    Args:
        template: Renders conversations.
        options: How rows are read, and how long documents may be.
        prompts: Whether rows are prompts to answer instead of chats to train on.
    """

    def __init__(self, template: ChatTemplate, options: RowOptions, *, prompts: bool = False) -> None:
        self.template = template
        self.options = options
        if options.tools == "auto":
            self.options = replace(options, tools="native" if template.writes_tools else "render")
        self.prompts = prompts

    def fingerprint(self) -> str:
        """A name for what decides about tokens, besides this package's code: tokenizer, template and options.

        Returns:
            Hexadecimal digits.
        """
        tokenizer = self.template.tokenizer
        parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, repr(tokenizer.special_tokens_map)]
        text = json.dumps([*parts, self.prompts, asdict(self.options)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def encode(self, job: Job) -> Chunk:
        """Tokenise a chunk of rows.

        Args:
            job: The rows.

        Returns:
            Tokens of those that can be used, and why the others cannot.
        """
        kept: list[tuple[_Keyed, TokenizedDocument]] = []
        bad: list[tuple[int, str]] = []
        dropped: Counter[str] = Counter()
        unused: Counter[str] = Counter()
        cut = 0
        parsed = [self._parse(number, row, unused) for number, row in job.rows]
        for row, encoded in zip(parsed, self._encode([row.item for row in parsed]), strict=True):
            if isinstance(encoded, BadRowError):
                bad.append((row.number, str(encoded)))
                dropped[encoded.reason] += 1
                continue
            pieces = self._fit(row.item, encoded)
            cut += pieces != [encoded]
            trained = [piece for piece in pieces if self.prompts or _trains(piece)]
            kept += [(row, piece) for piece in trained]
            if not trained:
                dropped["nothing to train" if pieces else f"longer than max_length {self.options.max_length}"] += 1
                cut -= pieces != [encoded]
        return _chunk(job, kept, dropped, bad, cut, unused)

    def _parse(self, number: int, row: object, unused: Counter[str]) -> _Keyed:
        if isinstance(row, BadRowError):
            return _Keyed(number, row, None, 0)
        try:
            fields: Any = decode_line(row) if isinstance(row, bytes) else row
            parse = parse_prompt if self.prompts else parse_row
            item = parse(fields, self.options, unused)  # which sees to it that the row has fields
            return _Keyed(number, item, row_id(fields), group_hash(fields, self.options.group_by))
        except BadRowError as error:
            return _Keyed(number, error, None, 0)

    def _encode(self, parsed: list[Parsed]) -> list[TokenizedDocument | BadRowError]:
        chats = [item for item in parsed if isinstance(item, Conversation)]
        texts = [item.text for item in parsed if isinstance(item, PlainText)]
        encoded_chats = iter(self.template.encode(chats, add_generation_prompt=self.prompts))
        encoded_texts = iter(self.template.encode_texts(texts))
        results: list[TokenizedDocument | BadRowError] = []
        for item in parsed:
            if isinstance(item, Conversation):
                results.append(next(encoded_chats))
            elif isinstance(item, PlainText):
                results.append(next(encoded_texts))
            else:
                results.append(self._known_tokens(item) if isinstance(item, TokenizedDocument) else item)
            if self.prompts and isinstance(found := results[-1], TokenizedDocument):
                results[-1] = self._whole_prompt(found)
        return results

    def _known_tokens(self, document: TokenizedDocument) -> TokenizedDocument | BadRowError:
        count = len(self.template.tokenizer)
        if not document.input_ids or max(document.input_ids) < count:
            return document
        return BadRowError("not tokens", f"id {max(document.input_ids)} is none of the tokenizer's {count}")

    def _whole_prompt(self, prompt: TokenizedDocument) -> TokenizedDocument | BadRowError:
        length, limit = len(prompt.input_ids), self.options.max_length
        if length <= limit:
            return prompt
        return BadRowError("prompt too long", f"{length} tokens do not fit into {limit}; shorten it")

    def _fit(self, item: Parsed, document: TokenizedDocument) -> list[TokenizedDocument]:
        """The document as it is, or what is left of one that is too long."""
        limit = self.options.max_length
        if len(document.input_ids) <= limit:
            return [document]
        if self.options.truncation == "split":
            return split(document, limit)
        if self.options.truncation == "truncate_end":
            return [truncate_end(document, limit)]
        if self.options.truncation == "truncate_turns" and isinstance(item, Conversation):
            shorter = truncate_turns(item, self.template, limit)
            return [] if shorter is None else [shorter]
        return []


def _trains(document: TokenizedDocument) -> bool:
    return any(end > max(start, 1) for start, end in document.spans)


def encode_all(jobs: Iterator[Job], encoder: Encoder, num_proc: int) -> Iterator[Chunk]:
    """Tokenise chunk after chunk.

    Args:
        jobs: The rows.
        encoder: Turns them into tokens.
        num_proc: Processes to use.

    Yields:
        The chunks in the order of the jobs, whatever the number of processes.
    """
    if num_proc == 1:
        yield from map(encoder.encode, jobs)
        return
    with fork_safe_tokenizers(), ProcessPoolExecutor(num_proc, _context(), _set_encoder, (encoder,)) as pool:
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


def _context() -> multiprocessing.context.BaseContext:
    # Forking needs no second import of everything; where a platform cannot, its own default does.
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


@contextmanager
def fork_safe_tokenizers() -> Iterator[None]:
    """Keep tokenizers from using, in a forked process, threads that only its parent has."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _chunk(
    job: Job,
    kept: list[tuple[_Keyed, TokenizedDocument]],
    dropped: Counter[str],
    bad: list[tuple[int, str]],
    cut: int,
    unused: Counter[str],
) -> Chunk:
    def flat(lists: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        lengths = np.array([len(item) for item in lists], dtype=np.int32)
        return np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(lengths.sum())), lengths

    input_ids, lengths = flat([encoded.input_ids for _, encoded in kept])
    spans, span_lengths = flat([list(chain.from_iterable(encoded.spans)) for _, encoded in kept])
    return Chunk(
        source=job.source,
        read=len(job.rows),
        rows=np.array([row.number for row, _ in kept], dtype=np.int64),
        input_ids=input_ids,
        lengths=lengths,
        spans=spans,
        span_lengths=span_lengths,
        dropped=dict(dropped),
        bad=bad,
        cut=cut,
        unused=dict(unused),
        ids=[row.id for row, _ in kept],
        groups=np.array([row.group for row, _ in kept], dtype=np.int64),
        hashes=token_hashes(input_ids, lengths),
    )
