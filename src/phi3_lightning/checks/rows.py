"""A few of the user's rows as training would see them, and a few that are known to be good.

Only the first rows are tokenised, and nothing is written to the cache.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phi3_lightning.config.data import DataConfig, RowOptions
from phi3_lightning.data.chunk import Chunk, Job, note_kinds
from phi3_lightning.data.collate import Document
from phi3_lightning.data.context_length import ContextLength
from phi3_lightning.data.conversation import Conversation, Kind
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.formats import parse_row
from phi3_lightning.data.pairs import conversations
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
    conversations: list[Conversation]
    """Its conversation, or both of a pair; none for plain texts and ready-made ids."""

    @property
    def _better(self) -> Document:
        return self.document.sides()[0]

    @property
    def _answer_start(self) -> int:
        start, end = map(int, self._better.spans[-2:])
        return start if start > 1 else max(end // 2, 1)  # of a text that is trained whole, the second half

    @property
    def question(self) -> list[int]:
        """The tokens before the last answer, or the chosen one."""
        return list(map(int, self._better.input_ids[: self._answer_start]))

    @property
    def answer(self) -> list[int]:
        """The tokens of the last answer, or the chosen one, with the token that ends it."""
        return list(map(int, self._better.input_ids[self._answer_start : self._better.spans[-1]]))


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
    kinds: dict[Kind, str] = field(default_factory=dict)
    """The kind of the rows, with the place of the first."""
    labels: Counter[bool] = field(default_factory=Counter)
    """Good and bad answers, of answers with a label."""

    def add(self, chunk: Chunk, source: Source, stop_ids: list[int]) -> list[tuple[int, Document]]:
        """Count a chunk of tokenised rows, and return number and document of each that training would use."""
        self.read += chunk.read
        self.dropped.update(chunk.dropped)
        self.bad += [f"{source.place(number)}: {why}" for number, why in chunk.bad]
        note_kinds(self.kinds, chunk, source)
        numbers = chunk.rows.tolist()
        documents = chunk.documents(range(self.documents, self.documents + len(numbers)))
        for document in documents:
            trained = [_supervised(side) for side in document.sides()]
            self.endless += not all(np.isin(tokens, stop_ids).any() for tokens in trained)
            self.empty += any(np.isin(tokens, stop_ids).all() for tokens in trained)
            if document.kind == "labelled":
                self.labels[bool(document.preferred)] += 1
            self.tokens += len(document.input_ids)
            self.supervised += sum(map(len, trained))
        self.documents += len(documents)
        return list(zip(numbers, documents, strict=True))


def _supervised(document: Document) -> NDArray[np.int32]:
    ids = document.input_ids
    return np.concatenate([ids[max(start, 1) : end] for start, end in document.spans.reshape(-1, 2).tolist()])


def read_sample(options: DataConfig, template: ChatTemplate, context_length: ContextLength | None) -> Sample:
    """Read the first rows of the training data, and choose those that are checked.

    These differ in their questions, since one question with two answers cannot be overfitted.

    Raises:
        DataError: If a file cannot be read, or rows are of two kinds.
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
            rows.append(Row(source.place(number), document, conversations(parsed)))
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


def packaged_rows(template: ChatTemplate, kind: Kind = "chat") -> list[Row]:
    """Return rows that are known to be good: the first exchanges of the package's chats, in the user's template.

    The worse answer of a pair is that of another chat, and so is every second labelled answer, which is a bad one.

    Raises:
        DataError: If the template cannot render them.
    """
    text = (files("phi3_lightning") / "assets/tiny_phi3/chats_train.jsonl").read_text(encoding="utf-8")
    chats = [json.loads(line)["messages"] for line in text.splitlines()]
    chats = [chat[:2] for chat in chats if chat[0]["role"] == "user"]  # not every template knows system messages
    rows = _shortest(_encoded([{"messages": chat} for chat in chats], template))
    if kind == "chat":
        return rows
    shortest = [[message["content"] for message in row.conversations[0].messages] for row in rows]
    changed: list[dict[str, Any]] = []
    for index, (question, answer) in enumerate(shortest):
        other = next(text for _, text in [*shortest[index:], *shortest[:index]] if text != answer)
        if kind == "pair":
            changed.append({"prompt": question, "chosen": answer, "rejected": other})
        else:
            good = index % 2 == 0
            changed.append({"prompt": question, "completion": answer if good else other, "label": good})
    return _encoded(changed, template)


def _encoded(rows: list[dict[str, Any]], template: ChatTemplate) -> list[Row]:
    encoder = Encoder(template, RowOptions())
    chunk = encoder.encode(Job(0, list(enumerate(rows, start=1))))
    if chunk.bad:
        raise DataError(f"a chat of the package cannot be rendered: {chunk.bad[0][1]}")
    documents = chunk.documents(range(len(rows)))
    return [
        Row(f"packaged chat {number}", document, conversations(parse_row(row, encoder.options)))
        for number, (row, document) in enumerate(zip(rows, documents, strict=True), start=1)
    ]
