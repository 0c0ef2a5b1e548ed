"""Chunks of rows become chunks of token arrays, in this process or in several."""

import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lightning.data.formats import BadRowError, Conversation, parse_conversation, parse_prompt
from phi3_lightning.data.sources import Row, decode_line
from phi3_lightning.data.template import ChatTemplate, Encoded


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


@dataclass(frozen=True)
class EncodeOptions:
    """What decides, beside the tokenizer, how a row is tokenised.

    Args:
        purpose: Rows to train on, or prompts to answer.
        max_length: Tokens that a document may have.
        overlong: What becomes of longer ones.
    """

    purpose: Literal["chat", "prompt"]
    max_length: int
    overlong: Literal["drop"]


class Encoder:
    """Turns rows into tokens.

    Args:
        template: Renders conversations.
        options: How.
    """

    def __init__(self, template: ChatTemplate, options: EncodeOptions) -> None:
        self.template = template
        self.options = options

    def fingerprint(self) -> str:
        """A name for everything that decides about tokens: tokenizer, template, options and this package's code.

        Returns:
            Hexadecimal digits.
        """
        tokenizer = self.template.tokenizer
        parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, repr(tokenizer.special_tokens_map)]
        parts += [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
        return hashlib.blake2b(json.dumps([*parts, asdict(self.options)]).encode(), digest_size=16).hexdigest()

    def encode(self, job: Job) -> Chunk:
        """Tokenise a chunk of rows.

        Args:
            job: The rows.

        Returns:
            Tokens of those that can be used, and why the others cannot.
        """
        numbers, conversations, bad = self._parse(job.rows)
        prompts = self.options.purpose == "prompt"
        encoded = self.template.encode(conversations, add_generation_prompt=prompts)
        kept: list[tuple[int, Encoded]] = []
        dropped: Counter[str] = Counter()
        for number, item in zip(numbers, encoded, strict=True):
            error = item if isinstance(item, BadRowError) else self._fault(item)
            if isinstance(item, Encoded) and error is None:
                kept.append((number, item))
            elif isinstance(error, BadRowError):
                bad.append((number, error))
            else:
                dropped[str(error)] += 1
        dropped.update(error.reason for _, error in bad)
        return _chunk(job, kept, dropped, [(number, str(error)) for number, error in sorted(bad, key=lambda b: b[0])])

    def _parse(self, rows: list[Row]) -> tuple[list[int], list[Conversation], list[tuple[int, BadRowError]]]:
        parse = parse_conversation if self.options.purpose == "chat" else parse_prompt
        numbers, conversations, bad = [], [], []
        for number, row in rows:
            try:
                conversations.append(parse(decode_line(row) if isinstance(row, bytes) else row))
                numbers.append(number)
            except BadRowError as error:
                bad.append((number, error))
        return numbers, conversations, bad

    def _fault(self, encoded: Encoded) -> BadRowError | str | None:
        """Why a row is refused (an error), dropped (a reason), or neither."""
        length, limit = len(encoded.input_ids), self.options.max_length
        if self.options.purpose == "prompt":
            if length <= limit:
                return None
            return BadRowError("prompt too long", f"{length} tokens do not fit into {limit}; shorten it")
        if length > limit:
            return f"longer than max_length {limit}"
        return None if any(end > max(start, 1) for start, end in encoded.spans) else "nothing to train"


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
    with _fork_safe_tokenizers(), ProcessPoolExecutor(num_proc, _context(), _set_encoder, (encoder,)) as pool:
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
def _fork_safe_tokenizers() -> Iterator[None]:
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


def _chunk(job: Job, kept: list[tuple[int, Encoded]], dropped: Counter[str], bad: list[tuple[int, str]]) -> Chunk:
    def flat(lists: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        lengths = np.array([len(item) for item in lists], dtype=np.int32)
        return np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(lengths.sum())), lengths

    input_ids, lengths = flat([encoded.input_ids for _, encoded in kept])
    spans, span_lengths = flat([list(chain.from_iterable(encoded.spans)) for _, encoded in kept])
    rows = np.array([number for number, _ in kept], dtype=np.int64)
    return Chunk(job.source, len(job.rows), rows, input_ids, lengths, spans, span_lengths, dict(dropped), bad)
