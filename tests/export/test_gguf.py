"""An adapter in GGUF acts in llama.cpp as it does in PEFT, or is refused."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import Phi3ForCausalLM

import synthetic
from export.conftest import peft_model
from export.test_export import live, write
from phi3_lightning.adapters.targets import rank_and_scaling
from phi3_lightning.errors import ConfigError, ModelError
from phi3_lightning.export import gguf as gguf_room
from phi3_lightning.export.options import Export

PREFIX = "base_model.model."
NAMES = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""llama.cpp's names in a block of ``LLM_ARCH_PHI3`` (src/llama-arch.cpp)."""

LORA = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"qkv_proj": 3}},
    "rslora with ranks": {"use_rslora": True, "rank_pattern": {"o_proj": 2, "down_proj": 7}},
    "slices": {"backend": "loralib", "target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"]},
    "slices with ranks": {"backend": "loralib", "use_rslora": True, "rank_pattern": {"qkv_proj": 3}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
}


def tensors(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Fields and tensors of the one GGUF file in a folder, by the package's own reader."""
    [file] = folder.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    data = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, data


def theirs(path: str) -> str:
    """llama.cpp's name of a layer."""
    if not path.startswith("model.layers."):
        return {"model.embed_tokens": "token_embd", "lm_head": "output"}[path]
    _, _, block, name = path.split(".", 3)
    return f"blk.{block}.{NAMES[name]}"


@pytest.mark.parametrize("lora", LORA)
def test_llama_cpp_adds_the_delta_of_the_live_adapter(base_folder, tmp_path, lora):
    module = live(base_folder(), lora={"r": 4, "lora_alpha": 8} | LORA[lora])
    form = module.adapter.to_peft()
    assert write(module, tmp_path / "out", format="gguf").certificate.holds
    fields, data = tensors(tmp_path / "out")
    layers = {key.split(".lora_")[0].removeprefix(PREFIX) for key in form.tensors}
    assert {name.rpartition(".weight")[0] for name in data} == {theirs(path) for path in layers}
    for path in layers:
        a, b = (data[f"{theirs(path)}.weight.lora_{half}"] for half in "ab")
        embedding = path == "model.embed_tokens"
        kind, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        down, up = (form.tensors[f"{PREFIX}{path}.{kind}{half}{end}"] for half in "AB")
        # llama_adapter_lora_weight::get_scale: alpha / ne[0] of b; llm_build_inp_embd looks rows of a up by token
        found = fields["adapter.lora.alpha"] / b.shape[1] * (b @ (a.T if embedding else a))
        expected = rank_and_scaling(form.config, path)[1] * (up @ down)
        # B times a factor and the sum of at most 12 products, each rounded in float32
        torch.testing.assert_close(found, expected, rtol=0, atol=16 * 6e-8 * expected.abs().max().item())


def test_the_file_says_what_it_is_and_holds_no_path(base_folder, tmp_path):
    write(live(base_folder()), tmp_path / "out", format="gguf")
    fields, _ = tensors(tmp_path / "out")
    expected = {
        "general.architecture": "phi3", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0,
        "general.name": "out", "general.base_model.0.name": "owner/name",
        "general.base_model.0.repo_url": "https://huggingface.co/owner/name", "general.file_type": 0,
    }  # fmt: skip
    assert {key: fields[key] for key in expected} == expected
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "Modelfile", "README.md", "certificate.json", "generation_config.json", "out-F32-LoRA.gguf",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "llama-cli -m BASE.gguf --lora out-F32-LoRA.gguf --jinja" in card
    assert "A LoRA adapter for `owner/name`" in card
    assert json.loads((tmp_path / "out/certificate.json").read_text())["holds"] is True


def test_longrope_is_run_with_the_context_of_short_chats(base_folder, tmp_path):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    base = base_folder(rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
                       max_position_embeddings=512)  # fmt: skip
    hint = write(live(base), tmp_path / "out", format="gguf").serving
    assert "--jinja -c 256 " in hint


def test_half_precision_is_certified(base_folder, tmp_path):
    exported = write(live(base_folder()), tmp_path / "out", format="gguf", dtype="f16")
    assert (tmp_path / "out/out-F16-LoRA.gguf").is_file()
    _, data = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in data.values()} == {torch.float16}
    assert exported.certificate.holds
    assert 0 < exported.certificate.export.max_logit < exported.certificate.adapter.max_logit / 100


