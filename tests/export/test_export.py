"""Exports of a live module are certified, and an unfinished folder never looks finished."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Phi3ForCausalLM
from transformers.utils.import_utils import is_bitsandbytes_available

import synthetic
from export.conftest import BASES
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.errors import ConfigError, ModelError
from phi3_lightning.export import export as export_room
from phi3_lightning.export.card import Provenance
from phi3_lightning.export.certificate import logits
from phi3_lightning.export.chat_files import Chat
from phi3_lightning.export.export import Exported, export
from phi3_lightning.export.options import Export

TINY = Path(__file__).parents[2] / "src/phi3_lightning/assets/tiny_phi3"
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
CHAT = Chat(str(TINY), None, None, [7, 2], PROMPTS)
IDS = torch.arange(3, 40)[None]


def live(base: Path, **options) -> Phi3LoRAModule:
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
    module = Phi3LoRAModule(str(base), **{"dtype": "float32", "lora": lora} | options)
    return synthetic.randomised(module, std=0.1).eval()


def write(module: Phi3LoRAModule, target: Path, run: Path | None = None, **options) -> Exported:
    from phi3_lightning.checkpoint.identity import IDENTITY

    checkpoint = {"global_step": 3, "hyper_parameters": dict(module.hparams), IDENTITY: module.checkpoint_identity()}
    return export(module, CHAT, Provenance("owner/name", checkpoint, run), Export(**options), target)


def test_a_loss_that_is_not_finite_is_listed_and_not_drawn(base_folder, tmp_path):
    with SummaryWriter(tmp_path / "run/tensorboard") as curves:
        for step, value in enumerate((2.0, 1.0, float("nan"))):
            curves.add_scalar("train/loss", value, step)
    write(live(base_folder()), tmp_path / "out", run=tmp_path / "run")
    assert "nan" not in (tmp_path / "out/loss.svg").read_text()
    assert "| `train/loss` | 2.0000 | nan |" in (tmp_path / "out/README.md").read_text()


def answers(module: Phi3LoRAModule) -> torch.Tensor:
    with module.autocast():
        return logits(module.model, [IDS[0].tolist()], torch.inference_mode())


def reloaded_logits(folder: Path, base: Path, kind: str, **options) -> torch.Tensor:
    """The logits of plain transformers and PEFT from the folder."""
    if kind == "merged":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto", **options), folder)
    with torch.inference_mode():
        return model.eval()(IDS, use_cache=False).logits[0].float()


@pytest.mark.parametrize("kind", ["peft", "merged"])
@pytest.mark.parametrize("shape", BASES)
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "target_modules": "all-linear"}])
def test_exports_have_the_logits_of_the_live_model(base_folder, tmp_path, shape, kind, lora):
    base = base_folder(**BASES[shape])
    module = live(base, lora={"r": 4, "lora_alpha": 8} | lora)
    expected = answers(module)
    with module.base_answers():
        untouched = answers(module)
    exported = write(module, tmp_path / "out", format=kind)
    found = reloaded_logits(tmp_path / "out", base, kind)
    # float32 sums over at most 64 products in another order: 64 x 6e-8 of values around 1, through two layers
    torch.testing.assert_close(found, expected, rtol=0, atol=8e-6)
    assert (untouched - expected).abs().max() > 0.01
    assert exported.certificate.holds
    assert exported.certificate.export.greedy == 1.0
    assert exported.certificate.adapter.max_logit > 100 * exported.certificate.export.max_logit


def test_the_card_has_the_objective(base_folder, tmp_path):
    write(live(base_folder(), objective={"name": "ipo", "beta": 0.3}), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`model.objective.name` | `ipo`" in card
    assert "`model.objective.beta` | `0.3`" in card
    assert "label_smoothing" not in card  # which ipo does not use


@pytest.mark.parametrize("kind", ["peft", "merged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_certificate_holds_in_bfloat16(base_folder, tmp_path, kind, dtype):
    base = base_folder(torch.bfloat16)
    exported = write(live(base, dtype="bfloat16"), tmp_path / "out", format=kind, **(
        {"dtype": dtype} if kind == "merged" else {}
    ))  # fmt: skip
    assert exported.certificate.holds
    assert 0 < exported.certificate.export.max_logit < exported.certificate.adapter.max_logit / 4


@pytest.mark.parametrize("scale", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_an_export_with_other_logits_leaves_no_folder(base_folder, tmp_path, kind, scale):
    module = live(base_folder())
    form = module.adapter.to_peft()  # the export differs from the live model
    form.tensors[next(name for name in form.tensors if "lora_B" in name)] *= scale
    module.adapter.to_peft = lambda: form
    with pytest.raises(ModelError, match=r"does not answer as the live model does.*nothing was written"):
        write(module, tmp_path / "out", format=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_failed_export_keeps_the_previous_folder(base_folder, tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export_room.adapter_files, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            write(live(base_folder()), target)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}
    write(live(tmp_path / "base"), target)  # replaced as a whole with overwrite
    assert not (target / "mine.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_others_may_read_the_files(base_folder, tmp_path):
    write(live(base_folder()), tmp_path / "out")
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in [tmp_path / "out", *(tmp_path / "out").iterdir()])


def test_the_folder_describes_itself_without_local_paths(base_folder, tmp_path):
    write(live(base_folder()), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "certificate.json", "generation_config.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("base_model: owner/name", "library_name: peft", "after 3 optimiser steps", "`model.lora.r` | `4`",
                 "--max-lora-rank 8", "same argmax"):  # fmt: skip
        assert part in card
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["holds"] is True
    assert certificate["export"].keys() == {"max_logit", "kl", "greedy"}


@pytest.mark.parametrize(
    ("lora", "classes"),
    [
        ({}, {"Linear"}),
        ({"backend": "loralib"}, {"Linear", "MergedLinear"}),
        ({"backend": "loralib", "target_modules": ["q_proj", "v_proj", "up_proj"]}, {"MergedLinear"}),
        ({"backend": "loralib", "rank_pattern": {"o_proj": 2}, "use_rslora": True}, {"Linear", "MergedLinear"}),
        ({"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 32}}, {"Linear"}),
        ({"backend": "loralib", "target_modules": ["embed_tokens", "o_proj"]}, {"Embedding", "Linear"}),
    ],
)
def test_plain_loralib_reads_its_file(base_folder, tmp_path, lora, classes):
    loralib = pytest.importorskip("loralib")
    base = base_folder(num_key_value_heads=4)
    module = live(base, lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **lora})
    expected = answers(module)
    write(module, tmp_path / "out", format="loralib")
    model = Phi3ForCausalLM.from_pretrained(base)
    layers = json.loads((tmp_path / "out" / "lora.json").read_text())
    assert {layer["layer"] for layer in layers.values()} == classes
    for path, layer in layers.items():
        old, kind = model.get_submodule(path), getattr(loralib, layer.pop("layer"))
        sizes = old.weight.shape if kind is loralib.Embedding else (old.in_features, old.out_features)
        bias = {} if kind is loralib.Embedding else {"bias": False}
        new = kind(*sizes, **layer, **bias, merge_weights=False)
        new.weight = old.weight
        model.set_submodule(path, new)
    saved = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)
    assert loralib.lora_state_dict(model).keys() == saved.keys()
    assert model.load_state_dict(saved, strict=False).unexpected_keys == []
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(IDS).logits[0], expected, rtol=0, atol=8e-6)


def test_unequal_slices_are_exported_as_one_loralib_layer(base_folder, tmp_path):
    module = live(base_folder(num_key_value_heads=2), lora={"backend": "loralib", "r": 4, "target_modules": ["k_proj"]})
    write(module, tmp_path / "out", format="loralib")
    layers = json.loads((tmp_path / "out" / "lora.json").read_text())
    assert {layer["layer"] for layer in layers.values()} == {"Linear"}  # MergedLinear splits into equal parts


def test_a_random_base_has_no_files_to_merge_into(base_folder, tmp_path):
    base = base_folder()
    (base / "model.safetensors").unlink()
    module = live(base, init="random")
    with pytest.raises(ConfigError, match=r"model\.init: random has no files"):
        write(module, tmp_path / "out", format="merged")
    assert write(module, tmp_path / "out").certificate.holds  # its adapter can be exported as usual


def test_the_base_keeps_its_rows_whatever_the_tokenizer_has(base_folder, tmp_path):
    base = base_folder()  # 97 rows; the exported tokenizer has 1024 entries
    write(live(base), tmp_path / "out", format="merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}


def test_a_file_damaged_while_writing_is_detected(base_folder, tmp_path, monkeypatch):
    def damage(tensors, path, **options):
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name] + 1}, path, **options)

    monkeypatch.setattr(export_room.adapter_files, "save_file", damage)
    with pytest.raises(ModelError, match="does not hold what was written"):
        write(live(base_folder()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_vnni"), reason="this CPU has no AVX-512 VNNI")
@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_an_adapter_of_a_base_in_8_bits_is_exported(tmp_path, kind):
    base = Path(synthetic.save_tiny(tmp_path / "base", torch.bfloat16, hidden_size=64, intermediate_size=128))
    module = live(base, dtype="bfloat16", quantization="int8_dynamic")
    expected = answers(module)
    exported = write(module, tmp_path / "out", format=kind)
    figures = exported.certificate
    assert figures.holds
    assert figures.adapter.max_logit > 10 * figures.rounding.max_logit
    if kind == "merged":
        assert "without int8_dynamic" in figures.compared
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        near = logits(whole, [IDS[0].tolist()], torch.inference_mode())
        assert (near - expected).abs().max() < figures.adapter.max_logit / 4


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="the extra qlora is not installed")
@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_an_adapter_of_a_quantised_base_is_exported(tmp_path, kind):
    base = Path(synthetic.save_tiny(tmp_path / "base", torch.bfloat16, hidden_size=64, intermediate_size=128))
    module = live(base, dtype="bfloat16", quantization="nf4")
    expected = answers(module)
    exported = write(module, tmp_path / "out", format=kind)
    assert exported.certificate.holds
    if kind == "merged":
        assert "without nf4" in exported.certificate.compared
        assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
        return
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    found = reloaded_logits(tmp_path / "out", base, kind, quantization_config=nf4, device_map={"": "cpu"})
    figures = exported.certificate
    assert (found - expected).abs().max() <= 4 * figures.rounding.max_logit
    assert figures.adapter.max_logit > 10 * figures.rounding.max_logit
