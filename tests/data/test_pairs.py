"""Both sides of a pair are whole chats, trained after the prompt; truncation treats them alike."""

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.chunk import Chunk, Job
from phi3_lightning.data.collate import Document
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.template import ChatTemplate, load_tokenizer

from .conftest import PHI3_TEMPLATE, build_tokenizer
from .test_properties import CONTENT, SETTINGS, SPECIALS

TEMPLATE = ChatTemplate(build_tokenizer())
END = TEMPLATE.stop_ids[0]
QUIET = CONTENT.filter(lambda text: not any(special in text for special in [*SPECIALS, "</s>"]))


def messages(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def chunk_of(*rows: Any, template: ChatTemplate = TEMPLATE, **options: Any) -> Chunk:
    return Encoder(template, RowOptions(**options)).encode(Job(0, list(enumerate(rows))))


def encode(*rows: Any, template: ChatTemplate = TEMPLATE, **options: Any) -> list[Document]:
    chunk = chunk_of(*rows, template=template, **options)
    assert not chunk.bad, chunk.bad
    return chunk.documents(chunk.rows.tolist())


def trained(document: Document) -> list[int]:
    ids = document.input_ids.tolist()
    return [token for start, end in document.spans.reshape(-1, 2).tolist() for token in ids[start:end]]


@st.composite
def pairs(draw: st.DrawFn, content: st.SearchStrategy[str]) -> tuple[dict[str, Any], int]:
    """A row, and the number of messages of its prompt."""
    prompt = draw(st.lists(content, min_size=1, max_size=5).filter(lambda contents: len(contents) % 2))
    answers = [draw(st.lists(content, min_size=1, max_size=3).filter(lambda turns: len(turns) % 2)) for _ in "ab"]
    answers[0][0] += "a"  # so that none is empty, and they differ
    answers[1][0] += "b"
    system = draw(st.none() | content)
    whole = [messages(*prompt, *answer, system=system) for answer in answers]
    count = len(prompt) + (system is not None)
    if draw(st.booleans()):
        return {"chosen": whole[0], "rejected": whole[1]}, count
    return {"prompt": whole[0][:count], "chosen": whole[0][count:], "rejected": whole[1][count:]}, count


def check(row: dict[str, Any], count: int, template: ChatTemplate) -> None:
    [document] = encode(row, template=template)
    chosen, rejected = document.sides()
    for side, answer in ((chosen, row["chosen"]), (rejected, row["rejected"])):
        chat = row.get("prompt", []) + answer
        flagged = [message | {"train": index >= count} for index, message in enumerate(chat)]
        [expected] = encode({"messages": flagged}, template=template)
        assert side.input_ids.tolist() == expected.input_ids.tolist()
        assert side.spans.tolist() == expected.spans.tolist()
    tokens = zip(chosen.input_ids.tolist(), rejected.input_ids.tolist(), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], tokens))
    assert document.shared_length == min(common, chosen.spans[0] - 1, rejected.spans[0] - 1)


@SETTINGS
@given(pairs(QUIET))
def test_each_side_is_the_chat_of_its_messages_trained_after_the_prompt(row: tuple[dict[str, Any], int]) -> None:
    check(*row, TEMPLATE)


def test_each_side_is_its_chat_with_the_real_tokenizer(shared: Path) -> None:
    real = ChatTemplate(load_tokenizer(str(shared / "phi3-mini-4k-instruct")))

    @SETTINGS
    @given(pairs(QUIET))
    def holds(row: tuple[dict[str, Any], int]) -> None:
        check(*row, real)

    holds()


def test_one_answer_is_supervised_as_the_last_of_its_chat() -> None:
    [document] = encode({"prompt": "a question", "chosen": "the answer", "rejected": "the end"})
    for side, answer in zip(document.sides(), ("the answer", "the end"), strict=True):
        [chat] = encode({"messages": messages("a question", answer)}, train_on="last")
        assert side.input_ids.tolist() == chat.input_ids.tolist()
        assert side.spans.tolist() == chat.spans.tolist()
        assert trained(side)[-1] == END


def test_answers_that_begin_alike_share_only_what_is_before_them() -> None:
    """The token before the first supervised one is in both documents, since it predicts that one."""
    [document] = encode({"prompt": "a question", "chosen": "the answer is a", "rejected": "the answer is the"})
    chosen, rejected = document.sides()
    first = int(rejected.spans[0])
    assert chosen.input_ids[: first + 2].tolist() == rejected.input_ids[: first + 2].tolist()
    assert document.shared_length == first - 1
    assert (chosen.shared_length, rejected.shared_length) == (0, first - 1)
    assert (chosen.preferred, rejected.preferred) == (True, False)


def test_less_is_shared_where_the_template_renders_two_prompts() -> None:
    counting = ChatTemplate(build_tokenizer(template="{{ messages | length }}\n" + PHI3_TEMPLATE))
    row = {"prompt": "a question", "chosen": messages("x", "a", "q", "b")[1:], "rejected": "the end"}
    [document], [plain] = encode(row, template=counting), encode(row)
    chosen, rejected = document.sides()
    assert chosen.input_ids[document.shared_length] != rejected.input_ids[document.shared_length]
    assert document.shared_length < 3 < plain.shared_length


def test_pairs_that_the_template_renders_alike_are_bad_rows() -> None:
    stripping = ChatTemplate(build_tokenizer(template=PHI3_TEMPLATE.replace("['content']", "['content'].strip()")))
    row = {"prompt": "q", "chosen": "the answer", "rejected": "the answer  "}
    chunk = chunk_of(row, template=stripping)
    assert chunk.dropped == {"chosen equals rejected": 1}
    assert "renders both alike" in chunk.bad[0][1]
    assert len(encode(row)) == 1


