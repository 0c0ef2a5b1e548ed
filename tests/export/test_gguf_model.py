"""A whole model in GGUF: what the converter needs and wrote is checked, whatever the converter is.

It is a stand-in here; examples/llama_cpp_check.py and tests/project run llama.cpp's own.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedTokenizerFast

from export.test_export import TINY, live, write
from phi3_lightning.errors import ConfigError, ModelError
from phi3_lightning.export import gguf_model
from phi3_lightning.export.gguf_model import check_needs, prepare, record_name
from phi3_lightning.export.options import Export, find_converter

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3,
        "partial_rotary_factor": 0.75,
    },
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TINY)


class StandIn:
    """Writes what llama.cpp's converter of Phi-3 writes, in this process; ``fault`` changes it on the way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault = ""
        self.calls: list[list[str]] = []
        monkeypatch.setattr(gguf_model.subprocess, "run", self.run)
        monkeypatch.setattr(gguf_model, "find_spec", lambda _: True)  # sentencepiece

    def run(self, command: list[str], **_options) -> SimpleNamespace:
        self.calls.append(command)
        if "--print-supported-models" in command:
            return SimpleNamespace(returncode=0, stdout="  - Phi3ForCausalLM\n", stderr="")
        if self.fault == "fails":
            return SimpleNamespace(returncode=1)
        options = dict(zip(command[3::2], command[4::2], strict=True))
        self.write(Path(command[2]), options["--outfile"], options["--outtype"], options["--model-name"])
        return SimpleNamespace(returncode=0)

    def write(self, folder: Path, file: str, kind: str, name: str) -> None:
        config, writer = AutoConfig.from_pretrained(folder), gguf.GGUFWriter(file, "phi3")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        rope = config.rope_parameters
        writer.add_name("another" if self.fault == "name" else name)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(4 if self.fault == "head_count_kv" else config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(8 * rope.get("partial_rotary_factor", 1.0)))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        tokens[5] = "other" if self.fault == "token" else tokens[5]
        writer.add_token_list(tokens)
        writer.add_eos_token_id(1 if self.fault == "eos_token_id" else tokenizer.eos_token_id)
        writer.add_add_bos_token(settings["add_bos_token"] != (self.fault == "add_bos_token"))
        writer.add_chat_template("{{ x }}" if self.fault == "chat_template" else tokenizer.chat_template)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config.num_hidden_layers)
        for file_name in folder.glob("*.safetensors"):
            for ours, tensor in load_file(file_name).items():
                if self.fault != "tensor" or "o_proj" not in ours:
                    values = tensor.float().numpy() * (1.5 if self.fault == "values" else 1)
                    half = kind == "f16" and values.ndim > 1
                    writer.add_tensor(
                        names.get_name(ours, (".weight",)), values.astype("float16" if half else "float32")
                    )
        if "long_factor" in rope:
            writer.add_rope_scaling_attn_factors(1.0 if self.fault == "attn_factor" else (1 + 1 / 8) ** 0.5)
            for which in () if self.fault == "rope_factors" else ("long", "short"):
                factors = torch.tensor(rope[f"{which}_factor"]) + (self.fault == "factors")
                writer.add_tensor(f"rope_factors_{which}.weight", factors.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@pytest.fixture
def converter(monkeypatch) -> StandIn:
    return StandIn(monkeypatch)


@pytest.fixture
def checkout(tmp_path) -> str:
    """A folder that looks like llama-cpp-python's source package."""
    folder = tmp_path / "package/vendor/llama.cpp"
    folder.mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text("")
    return str(tmp_path / "package")


@pytest.fixture
def base(base_folder, monkeypatch):
    """A function that writes a base with rows for every token, and the vocabulary file that Phi-3 has."""
    monkeypatch.setattr(gguf_model, "_is_byte_level", lambda _: True)
    return lambda **changes: base_folder(vocab_size=1024, **changes)


def export(module, target: Path, checkout: str, **options):
    return write(module, target, format="gguf", merge=True, llama_cpp=checkout, **options)


@pytest.mark.parametrize("kind", [{}, {"tie_word_embeddings": True}, LONGROPE], ids=["untied", "tied", "longrope"])
def test_a_whole_model_is_certified(base, checkout, converter, tmp_path, kind):
    exported = export(live(base(**kind)), tmp_path / "out", checkout)
    assert exported.certificate.holds
    assert exported.certificate.adapter.max_logit > 100 * exported.certificate.export.max_logit
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "Modelfile", "README.md", "certificate.json", "generation_config.json", "out-F32.gguf",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "llama-cli -m out-F32.gguf --jinja" in card
    assert "A model fine-tuned from `owner/name`" in card


def test_adapters_that_llama_cpp_does_not_apply_can_be_merged(base, checkout, converter, tmp_path):
    lora = {"r": 4, "use_dora": True, "modules_to_save": ["lm_head"]}
    assert export(live(base(), lora=lora), tmp_path / "out", checkout, dtype="f16").certificate.holds
    assert (tmp_path / "out/out-F16.gguf").is_file()
    assert converter.calls[-1][5:7] == ["--outtype", "f16"]


FAULTS = {
    "fails": "ended with status 1.*nothing was written",
    "tensor": r"other tensors than the model has: blk\.0\.attn_output\.weight",
    "values": "does not answer as the live model does",
    "name": "general.name",
    "head_count_kv": "phi3.attention.head_count_kv",
    "token": "other values than model and tokenizer have",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "add_bos_token": "tokenizer.ggml.add_bos_token",
    "chat_template": "tokenizer.chat_template",
    "attn_factor": "phi3.rope.scaling.attn_factor",
    "rope_factors": "other tensors than the model has: rope_factors_long",
    "factors": "rope_factors_long.weight",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_differs_from_the_model_is_refused(base, checkout, converter, tmp_path, fault):
    converter.fault = fault
    with pytest.raises(ModelError, match=FAULTS[fault]):
        export(live(base(**LONGROPE)), tmp_path / "out", checkout)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "package"}


def test_a_folder_without_the_converter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--llama_cpp: .* has no convert_hf_to_gguf\.py; give a checkout"):
        find_converter(str(tmp_path))
    with pytest.raises(ConfigError, match="is an address"):
        find_converter("https://example.org/llama.cpp")
    with pytest.raises(ConfigError, match="has no convert_hf_to_gguf"):  # before a base is loaded
        Export("gguf", merge=True, llama_cpp=str(tmp_path))


def test_a_checkout_and_a_source_package_are_taken(checkout):
    expected = Path(checkout) / "vendor/llama.cpp/convert_hf_to_gguf.py"
    assert find_converter(checkout) == find_converter(f"{checkout}/vendor/llama.cpp") == expected


def test_a_vocabulary_that_the_converter_cannot_read_is_refused(checkout, converter, tmp_path, monkeypatch):
    program = find_converter(checkout)
    with pytest.raises(ConfigError, match=r"from tokenizer\.model, and the tokenizer's folder has none; copy it"):
        check_needs(program, TINY)
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"")
    check_needs(program, tmp_path)
    monkeypatch.setattr(gguf_model, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install sentencepiece"):
        check_needs(program, tmp_path)


@pytest.mark.parametrize(
    ("program", "reason"),
    [("import absent_package", "absent_package"), ("print('LlamaForCausalLM')", "no output"), ("", "no output")],
)
def test_a_converter_that_cannot_run_is_refused_before_the_work(checkout, tmp_path, program, reason):
    converter = find_converter(checkout)
    converter.write_text(program)
    (tmp_path / "tokenizer.json").write_text('{"pre_tokenizer": {"type": "ByteLevel"}}')
    with pytest.raises(ConfigError, match=rf"does not list Phi3ForCausalLM \(.*{reason}.*\); it needs"):
        check_needs(converter, tmp_path)


def test_what_the_converter_would_guess_is_written(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text('{"pre_tokenizer": {"type": "Sequence", "x": [{"type": "ByteLevel"}]}}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    prepare(tmp_path, tokenizer)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Phi3ForCausalLM"]
    (tmp_path / "tokenizer.json").write_text('{"pre_tokenizer": null}')  # SentencePiece's
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    prepare(tmp_path, tokenizer)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"


def test_the_recorded_name_makes_llama_cpp_drop_the_white_space_that_phi3_drops(tokenizer):
    assert record_name("bot", tokenizer) == "bot phi-3"
    assert record_name("my-Phi-3.5-bot", tokenizer) == "my-Phi-3.5-bot"
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(
        {**json.loads(tokenizer.backend_tokenizer.to_str()), "added_tokens": []}
    )))  # fmt: skip
    assert record_name("phi3-bot", other) == "phi 3-bot"  # its tokens drop nothing


def test_a_tokenizer_that_drops_more_white_space_than_llama_cpp_is_a_warning(tokenizer):
    with pytest.warns(match=r"llama\.cpp keeps the white space after .*<\|assistant\|>.*other ids there"):
        gguf_model.warn_of_white_space(tokenizer, "bot")
    gguf_model.warn_of_white_space(tokenizer, "bot phi-3")  # warnings are errors here
