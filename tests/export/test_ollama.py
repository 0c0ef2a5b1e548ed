"""The Modelfile makes Ollama write the prompts of training, for each template of the family, token by token."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

import synthetic
from data.phi4 import PHI4_MINI, PHI4_MINI_REASONING
from export.ollama_peer import collate, parse_modelfile, render_go
from export.test_export import live, write
from phi3_lightning.errors import ConfigError
from phi3_lightning.export.ollama import check_ollama_from, read_chat_form, short_context, write_modelfile
from phi3_lightning.export.options import Export

TINY = Path(__file__).parents[2] / "src/phi3_lightning/assets/tiny_phi3"

# The texts of the tokenizers on the hub. Phi-4's fixed system text is shortened.
PHI3_FIRST = (
    "{{ bos_token }}{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + "
    "'<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI3_MEDIUM = (
    "{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + message['content'] + "
    "'<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)
PHI35 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + "
    "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4_TURNS = (
    "(message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' + message['content'] + "
    "'<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PHI4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + "
    "message['content'] + '<|im_end|>'}}{% elif " + PHI4_TURNS
)
FIXED = "You are Phi, a language model. Structure it as: <think> {Thought section} </think> {Solution section}. Now:"
PHI4_REASONING = f"<|im_start|>system<|im_sep|>{FIXED}<|im_end|>{{% for message in messages %}}{{% if " + PHI4_TURNS
FAMILY = {
    "Phi-3-mini": None,  # that of the tiny model's tokenizer
    "Phi-3-mini at first": PHI3_FIRST,
    "Phi-3-medium": PHI3_MEDIUM,
    "Phi-3.5-mini": PHI35,
    "Phi-4-mini": PHI4_MINI,
    "Phi-4-mini-reasoning": PHI4_MINI_REASONING,
    "Phi-4": PHI4,
    "Phi-4-reasoning": PHI4_REASONING,
}
NO_SYSTEM = ("Phi-3-medium", "Phi-4-reasoning")

U, A, S = "user", "assistant", "system"
CONTENTS = [
    "Hi there",
    "",
    " blanks around \n",
    'a "quoted" {{ .Content }} {% raw %}',
    '"""',
    "<think>x</think>y",
    "日本",
]
CHATS = [
    *([(U, content)] for content in CONTENTS),
    *([(U, "q"), (A, content), (U, "again")] for content in CONTENTS),
    *([(S, content), (U, "q")] for content in CONTENTS),
    [(S, "Be brief."), (U, "one"), (A, "1"), (U, "two"), (A, "2"), (U, "three")],
    [(U, "begun"), (A, "and cut")],
    [(U, "first"), (U, "second"), (A, "a"), (A, "b"), (U, "third")],
]


def tokenizer_of(template: str | None, *, adds_bos: bool = False, drops: bool = False) -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer; ``drops``: with role tokens that drop the white space after them, as Phi-3's do."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
    if not drops:
        definition = tokenizer.backend_tokenizer.to_str().replace('"rstrip":true', '"rstrip":false')
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(definition),
            chat_template=tokenizer.chat_template,
            **tokenizer.special_tokens_map,
        )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_sep|>", "<|im_end|>"]})
    if template is not None:
        tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


def modelfile(tokenizer, folder: Path, stop_ids=(7,), gguf="bot.gguf", **options) -> tuple[str, list[tuple[str, str]]]:
    """The Modelfile beside a tokenizer's files: its text, and its instructions as Ollama reads them."""
    tokenizer.save_pretrained(folder)
    write_modelfile(folder, list(stop_ids), gguf, **options)
    text = (folder / "Modelfile").read_bytes().decode()
    return text, parse_modelfile(text)


def go_template(tokenizer, folder: Path) -> str:
    return dict(modelfile(tokenizer, folder)[1])["template"]


