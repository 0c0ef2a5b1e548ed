"""Starting from an existing adapter in each of its formats, and refusing one that does not match."""

import json
import logging
from contextlib import nullcontext

import loralib
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import synthetic
from adapters.conftest import frozen_base, logits, randomise, trained
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.adapters import attach
from phi3_lightning.config import LoRA
from phi3_lightning.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BATCH = synthetic.batch_of([[synthetic.document(12, 6, seed)] for seed in range(2)])
SMALL = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def section(**options) -> LoRA:
    return LoRA(**SMALL | options)


def save_with_peft(base: str, folder, **options) -> torch.Tensor:
    """Save an adapter as PEFT does; return the logits of the adapted model."""
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    model = get_peft_model(frozen_base(base), LoraConfig(**SMALL | {"target_modules": targets} | options))
    randomise(trained(model).values())
    model.save_pretrained(folder)
    return logits(model.eval()).detach()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_a_folder_saved_by_peft_is_loaded(tiny_base, tmp_path, options):
    expected = save_with_peft(tiny_base, tmp_path, **options)
    model = frozen_base(tiny_base)
    attach(model, section(init_from=str(tmp_path), **options))
    torch.testing.assert_close(logits(model), expected)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}


def test_a_folder_saved_by_peft_is_loaded_into_loralib_slices(tiny_base, tmp_path):
    expected = save_with_peft(tiny_base, tmp_path)
    model = frozen_base(tiny_base)
    attach(model, section(init_from=str(tmp_path), backend="loralib"))
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("backend", ["peft", "loralib"])
def test_a_backend_reads_its_own_peft_export(tiny_base, tmp_path, backend):
    options = {"backend": backend, "rank_pattern": {"o_proj": 2}}
    model = frozen_base(tiny_base)
    adapter = attach(model, section(**options))
    randomise(adapter.parameters())
    form = adapter.to_peft()
    form.config.save_pretrained(tmp_path)
    save_file(form.tensors, tmp_path / "adapter_model.safetensors")
    if backend == "peft":  # whose layers have the export's single rank
        options = {"backend": backend, "alpha_pattern": {}, "lora_alpha": form.config.lora_alpha}
    again = frozen_base(tiny_base)
    attach(again, section(init_from=str(tmp_path), **options))
    torch.testing.assert_close(logits(again), logits(model))


def save_with_loralib(base: str, folder, **options) -> torch.Tensor:
    """Save an adapter as loralib does; return the logits of the adapted model."""
    model = frozen_base(base)
    randomise(attach(model, section(backend="loralib", **options)).parameters())
    torch.save(loralib.lora_state_dict(model), folder / "lora.pt")
    return logits(model).detach()


def test_a_plain_loralib_file_is_loaded(tiny_base, tmp_path, caplog):
    expected = save_with_loralib(tiny_base, tmp_path)
    again = frozen_base(tiny_base)
    with caplog.at_level(logging.INFO):
        attach(again, section(backend="loralib", init_from=str(tmp_path / "lora.pt")))
    assert torch.equal(logits(again), expected)
    assert "lora.pt: the file does not record how its LoRA deltas are scaled" in caplog.text
    assert "lora_alpha / r of model.lora counts, 2" in caplog.text


VALUE_SLICE = {"layer": "MergedLinear", "r": 4, "lora_alpha": 8, "enable_lora": [False, False, True]}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"lora_alpha": 16}, r"lora\.json has model\.layers\.0\.self_attn\.qkv_proj scaled by 4 .* it is 2"),
        ({"enable_lora": [False, True, False]}, r"with slices \[False, True, False\].* with \[False, False, True\]"),
        ({"r": 0}, r"lora\.json does not describe its layers"),
    ],
)
def test_a_loralib_file_is_checked_against_its_lora_json(tiny_base, tmp_path, written, message):
    options = {"target_modules": ["v_proj"]}
    expected = save_with_loralib(tiny_base, tmp_path, **options)
    paths = [f"model.layers.{number}.self_attn.qkv_proj" for number in range(2)]
    ours = section(backend="loralib", init_from=str(tmp_path / "lora.pt"), **options)
    (tmp_path / "lora.json").write_text(json.dumps(dict.fromkeys(paths, VALUE_SLICE)))
    again = frozen_base(tiny_base)
    attach(again, ours)
    assert torch.equal(logits(again), expected)
    (tmp_path / "lora.json").write_text(json.dumps(dict.fromkeys(paths, VALUE_SLICE | written)))
    with pytest.raises(CheckpointError, match=rf"^model\.lora\.init_from: .*{message}"):
        attach(frozen_base(tiny_base), ours)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda model: model.state_dict(), r"model\.embed_tokens\.weight and \d+ more: no tensor of an adapter"),
        (lambda model: loralib.lora_state_dict(model) | {"epoch": 3}, "epoch: no tensor of an adapter"),
        (lambda model: loralib.lora_state_dict(model) | {"lora_alpha": 8}, "lora_alpha: no tensor of an adapter"),
        (
            lambda model: {f"module.{name}": tensor for name, tensor in loralib.lora_state_dict(model).items()},
            "other layers than model.lora asks for",
        ),
    ],
    ids=["whole model", "a number", "no tensor", "prefix"],
)
def test_unused_tensors_of_a_loralib_file_are_named(tiny_base, tmp_path, content, message):
    model = frozen_base(tiny_base)
    attach(model, section(backend="loralib"))
    torch.save(content(model), tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match=rf"^model\.lora\.init_from: {tmp_path}/lora\.pt: .*{message}"):
        attach(frozen_base(tiny_base), section(backend="loralib", init_from=str(tmp_path / "lora.pt")))