def test_values_beyond_half_precision_are_refused(base_folder, tmp_path):
    module = live(base_folder())
    next(parameter for name, parameter in module.model.named_parameters() if "lora_A" in name).data[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"--dtype f16: blk\.0\.\S+ has values beyond its range; write f32"):
        write(module, tmp_path / "out", format="gguf", dtype="f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lora", "base", "message"),
    [
        ({"use_dora": True}, {}, "matrices A and B alone, .*lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, {}, r"matrices A and B alone, .*lm_head\.weight"),
        (
            {"target_modules": ["embed_tokens", "o_proj"]},
            {"tie_word_embeddings": True},
            "shares its weight with lm_head",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_what_llama_cpp_does_not_apply_is_refused(base_folder, tmp_path, lora, base, message):
    module = live(base_folder(**base), lora={"r": 4} | lora)
    with pytest.raises(ConfigError, match=f"--format gguf: .*{message}.*--format gguf --merge --llama_cpp FOLDER"):
        write(module, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_a_tied_base_takes_an_adapter_of_its_layers(base_folder, tmp_path):
    base = base_folder(tie_word_embeddings=True)
    assert write(live(base, lora={"r": 4, "target_modules": "all-linear"}), tmp_path / "out", format="gguf")


def test_negative_control_another_scale_is_not_certified(base_folder, tmp_path, monkeypatch):
    """What converters write that know alpha and rank alone."""
    monkeypatch.setattr(gguf_room, "rank_and_scaling", lambda config, _: (config.r, config.lora_alpha / config.r))
    with pytest.raises(ModelError, match="does not answer as the live model does"):
        write(live(base_folder(), lora={"r": 4, "use_rslora": True}), tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_detected(base_folder, tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", lambda self, name, tensor: add(self, name, tensor + 1))
    with pytest.raises(ModelError, match="does not hold what was written"):
        write(live(base_folder()), tmp_path / "out", format="gguf")


def test_a_file_that_llama_cpp_would_refuse_is_not_read(tmp_path):
    model = Phi3ForCausalLM(synthetic.tiny_config())
    names = gguf_room.weight_names(model, 2)
    _, form = peft_model(model)
    file = tmp_path / "a.gguf"
    gguf_room.write_adapter(form, names, torch.float32, "bot", "base", file)
    file.write_bytes(file.read_bytes().replace(b"phi3", b"phi2", 1))
    with pytest.raises(ModelError, match=r"llama\.cpp would refuse its general\.architecture"):
        gguf_room.read_adapter(file, names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "peft", "dtype": "f16"}, "--dtype: adapters are written in float32"),
        ({"format": "loralib", "dtype": "float32"}, "--dtype: adapters are written in float32"),
        ({"format": "merged", "dtype": "f16"}, "--format merged has bfloat16 or float16 or float32, and not f16"),
        ({"format": "gguf", "dtype": "bfloat16"}, "--format gguf has f32 or f16, and not bfloat16"),
        ({"format": "gguf", "merge": True}, "--llama_cpp: .*needs the folder"),
        ({"format": "gguf", "llama_cpp": "x"}, "--llama_cpp: .*nothing else does"),
        ({"format": "merged", "llama_cpp": "x"}, "--llama_cpp: .*nothing else does"),
        ({"format": "loralib", "merge": True}, "--merge: --format loralib holds the adapter alone"),
    ],
)
def test_options_that_the_format_has_no_use_for_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Export(**options)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("phi3_lightning.export.options.importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--format gguf: .*phi3-lightning\[gguf\]"):
        Export("gguf")


@pytest.mark.slow
def test_the_file_is_that_of_llama_cpps_converter(base_folder, llama_cpp, tmp_path):
    """For plain LoRA, whose scale that converter knows."""
    base = base_folder()
    write(live(base), tmp_path / "out", format="gguf", dtype="f16")
    write(live(base), tmp_path / "peft")  # the same seed
    oracle = tmp_path / "oracle"
    oracle.mkdir()
    script = [sys.executable, str(llama_cpp / "convert_lora_to_gguf.py"), str(tmp_path / "peft"), "--base", str(base)]
    subprocess.run([*script, "--outtype", "f16", "--outfile", str(oracle / "x.gguf")], check=True, capture_output=True)
    (ours, found), (expected_fields, expected) = tensors(tmp_path / "out"), tensors(oracle)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours[key] == expected_fields[key]