def rendered(tokenizer, chat) -> str:
    messages = [{"role": role, "content": content} for role, content in collate(chat)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def ids_of_training(tokenizer, chat) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in collate(chat)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


# ---------------------------------------------------------------------- the template


@pytest.mark.parametrize("name", FAMILY)
def test_ollama_writes_each_chat_as_the_tokenizer_does(name, tmp_path):
    tokenizer = tokenizer_of(FAMILY[name])
    template = go_template(tokenizer, tmp_path)
    chats = [chat for chat in CHATS if name not in NO_SYSTEM or chat[0][0] != S]
    for chat in chats:
        assert render_go(template, chat) == rendered(tokenizer, chat)
        assert tokenizer(render_go(template, chat)).input_ids == ids_of_training(tokenizer, chat)


@pytest.mark.parametrize("name", FAMILY)
def test_white_space_that_the_tokenizer_drops_is_not_written(name, tmp_path):
    """llama.cpp drops it only for files of some names, so that a line feed would be a token more than in training."""
    tokenizer, keeps = tokenizer_of(FAMILY[name], drops=True), tokenizer_of(FAMILY[name])
    template = go_template(tokenizer, tmp_path)
    for chat in (chat for chat in CHATS if name not in NO_SYSTEM or chat[0][0] != S):
        expected = ids_of_training(tokenizer, chat)
        assert tokenizer(render_go(template, chat)).input_ids == expected
        if not any(content.startswith(" ") for _, content in chat):
            assert keeps(render_go(template, chat)).input_ids == expected
    assert "|>\n" not in template


def test_negative_control_a_line_feed_that_is_kept_is_a_token_more():
    drops, keeps = tokenizer_of(None, drops=True), tokenizer_of(None)
    text = rendered(drops, CHATS[0])
    assert drops(text).input_ids == ids_of_training(drops, CHATS[0])
    assert len(keeps(text).input_ids) > len(drops(text).input_ids)


def test_ollama_writes_each_chat_as_the_real_phi3(shared, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "phi3-mini-4k-instruct")
    template = go_template(tokenizer, tmp_path)
    assert template == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>{{ end }}{{ end }}<|assistant|>'
    )
    for chat in CHATS:
        assert tokenizer(render_go(template, chat)).input_ids == ids_of_training(tokenizer, chat)


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_a_template_without_system_messages_leaves_them_out(name, tmp_path):
    text, commands = modelfile(tokenizer_of(FAMILY[name]), tmp_path)
    template = dict(commands)["template"]
    assert render_go(template, [(S, "Be brief."), (U, "q")]) == render_go(template, [(U, "q")])
    assert "leaves system messages out" in text


def test_an_empty_system_message_is_no_message_for_phi35(tmp_path):
    template = go_template(tokenizer_of(PHI35), tmp_path)
    assert render_go(template, [(S, ""), (U, "q")]) == "<|user|>\nq<|end|>\n<|assistant|>\n"
    assert template.count("{{ if .Content }}") == 1
    assert "{{ if .Content }}" not in go_template(tokenizer_of(PHI4_MINI), tmp_path)


STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
SPARSE = (
    "{% for m in messages %}{% if m.content %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "<|assistant|>"
)


@pytest.mark.parametrize("source", [STRICT, SPARSE])
def test_templates_of_others(source, tmp_path):
    """One that refuses system messages and a beginning with an answer, and one that writes no empty message."""
    tokenizer = tokenizer_of(source)
    template = go_template(tokenizer, tmp_path)
    for chat in CHATS:
        if source is SPARSE or chat[0][0] != S:
            assert render_go(template, chat) == rendered(tokenizer, chat)