def checkpoint(base: str, tmp_path, **lora) -> tuple[str, Phi3LoRAModule]:
    module = synthetic.randomised(Phi3LoRAModule(base, dtype="float32", lora=SMALL | lora, optimizer={"lr": 1e-2}))
    trainer = synthetic.trainer(tmp_path, max_steps=1)
    trainer.fit(module, synthetic.loader([BATCH]))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    return str(tmp_path / "a.ckpt"), module


@pytest.mark.parametrize(
    "lora",
    [{}, {"backend": "loralib", "target_modules": ["q_proj", "o_proj"]}, {"modules_to_save": ["lm_head"]}],
    ids=["peft", "loralib", "whole"],
)
def test_our_checkpoint_is_loaded(tiny_base, tmp_path, lora):
    path, module = checkpoint(tiny_base, tmp_path, **lora)
    again = Phi3LoRAModule(tiny_base, dtype="float32", lora=SMALL | lora | {"init_from": path})
    again.configure_model()
    assert torch.equal(again.eval()(BATCH), module.eval()(BATCH))


def test_a_resumed_run_does_not_need_the_adapter_it_started_from(tiny_base, tmp_path):
    save_with_peft(tiny_base, tmp_path / "start")
    path, module = checkpoint(tiny_base, tmp_path, init_from=str(tmp_path / "start"))
    (tmp_path / "start" / "adapter_config.json").unlink()
    again = Phi3LoRAModule.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(again.eval()(BATCH), module.eval()(BATCH))


