"""A few of the user's rows as training would see them, and a few that are known to be good.

Only the first rows are tokenised, and nothing is written to the cache.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from phi3_lightning.config.data import DataConfig
from phi3_lightning.data.collate import Document
from phi3_lightning.data.context_length import ContextLength
from phi3_lightning.data.conversation import BadRowError, Conversation
from phi3_lightning.data.encode import Chunk, Job
from phi3_lightning.data.formats import parse_row
from phi3_lightning.data.readers import decode_line
from phi3_lightning.data.sources import Source, find_sources
from phi3_lightning.data.splits import make_encoder
from phi3_lightning.data.tables import source_rows
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.errors import DataError

CHECKED_ROWS = 8
"""Rows that are checked and overfitted."""
SAMPLED_ROWS = 512
"""Rows that are read to find the shortest."""
MAX_ROW_TOKENS = 1024
"""Tokens beyond which a row is not taken, so that time and memory stay bounded."""


@dataclass(frozen=True)
class Row:
    """One row."""

    place: str
    """Where it came from."""
    document: Document
    """Its tokens and supervised spans."""
    conversation: Conversation | None
    """Its turns; None for plain texts and ready-made ids, which have none."""

    @property
    def _answer_start(self) -> int:
        start, end = map(int, self.document.spans[-2:])
        return start if start > 1 else max(end // 2, 1)  # of a text that is trained whole, the second half

    @property
    def question(self) -> list[int]:
        """The tokens before the last answer."""
        return list(map(int, self.document.input_ids[: self._answer_start]))

    @property
    def answer(self) -> list[int]:
        """The tokens of the last answer, with the one that ends it."""
        return list(map(int, self.document.input_ids[self._answer_start : self.document.spans[-1]]))


@dataclass
class Sample:
    """The first rows of the training data, counted, and the few that are checked."""

    rows: list[Row] = field(default_factory=list)
    """Those that are checked."""
    read: int = 0
    documents: int = 0
    """Documents that training would use."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    bad: list[str] = field(default_factory=list)
    """Place and fault of the rows that cannot be used."""
    endless: int = 0
    """Documents in which no supervised token ends a turn."""
    empty: int = 0
    """Documents in which nothing but ends of turns is supervised."""
    tokens: int = 0
    supervised: int = 0
    """Supervised ones among the tokens of the documents."""

    def add(self, chunk: Chunk, source: Source, stop_ids: list[int]) -> list[tuple[int, Document]]:
        """Count a chunk of tokenised rows, and return number and document of each that training would use."""
        self.read += chunk.read
        self.dropped.update(chunk.dropped)
        self.bad += [f"{source.place(number)}: {why}" for number, why in chunk.bad]
        tokens = _split(chunk.input_ids, chunk.lengths)
        spans = _split(chunk.spans, chunk.span_lengths)
        documents = []
        for number, ids, edges in zip(chunk.rows.tolist(), tokens, spans, strict=True):
            supervised = np.concatenate([ids[max(a, 1) : b] for a, b in edges.reshape(-1, 2).tolist()])
            ends = np.isin(supervised, stop_ids)
            self.endless += not ends.any()
            self.empty += bool(ends.all())
            self.tokens += len(ids)
            self.supervised += len(supervised)
            documents.append((number, Document(self.documents, ids, edges)))
            self.documents += 1
        return documents


def _split(values: NDArray[np.int32], lengths: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    return [values[start:end] for start, end in pairwise(np.cumsum([0, *lengths]).tolist())]


def read_sample(options: DataConfig, template: ChatTemplate, context_length: ContextLength | None) -> Sample:
    """Read the first rows of the training data, and choose those that are checked.

    These differ in their questions, since one question with two answers cannot be overfitted.

    Raises:
        DataError: If a file cannot be read.
    """
    encoder = make_encoder("train", options, template, context_length)
    sources = find_sources(options.files("train") or [], streaming=True)
    sample = Sample()
    rows: list[Row] = []
    for index, source in enumerate(sources):
        numbered = list(islice(source_rows(source, options), max(SAMPLED_ROWS // len(sources), 1)))
        contents = dict(numbered)
        for number, document in sample.add(encoder.encode(Job(index, numbered)), source, template.stop_ids):
            raw = contents[number]
            parsed = parse_row(decode_line(raw) if isinstance(raw, bytes) else raw, encoder.options)
            rows.append(Row(source.place(number), document, parsed if isinstance(parsed, Conversation) else None))
        if sample.read >= SAMPLED_ROWS:
            break
    sample.rows = _shortest(rows)
    return sample


def _shortest(rows: list[Row]) -> list[Row]:
    """The shortest with an answer, one for each question."""
    by_question: dict[tuple[int, ...], Row] = {}
    for row in sorted(rows, key=lambda row: (len(row.answer) == 1, len(row.document.input_ids))):
        if len(row.document.input_ids) <= MAX_ROW_TOKENS:
            by_question.setdefault(tuple(row.question), row)
        if len(by_question) == CHECKED_ROWS:
            break
    return list(by_question.values())


def packaged_rows(template: ChatTemplate) -> list[Row]:
    """Return rows that are known to be good: the first exchanges of the package's chats, in the user's template.

    Raises:
        DataError: If the template cannot render them.
    """
    text = (files("phi3_lightning") / "assets/tiny_phi3/chats_train.jsonl").read_text(encoding="utf-8")
    chats = [json.loads(line)["messages"] for line in text.splitlines()]
    chats = [chat[:2] for chat in chats if chat[0]["role"] == "user"]  # not every template knows system messages
    conversations = [Conversation(chat, [False, True]) for chat in chats]
    rows = []
    for number, (chat, encoded) in enumerate(zip(conversations, template.encode(conversations), strict=True), start=1):
        if isinstance(encoded, BadRowError):
            raise DataError(f"a chat of the package cannot be rendered: {encoded}")
        spans = np.array([edge for span in encoded.spans for edge in span], dtype=np.int32)
        document = Document(number, np.array(encoded.input_ids, dtype=np.int32), spans)
        rows.append(Row(f"packaged chat {number}", document, chat))
    return _shortest(rows)