def test_cuts_are_made_before_special_tokens(tmp_path):
    """As a person would write it: the fixed text, then each turn with its own tokens."""
    template = go_template(tokenizer_of(PHI4_REASONING), tmp_path)
    assert template.startswith(
        '<|im_start|>system<|im_sep|>You are Phi, a language model. Structure it as: <think> {{ "{" }}Thought section}'
    )
    assert '{{ if eq .Role "user" }}<|im_start|>user<|im_sep|>{{ .Content }}<|im_end|>{{ else if' in template
    assert template.endswith("{{ end }}{{ end }}<|im_start|>assistant<|im_sep|>")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_beginning_of_text_is_there_once(adds_bos, tmp_path):
    tokenizer = tokenizer_of(PHI3_FIRST, adds_bos=adds_bos)
    template = go_template(tokenizer, tmp_path)
    assert template.startswith("<s>") is not adds_bos
    ids = tokenizer(render_go(template, CHATS[0])).input_ids  # as llama.cpp, which adds it for the same tokenizers
    assert ids == ids_of_training(tokenizer, CHATS[0])
    assert ids.count(tokenizer.bos_token_id) == 1


AWKWARD = [
    *('say "hi"', '"""', 'end"""\n', "{", "{{", "{% x", "}}", "\\n", "\t", "日本😀", " # no comment\nFROM x\n"),
    *("\N{NO-BREAK SPACE}", "\u200bzero width", "\U000e0001tag"),
]


@pytest.mark.parametrize("text", AWKWARD)
def test_the_text_of_a_template_survives_the_modelfile_and_go(text, tmp_path):
    raw = "{% raw %}" + text + "{% endraw %}"
    turn = f"<|user|>{raw}{{{{ m.role }}}}{{{{ m.content }}}}{raw}"
    tokenizer = tokenizer_of(f"{raw}{{% for m in messages %}}{turn}{{% endfor %}}{raw}")
    template = go_template(tokenizer, tmp_path)
    for chat in CHATS:
        assert render_go(template, chat) == rendered(tokenizer, chat)


def test_negative_control_another_template_is_noticed(tmp_path):
    template = go_template(tokenizer_of(PHI35), tmp_path)
    tokenizer = tokenizer_of(PHI35)
    for old, new in (
        ("<|end|>\n", "<|end|>"),
        ("{{ if .Content }}", '{{ if eq .Role "system" }}'),
        ("assistant", "user"),
    ):
        changed = template.replace(old, new)
        assert any(render_go(changed, chat) != rendered(tokenizer, chat) for chat in CHATS)


@pytest.mark.parametrize(
    "template",
    ["{{ .Prompt }}", "{{- .Content }}", "{{ range .Messages }}{{ .System }}{{ end }}", "{{ .Content", "a{{ end }}"],
)
def test_negative_control_the_evaluator_knows_the_subset_alone(template):
    with pytest.raises((AssertionError, TypeError)):
        render_go(template, [(U, "q")])