REFUSED = {
    "rank": ({"r": 8, "lora_alpha": 16}, {}, r"lora_A.weight has shape \(8, 32\) and not \(4, 32\): its rank is not"),
    "scale": ({"lora_alpha": 16}, {}, "is scaled by 4 and model.lora scales it by 2; its r is 4 and its lora_alpha 16"),
    "targets": ({"target_modules": ["qkv_proj"]}, {}, "other layers than model.lora asks for: missing .*and 8 more"),
    "more targets": ({}, {"target_modules": ["qkv_proj"]}, "other layers than model.lora asks for: unexpected"),
    "dora": ({"use_dora": True}, {}, "unexpected .*lora_magnitude_vector"),
    "rslora": ({"use_rslora": True}, {}, "is scaled by 4 and model.lora scales it by 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_with_other_options_is_refused(tiny_base, tmp_path, name):
    theirs, ours, message = REFUSED[name]
    save_with_peft(tiny_base, tmp_path, **theirs)
    with pytest.raises(CheckpointError, match=rf"^model\.lora\.init_from: {tmp_path}: .*{message}"):
        attach(frozen_base(tiny_base), section(init_from=str(tmp_path), **ours))


def test_an_adapter_of_a_smaller_base_is_refused(tiny_base, tmp_path):
    other = synthetic.save_tiny(tmp_path / "other", hidden_size=64)
    save_with_peft(other, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"has shape .*or its base not model\.base"):
        attach(frozen_base(tiny_base), section(init_from=str(tmp_path / "adapter")))


def test_an_adapter_that_records_another_base_is_refused_with_both_names(tiny_base, tmp_path):
    save_with_peft(tiny_base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/other-model"}))
    lora = SMALL | {"init_from": str(tmp_path)}
    with pytest.raises(CheckpointError, match=r"trained on some/other-model, .*set model\.base_id: some/other-model"):
        Phi3LoRAModule(tiny_base, base_id="our/model", lora=lora).configure_model()
    Phi3LoRAModule(tiny_base, base_id="some/other-model", lora=lora).configure_model()
    Phi3LoRAModule(tiny_base, lora=lora).configure_model()  # a local folder is not comparable with a hub name


@pytest.mark.parametrize(
    ("recorded", "revision"), [("v1", None), ("v1", "v2"), ("v1", "v1"), (None, "v1"), ("main", None)]
)
def test_an_adapter_that_records_another_revision_of_its_base_is_a_warning(tiny_base, tmp_path, recorded, revision):
    save_with_peft(tiny_base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "some/model", "revision": recorded}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    module = Phi3LoRAModule(
        tiny_base, base_id="some/model", revision=revision, lora=SMALL | {"init_from": str(tmp_path)}
    )
    message = "trained on some/model at revision v1, and model.revision is .*; set model.revision: v1"
    differs = recorded == "v1" and revision != "v1"
    with pytest.warns(UserWarning, match=message) if differs else nullcontext():  # any other warning is an error
        module.configure_model()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_alpha": 9}, "model.lora.lora_alpha is 9 and was 8"),
        ({"backend": "loralib"}, "model.lora.backend is loralib and was peft"),
        (
            {"target_modules": ["o_proj"]},
            "target_modules adapts o_proj in 2 layers and adapted o_proj in 2 layers",
        ),
        ({"layers_to_transform": [0]}, "target_modules adapts o_proj in 1 layers, .* and adapted o_proj in 2 layers"),
        ({"alpha_pattern": {"o_proj": 9}}, "model.lora.alpha_pattern is {'o_proj': 9} and was {}"),
    ],
)
def test_a_checkpoint_with_other_options_is_refused(tiny_base, tmp_path, lora, message):
    path, _ = checkpoint(tiny_base, tmp_path)
    with pytest.raises(CheckpointError, match=rf"^model\.lora\.init_from: .*{message}"):
        Phi3LoRAModule(tiny_base, dtype="float32", lora=SMALL | lora | {"init_from": path}).configure_model()


def test_a_checkpoint_of_another_base_is_refused(tiny_base, tmp_path):
    path, _ = checkpoint(tiny_base, tmp_path)
    with pytest.raises(CheckpointError, match=r"belongs to another base model: it was trained on a local folder \("):
        Phi3LoRAModule(tiny_base, dtype="bfloat16", lora=SMALL | {"init_from": path}).configure_model()


def test_other_slices_of_the_same_shapes_are_refused(tiny_base, tmp_path):
    """k and v have equally many rows: only their names tell them apart."""
    path, _ = checkpoint(tiny_base, tmp_path, backend="loralib", target_modules=["k_proj"])
    lora = SMALL | {"backend": "loralib", "target_modules": ["v_proj"]}
    with pytest.raises(CheckpointError, match=r"slices is .*v_proj.* and was .*k_proj"):
        Phi3LoRAModule(tiny_base, dtype="float32", lora=lora | {"init_from": path}).configure_model()
    other, trainer = Phi3LoRAModule(tiny_base, dtype="float32", lora=lora), synthetic.trainer(tmp_path)
    with pytest.raises(CheckpointError, match=r"slices is .*v_proj.* and was .*k_proj"):
        trainer.validate(other, synthetic.loader([BATCH]), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ""])
def test_a_missing_source_is_named(tiny_base, tmp_path, suffix):
    source = str(tmp_path / f"nowhere{suffix}")
    with pytest.raises(CheckpointError, match=rf"^model\.lora\.init_from: .*{source}"):
        attach(frozen_base(tiny_base), section(backend="loralib", init_from=source))


def test_a_file_that_could_run_code_is_never_opened(tiny_base, tmp_path):
    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit('ran')",)

    for name in ("a.pt", "a.ckpt"):
        torch.save({"state_dict": {}, "x": Trap()}, tmp_path / name)
        with pytest.raises(CheckpointError, match="not a whole checkpoint of tensors and plain types"):
            attach(frozen_base(tiny_base), section(backend="loralib", init_from=str(tmp_path / name)))
    save_with_peft(tiny_base, tmp_path / "folder")
    (tmp_path / "folder/adapter_model.safetensors").rename(tmp_path / "folder/adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, which can run code"):
        attach(frozen_base(tiny_base), section(init_from=str(tmp_path / "folder")))


def test_a_loralib_file_needs_its_backend(tiny_base, tmp_path):
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"set model\.lora\.backend: loralib"):
        attach(frozen_base(tiny_base), section(init_from=str(tmp_path / "a.pt")))


