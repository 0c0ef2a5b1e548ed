"""The tokenizer of an exported folder gives the ids of training, and generation stops at the end of a turn."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from phi3_lightning.errors import ModelError
from phi3_lightning.export.base_files import fetch
from phi3_lightning.export.chat_files import Chat, write_generation_config, write_tokenizer

TINY = Path(__file__).parents[2] / "src/phi3_lightning/assets/tiny_phi3"


def chat(source: Path, template: str | None = None, stop_ids: tuple[int, ...] = (7, 2)) -> Chat:
    return Chat(str(source), None, template, list(stop_ids), [])


def wrong(tokenizer, vectors) -> int:
    return sum(tokenizer(v["text"], add_special_tokens=False)["input_ids"] != v["ids"] for v in vectors)


def test_a_bare_folder_gives_the_ids_of_phi3(shared, tmp_path):
    source = shared / "phi3-mini-4k-instruct"
    vectors = json.loads((source / "vectors.json").read_text())
    write_tokenizer(chat(source), tmp_path, bare=True)
    assert not (tmp_path / "config.json").exists()
    assert wrong(AutoTokenizer.from_pretrained(tmp_path), vectors) == 0


def test_a_folder_with_a_config_keeps_the_tokenizer_class_of_the_base(shared, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in (shared / "phi3-mini-4k-instruct").glob("*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(chat(source), out, bare=False)
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    assert wrong(AutoTokenizer.from_pretrained(out), json.loads((source / "vectors.json").read_text())) == 0


def test_negative_control_the_upstream_tokenizer_class_gives_wrong_ids(shared, tmp_path):
    source = shared / "phi3-mini-4k-instruct"
    vectors = json.loads((source / "vectors.json").read_text())
    write_tokenizer(chat(source), tmp_path, bare=True)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    assert wrong(AutoTokenizer.from_pretrained(tmp_path), vectors) > 0


def test_template_special_tokens_and_padding_side_are_the_bases(tmp_path):
    write_tokenizer(chat(TINY), tmp_path, bare=True)
    here, there = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(TINY)
    for name in ("chat_template", "special_tokens_map", "all_special_ids", "padding_side", "model_max_length"):
        assert getattr(here, name) == getattr(there, name)
    assert (tmp_path / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_a_custom_template_is_exported(tmp_path):
    write_tokenizer(chat(TINY, template="{{ messages[0]['content'] }}!"), tmp_path, bare=True)
    rendered = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert rendered == "hi!"


def test_code_of_the_repository_is_not_carried_on(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    (tmp_path / "out").mkdir()
    write_tokenizer(chat(source), tmp_path / "out", bare=True)
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [7, 2]),
        ({"eos_token_id": 5, "temperature": 0.5, "do_sample": True}, [7, 2, 5]),
        ({"eos_token_id": [2, 7]}, [7, 2]),
    ],
)
def test_every_stop_token_is_named(tmp_path, given, expected):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    if given is not None:
        (base / "generation_config.json").write_text(json.dumps(given | {"use_cache": False}))
    (base / "config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}))
    write_generation_config(chat(TINY), base, out)
    found = GenerationConfig.from_pretrained(out)
    assert found.eos_token_id == expected
    assert (found.bos_token_id, found.pad_token_id, found.use_cache) == (1, 0, True)
    if given and "temperature" in given:
        assert found.temperature == 0.5


def test_a_base_that_cannot_be_found_is_refused(monkeypatch):
    def nothing(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr("phi3_lightning.export.base_files.snapshot_download", nothing)
    with pytest.raises(ModelError, match="owner/none is no folder and cannot be fetched"):
        fetch("owner/none", None, ["*.json"])


def test_a_hub_id_is_looked_up_with_its_revision(monkeypatch, tmp_path):
    request = {}

    def snapshot(name, revision, allow_patterns):
        request.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("phi3_lightning.export.base_files.snapshot_download", snapshot)
    assert fetch("owner/name", "v2", ["*.json"]) == tmp_path
    assert request == {"name": "owner/name", "revision": "v2", "patterns": ["*.json"]}