THINK = (Path(__file__).parents[1] / "cases/f27.think.jinja").read_text()
REFUSED = {
    "drops earlier thoughts": (THINK, "changes contents"),
    "trims": (PHI4.replace("message['content']", "message['content'] | trim"), "changes contents"),
    "system within the first user message": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}[{{ m.role }}]{% if loop.first and system %}<<{{ system }}>>{% endif %}"
        "{{ m.content }}{% endfor %}",
        "by its place",
    ),
    "another turn after an answer": (
        "{% for m in messages %}{% if not loop.first and messages[loop.index0 - 1].role == 'assistant' %}<|again|>"
        "{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "by more than its role",
    ),
    "counts turns": (
        "{% for m in messages %}<|{{ m.role }}|>{{ loop.index }}: {{ m.content }}<|end|>{% endfor %}",
        "by its place",
    ),
    "last message alone": ("<|user|>{{ messages[-1].content }}<|end|>", "loses or repeats"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_written_is_left_out_and_named(name, tmp_path):
    source, reason = REFUSED[name]
    tokenizer = tokenizer_of(source)
    with pytest.raises(ConfigError, match=reason):
        read_chat_form(tokenizer)
    with pytest.warns(UserWarning, match=f"no TEMPLATE is written, since the chat template .*{reason}"):
        text, commands = modelfile(tokenizer, tmp_path)
    assert [name for name, _ in commands] == ["from", "stop"]
    assert re.search(f"# There is no TEMPLATE, since the chat template .*{reason}", text)


# ---------------------------------------------------------------------- the rest of the file


def test_a_whole_model(tmp_path):
    tokenizer = tokenizer_of(None)
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    text, commands = modelfile(tokenizer, tmp_path, stop_ids=(end, eos, end))
    assert [command for command in commands if command[0] != "template"] == [
        ("from", "./bot.gguf"),
        ("stop", "<|end|>"),
        ("stop", "<|endoftext|>"),
    ]
    assert str(tmp_path) not in text


def test_an_adapter_is_on_its_base(tmp_path):
    text, commands = modelfile(tokenizer_of(None), tmp_path, adapter_of="microsoft/Phi-3-mini-4k-instruct")
    assert commands[:2] == [("from", "./Phi-3-mini-4k-instruct.gguf"), ("adapter", "./bot.gguf")]
    assert "base of the adapter, Phi-3-mini-4k-instruct" in text
    _, commands = modelfile(tokenizer_of(None), tmp_path, adapter_of="o/n", ollama_from="phi3:3.8b")
    assert commands[:2] == [("from", "phi3:3.8b"), ("adapter", "./bot.gguf")]
    _, commands = modelfile(tokenizer_of(None), tmp_path, adapter_of="o/n", ollama_from="../my bases/phi 3.gguf")
    assert commands[0] == ("from", "../my bases/phi 3.gguf")


def test_a_longrope_model_keeps_the_factors_of_short_texts(tmp_path):
    assert "num_ctx" not in modelfile(tokenizer_of(None), tmp_path)[0]
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    config = synthetic.tiny_config(original_max_position_embeddings=64, rope_parameters=factors)
    assert short_context(config) == 64
    assert short_context(synthetic.tiny_config()) is None
    text, commands = modelfile(tokenizer_of(None), tmp_path, context=short_context(config))
    assert ("num_ctx", "64") in commands
    assert "rotary factors of long texts" in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/home/me/phi3.gguf", "absolute path"),
        ("~/phi3.gguf", "absolute path"),
        ("", "no name"),
        ("a\nSYSTEM b", "no name"),
    ],
)
def test_a_name_that_is_no_part_of_a_file_for_others_is_refused(name, reason, tmp_path):
    with pytest.raises(ConfigError, match=f"--ollama_from: .*{reason}.* give "):
        check_ollama_from(name)
    with pytest.raises(ConfigError, match=reason):
        modelfile(tokenizer_of(None), tmp_path, adapter_of="o/n", ollama_from=name)
    assert not (tmp_path / "Modelfile").exists()


def test_the_template_of_the_export_counts(tmp_path):
    """A template of its own, which export writes to chat_template.jinja, wins over the tokenizer's."""
    tokenizer_of(None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(PHI4)
    write_modelfile(tmp_path, [7], "bot.gguf")
    assert "<|im_sep|>" in (tmp_path / "Modelfile").read_text()


# ---------------------------------------------------------------------- within an export


def test_an_adapter_in_gguf_has_a_modelfile(base_folder, tmp_path):
    pytest.importorskip("gguf")
    write(live(base_folder()), tmp_path / "out", format="gguf", ollama_from="phi3:3.8b")
    text = (tmp_path / "out/Modelfile").read_text()
    commands = parse_modelfile(text)
    assert commands[0] == ("from", "phi3:3.8b")
    assert [(tmp_path / "out" / value).is_file() for name, value in commands if name == "adapter"] == [True]
    assert str(tmp_path) not in text


@pytest.mark.parametrize(("name", "options"), [("phi3", {}), ("/base.gguf", {"format": "gguf"})])
def test_what_from_cannot_name_is_refused_before_the_work(name, options):
    pytest.importorskip("gguf")
    with pytest.raises(ConfigError, match="--ollama_from"):
        Export(ollama_from=name, **options)