@pytest.mark.parametrize("backend", ["peft", "loralib"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_adapter_is_read_as_peft_reads_it(tiny_base, tmp_path, backend, dtype):
    save_with_peft(tiny_base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    expected = logits(PeftModel.from_pretrained(frozen_base(tiny_base), tmp_path).eval()).detach()
    model = frozen_base(tiny_base)
    attach(model, section(init_from=str(tmp_path), backend=backend))
    torch.testing.assert_close(logits(model), expected)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}


LAYER = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize("backend", ["peft", "loralib"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(32)}, "unexpected .*lora_magnitude_vector"),
        ({f"{LAYER}.lora_B.bias": torch.ones(32)}, r"unexpected .*lora_B\.bias"),
        ({"base_model.model.lm_head.weight": torch.ones(96, 32)}, r"unexpected .*lm_head\.weight"),
        ({f"{LAYER}.lora_A.default.weight": torch.ones(4, 32)}, r"unexpected .*lora_A\.default"),
        ({f"{LAYER}.base_layer.weight": torch.ones(32, 32)}, "holds weights of the base .*save_embedding_layers=False"),
        ({f"{LAYER}.lora_A.weight": torch.full((4, 32), torch.nan)}, r"lora_A(\.weight)? is not finite"),
        ({f"{LAYER}.lora_B.weight": torch.full((32, 4), torch.inf)}, r"lora_B(\.weight)? is not finite"),
    ],
    ids=["magnitude", "bias", "whole module", "adapter name", "base", "nan", "inf"],
)
def test_an_unused_tensor_is_named(tiny_base, tmp_path, backend, more, message):
    save_with_peft(tiny_base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | more, file)
    with pytest.raises(CheckpointError, match=rf"^model\.lora\.init_from: {tmp_path}: .*{message}"):
        attach(frozen_base(tiny_base), section(init_from=str(tmp_path), backend=backend))


def test_a_folder_of_several_adapters_names_them(tiny_base, tmp_path):
    for name in ("first", "second"):
        save_with_peft(tiny_base, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"in folders of their own; give one: {tmp_path}/first, {tmp_path}/sec"):
        attach(frozen_base(tiny_base), section(init_from=str(tmp_path)))


def rewrite_identity(path: str, **identity) -> None:
    content = torch.load(path, weights_only=True)
    content["phi3_lightning"] |= identity
    torch.save(content, path)


@pytest.mark.parametrize("version", [0, 99])
def test_a_checkpoint_of_an_unknown_format_is_refused(tiny_base, tmp_path, version):
    path, _ = checkpoint(tiny_base, tmp_path)
    rewrite_identity(path, format_version=version)
    with pytest.raises(
        CheckpointError, match=rf"^model\.lora\.init_from: {path}: .* has format version {version}, and"
    ):
        Phi3LoRAModule(tiny_base, dtype="float32", lora=SMALL | {"init_from": path}).configure_model()


def test_a_checkpoint_of_the_first_format_is_read(tiny_base, tmp_path):
    path, module = checkpoint(tiny_base, tmp_path)
    content = torch.load(path, weights_only=True)
    block = content["phi3_lightning"]
    first = {key: block[key] for key in ("base", "fingerprint")} | {"format_version": 1}
    first["lora"] = {key: block["lora"][key] for key in ("backend", "r", "lora_alpha", "lora_dropout")}
    torch.save(content | {"phi3_lightning": first}, path)
    again = Phi3LoRAModule(tiny_base, dtype="float32", lora=SMALL | {"init_from": path})
    again.configure_model()
    assert torch.equal(again.eval()(BATCH), module.eval()(BATCH))


def test_a_checkpoint_of_another_origin_is_refused(tiny_base, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"^model\.lora\.init_from: .*a\.ckpt: .*not written by phi3_lightning"):
        attach(frozen_base(tiny_base), section(init_from=str(tmp_path / "a.ckpt")))


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_a_missing_start_is_refused_where_no_checkpoint_brings_its_values(tiny_base, tmp_path, run):
    module = Phi3LoRAModule(tiny_base, dtype="float32", lora=SMALL | {"init_from": str(tmp_path / "nowhere.ckpt")})
    batch = synthetic.batch_of([[synthetic.document(9, 4, 0)]])
    with pytest.raises(CheckpointError, match=r"^model\.lora\.init_from: .*nowhere\.ckpt"):
        getattr(synthetic.trainer(tmp_path), run)(module, synthetic.loader([batch]))