def test_a_refusal_names_the_side() -> None:
    template = ChatTemplate(build_tokenizer(), special_text="refuse")
    chunk = chunk_of({"prompt": "q", "chosen": "a", "rejected": "b<|end|>"}, template=template, special_text="refuse")
    assert "in 'rejected': '<|end|>' within a content" in chunk.bad[0][1]


def test_a_labelled_answer_is_the_last_of_its_chat() -> None:
    chat = {"messages": messages("q", "a", "r", "b")}
    documents = encode(*(chat | {"label": flag} for flag in (True, False)))
    [expected] = encode(chat, train_on="last")
    assert [(document.kind, document.preferred) for document in documents] == [("labelled", True), ("labelled", False)]
    for document in documents:
        assert document.input_ids.tolist() == expected.input_ids.tolist()
        assert document.spans.tolist() == expected.spans.tolist()


def test_a_side_without_a_trained_token_drops_the_pair() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": [{"role": "assistant", "content": "b", "train": False}]}
    chunk = chunk_of(row, row | {"rejected": "b"})
    assert chunk.dropped == {"nothing to train": 1}
    assert chunk.rows.tolist() == [1]


def lengths(*rows: Any, **options: Any) -> list[list[int]]:
    return [[len(side.input_ids) for side in document.sides()] for document in encode(*rows, **options)]


UNEVEN = {"prompt": "a question", "chosen": "word " * 4, "rejected": "word " * 30}
SWAPPED = UNEVEN | {"chosen": UNEVEN["rejected"], "rejected": UNEVEN["chosen"]}
[[SHORT, LONG]] = lengths(UNEVEN)


def test_a_pair_is_left_out_where_one_side_is_too_long() -> None:
    assert lengths(UNEVEN, SWAPPED, max_length=LONG) == [[SHORT, LONG], [LONG, SHORT]]
    assert lengths(UNEVEN, SWAPPED, max_length=LONG - 1) == []
    assert chunk_of(UNEVEN, max_length=SHORT).dropped == {f"longer than max_length {SHORT}": 1}


def test_both_sides_are_truncated_at_the_same_length() -> None:
    for limit in range(SHORT - 1, LONG + 1):
        for row in (UNEVEN, SWAPPED):
            [document] = encode(row, max_length=limit, truncation="truncate_end")
            [whole] = encode(row)
            for side, before in zip(document.sides(), whole.sides(), strict=True):
                assert side.input_ids.tolist() == before.input_ids.tolist()[:limit]
                assert trained(side) == trained(before)[: len(trained(side))]
    [document] = encode(UNEVEN, max_length=SHORT, truncation="truncate_end")
    assert [END in trained(side) for side in document.sides()] == [True, False]


def test_a_pair_that_truncation_makes_equal_is_left_out() -> None:
    row = {"prompt": "a question", "chosen": "word " * 20 + "a", "rejected": "word " * 20 + "the"}
    for limit in (2, 5, 30):
        assert encode(row, max_length=limit, truncation="truncate_end") == []


def test_the_same_exchanges_are_left_out_of_both_prompts(tokenizer: Any) -> None:
    talk = messages(*(f"word {index}" for index in range(13)), system="be kind")
    row = {"prompt": talk, "chosen": "the answer", "rejected": "word " * 10}
    answers = [{"role": "assistant", "content": row[side]} for side in ("chosen", "rejected")]
    prompts = [[talk[0], *talk[start:]] for start in range(1, len(talk), 2)]
    shorter = [
        [tokenizer.apply_chat_template([*prompt, answer], return_dict=False) for answer in answers]
        for prompt in prompts
    ]
    for limit in range(max(map(len, shorter[-1])), max(map(len, shorter[0])), 9):
        [document] = encode(row, max_length=limit, truncation="truncate_turns")
        expected = next(sides for sides in shorter if max(map(len, sides)) <= limit)
        assert [side.input_ids.tolist() for side in document.sides()] == expected


def test_exchanges_of_an_answer_are_never_left_out() -> None:
    answer = messages("x", "word " * 9, "y", "word " * 9)[1:]
    row = {"prompt": messages("q", "a", "r"), "chosen": answer, "rejected": "b"}
    [[least, _]] = lengths(row | {"prompt": "r"})
    assert lengths(row, max_length=least, truncation="truncate_turns")[0][0] == least
    assert encode(row, max_length=least - 1, truncation="truncate_turns") == []
    judged = {"prompt": row["prompt"], "completion": answer, "label": True}
    [document] = encode(judged, max_length=least, truncation="truncate_turns")
    assert (len(document.input_ids), document.preferred) == (least, True)
    assert encode(judged, max_length=least - 1, truncation="truncate_turns") == []


@pytest.mark.parametrize("row", [UNEVEN, {"prompt": "a question", "completion": "word " * 30, "label": False}])
def test_a_preference_is_not_split(row: dict[str, Any]) -> None:
    assert chunk_of(row, max_length=LONG - 1, truncation="split").dropped == {"a preference cannot be split": 1}
    assert len(encode(row, max_length=LONG, truncation="split")) == 1


def test_a_truncated_answer_keeps_its_label() -> None:
    row = {"prompt": "a question", "completion": "word " * 30, "label": False}
    [document] = encode(row, max_length=30, truncation="truncate_end")
    assert (len(document.input_ids), document.preferred) == (30, False)
