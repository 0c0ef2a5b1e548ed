"""Ready-made tokens: padding is removed, and labels and masks say which tokens are trained."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.config.data import MASKS
from phi3_lightning.data.conversation import BadRowError, TokenizedDocument
from phi3_lightning.data.fields import is_absent, read_list


def read_tokens(fields: Mapping[str, Any]) -> TokenizedDocument:
    """Read a row of token ids without its padding.

    It has ``input_ids`` with ``labels``, unshifted, or with a mask of what is trained, or both; and perhaps an
    ``attention_mask`` that hides padding on one side or both.

    Raises:
        BadRowError: If lists differ in length, a mask has a hole, or several documents share the row.
    """
    ids = [_int_if_whole(token) for token in read_list(fields["input_ids"], "input_ids")]
    tokens = [token for token in ids if type(token) is int and 0 <= token < 2**31]
    masks = [_mask(fields, name, len(ids)) for name in MASKS if not is_absent(fields.get(name))]
    has_labels = fields.get("labels") is not None
    if not has_labels and not masks:
        raise BadRowError(
            "no labels",
            "'input_ids' alone do not say which tokens are trained; add 'labels' (a copy of them if all are), or one "
            f"of {', '.join(map(repr, MASKS))}",
        )
    labels = read_list(fields["labels"], "labels") if has_labels else ids
    if len(tokens) != len(ids) or len(labels) != len(ids):
        raise BadRowError("not tokens", "'input_ids' and 'labels' are lists of token ids of one length")
    start, end = _unpadded_range(fields, len(ids))
    _check_one_document(fields, start, end)
    if any(label not in (IGNORE_INDEX, token) for token, label in zip(ids[start:end], labels[start:end], strict=True)):
        fault = f"a label is the token itself, not the next one, or {IGNORE_INDEX}"
        raise BadRowError("labels differ from input_ids", fault)
    trained = [label != IGNORE_INDEX and all(flags) for label, *flags in zip(labels, *masks, strict=True)]
    return TokenizedDocument(tokens[start:end], _spans(trained[start:end]))


def _unpadded_range(fields: Mapping[str, Any], length: int) -> tuple[int, int]:
    if is_absent(fields.get("attention_mask")):
        return 0, length
    mask = _mask(fields, "attention_mask", length)
    count = sum(mask)
    start = mask.index(1) if count else 0
    if not all(mask[start : start + count]):
        raise BadRowError("attention_mask has a hole", "a token between others is hidden; padding is only at the ends")
    return start, start + count


def _check_one_document(fields: Mapping[str, Any], start: int, end: int) -> None:
    lengths = fields.get("seq_lengths")
    positions = fields.get("position_ids")
    positions = [] if is_absent(positions) else read_list(positions, "position_ids")[start:end]
    is_packed = isinstance(lengths, list) and len(lengths) > 1
    if is_packed or (positions and positions != list(range(end - start))):
        name = "seq_lengths" if is_packed else "position_ids"
        raise BadRowError(
            "several documents in one row",
            f"{name!r} does not count from 0 to the end; give each document its own row",
        )
    types = fields.get("token_type_ids")
    if not is_absent(types) and any(read_list(types, "token_type_ids")):
        raise BadRowError("token types", "'token_type_ids' are not all 0, but the model has no such types; remove them")


def _spans(trained: list[bool]) -> list[tuple[int, int]]:
    spans, position = [], 0
    for is_trained, run in groupby(trained):
        end = position + len(list(run))
        if is_trained:
            spans.append((position, end))
        position = end
    return spans


def _mask(fields: Mapping[str, Any], name: str, length: int) -> list[int]:
    mask = read_list(fields[name], name)
    if len(mask) != length or any(value not in (0, 1) for value in mask):
        raise BadRowError("not a mask", f"'{name}' has one 0 or 1 for each of the {length} tokens of 'input_ids'")
    return [int(value) for value in mask]


def _int_if_whole(value: object) -> object:
    """The integer of a whole number that a table with gaps holds as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
