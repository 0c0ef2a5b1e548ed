"""Chat template files are read as the text they encode, or refused with the reason."""

import json
from pathlib import Path

import pytest

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import Conversation, TokenizedDocument
from phi3_lightning.data.formats import parse_row
from phi3_lightning.data.readers import decode_line, read_rows
from phi3_lightning.data.template import ChatTemplate, load_tokenizer
from phi3_lightning.data.template_text import read_template, writes_tools
from phi3_lightning.errors import ConfigError

from .conftest import PHI3_TEMPLATE, build_tokenizer

CASES = Path(__file__).parents[1] / "cases"
CLEAN = (CASES / "f21.clean.jinja").read_text()
BOM = "\ufeff"


def ids(folder: str, template: Path) -> list[int]:
    [(_, line)] = read_rows(CASES / "f21.chat.jsonl")
    talk = parse_row(decode_line(line), RowOptions())  # type: ignore[arg-type]
    assert isinstance(talk, Conversation)
    [encoded] = ChatTemplate(load_tokenizer(folder, chat_template=str(template))).encode([talk])
    assert isinstance(encoded, TokenizedDocument)
    return encoded.input_ids


@pytest.mark.parametrize(
    "data",
    [
        (CASES / "f21.bom.jinja").read_bytes(),
        f"{CLEAN}\n".encode(),
        f"{BOM}{CLEAN}\r\n".encode(),
        f"{{# a comment\r\nof two lines #}}{CLEAN}".encode(),
        CLEAN.replace("{% endif %}", "{% endif %}\r").encode(),
        CLEAN.replace(
            "{{ '<|assistant|>\\n' }}", "{% generation %}{% endgeneration %}{{ '<|assistant|>\\n' }}"
        ).encode(),
    ],
    ids=["case", "line feed", "mark and line ends", "comment", "carriage return", "generation"],
)
def test_a_byte_order_mark_or_encoding_does_not_change_ids(tokenizer_folder: str, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "template.jinja"
    path.write_bytes(data)
    assert ids(tokenizer_folder, path) == ids(tokenizer_folder, CASES / "f21.clean.jinja")


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_a_template_file_equals_the_same_file_in_a_tokenizer_folder(tmp_path: Path, end: str) -> None:
    text = PHI3_TEMPLATE.replace("{% for", f"{end}{{% for", 1) + end
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(text.encode())
    own = ChatTemplate(load_tokenizer(str(tmp_path)))
    given = ChatTemplate(load_tokenizer(str(tmp_path), chat_template=str(tmp_path / "chat_template.jinja")))
    assert given.identity == own.identity


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (CLEAN.encode("utf-16"), ["UTF-16", "iconv -f UTF-16 -t UTF-8"]),
        (CLEAN.encode("utf-16-le"), ["UTF-16LE", "iconv"]),
        (f"{{# für #}}\n{CLEAN}".encode("latin-1"), [":1: not UTF-8 (byte 0xfc)", "iconv -f CP1252"]),
        (b"", ["is empty", "tokenizer's own"]),
        (b"\xef\xbb\xbf \n", ["is empty"]),
        (
            f"{{# one #}}\n{CLEAN.replace('{% endfor %}', '')}".encode(),
            ["template.jinja:2: not a Jinja template", "endfor"],
        ),
        (b"a\nb\n{% for %}\n", ["template.jinja:3: not a Jinja template"]),
        (json.dumps({"chat_template": CLEAN}).encode(), ["is JSON"]),
        (json.dumps(CLEAN).encode(), ["is JSON"]),
    ],
)
def test_a_file_that_is_no_template_is_named(tmp_path: Path, data: bytes, named: list[str]) -> None:
    path = tmp_path / "template.jinja"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read_template(str(path))
    message = str(error.value)
    assert message.startswith("data.chat_template: ")
    assert "\n" not in message
    assert all(part in message for part in [*named, str(path)])


def test_a_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.chat_template.*folder.*chat_template\.jinja"):
        read_template(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.chat_template: this is the text of a template"):
        read_template(CLEAN)
    for missing in (str(tmp_path / "none.jinja"), "chatml", "a\0b"):
        with pytest.raises(ConfigError, match=r"data\.chat_template: cannot read"):
            read_template(missing)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_byte_order_mark_in_the_tokenizers_own_template_is_named(tmp_path: Path, name: str) -> None:
    tokenizer = build_tokenizer(template=BOM + PHI3_TEMPLATE)
    tokenizer.save_pretrained(tmp_path, save_jinja_files=name.endswith(".jinja"))
    assert "\ufeff" in (tmp_path / name).read_text(encoding="utf-8") or "\\ufeff" in (tmp_path / name).read_text()
    with pytest.raises(ConfigError, match="byte order mark"):
        load_tokenizer(str(tmp_path))


TOOLS = [
    (CASES / "f26.tok.jinja").read_text(),
    "{% if tools %}{{ tools | tojson }}{% endif %}",
    "{% for m in messages %}{% if 'tools' in m and m['tools'] is not none %}{{ m['tools'] }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.tool_calls %}x{% endif %}{% endfor %}",
    "{% for m in messages %}{% for call in m.get('tool_calls', []) %}x{% endfor %}{% endfor %}",
    "{% for m in messages %}{% if m['role'] == 'tool' %}x{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.role in ['user', 'tool'] %}x{% endif %}{% endfor %}",
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{% generation %}{% endgeneration %}",
]
NO_TOOLS = [
    PHI3_TEMPLATE,
    CLEAN,
    (CASES / "f27.think.jinja").read_text(),
    "{# tools, tool_calls #}the tools: {{ '<|tool|>' }}{% for m in messages %}{% break %}{% endfor %}",
]


@pytest.mark.parametrize("template", TOOLS)
def test_templates_that_render_tools_are_recognised(template: str) -> None:
    assert writes_tools(template)


@pytest.mark.parametrize("template", NO_TOOLS)
def test_templates_that_ignore_tools_are_recognised(template: str) -> None:
    assert not writes_tools(template)
