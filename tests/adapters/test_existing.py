"""Starting from an adapter that exists, in each of its formats, and refusing what is another one."""

import json

import loralib
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

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


def by_plain_peft(base: str, folder, **options) -> torch.Tensor:
    """Save an adapter as PEFT does; return the answers of the model that carries it."""
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    model = get_peft_model(frozen_base(base), LoraConfig(**SMALL | {"target_modules": targets} | options))
    randomise(trained(model).values())
    model.save_pretrained(folder)
    return logits(model.eval()).detach()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_a_folder_that_peft_saved(tiny_base, tmp_path, options):
    expected = by_plain_peft(tiny_base, tmp_path, **options)
    model = frozen_base(tiny_base)
    attach(model, section(adapter=str(tmp_path), **options))
    torch.testing.assert_close(logits(model), expected)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}


def test_a_folder_that_peft_saved_as_slices_of_loralib(tiny_base, tmp_path):
    expected = by_plain_peft(tiny_base, tmp_path)
    model = frozen_base(tiny_base)
    attach(model, section(adapter=str(tmp_path), backend="loralib"))
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("backend", ["peft", "loralib"])
def test_what_a_backend_gives_to_peft_it_takes_back(tiny_base, tmp_path, backend):
    options = {"backend": backend, "rank_pattern": {"o_proj": 2}}
    model = frozen_base(tiny_base)
    adapter = attach(model, section(**options))
    randomise(adapter.parameters())
    form = adapter.to_peft()
    form.config.save_pretrained(tmp_path)
    save_file(form.tensors, tmp_path / "adapter_model.safetensors")
    if backend == "peft":  # whose layers take the one rank as it is
        options = {"backend": backend, "alpha_pattern": {}, "lora_alpha": form.config.lora_alpha}
    again = frozen_base(tiny_base)
    attach(again, section(adapter=str(tmp_path), **options))
    torch.testing.assert_close(logits(again), logits(model))


def test_a_file_of_plain_loralib(tiny_base, tmp_path):
    model = frozen_base(tiny_base)
    randomise(attach(model, section(backend="loralib")).parameters())
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    again = frozen_base(tiny_base)
    attach(again, section(backend="loralib", adapter=str(tmp_path / "lora.pt")))
    assert torch.equal(logits(again), logits(model))


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
def test_a_checkpoint_of_ours(tiny_base, tmp_path, lora):
    path, module = checkpoint(tiny_base, tmp_path, **lora)
    again = Phi3LoRAModule(tiny_base, dtype="float32", lora=SMALL | lora | {"adapter": path})
    again.configure_model()
    assert torch.equal(again.eval()(BATCH), module.eval()(BATCH))


def test_a_run_that_started_from_an_adapter_needs_it_no_more(tiny_base, tmp_path):
    by_plain_peft(tiny_base, tmp_path / "start")
    path, module = checkpoint(tiny_base, tmp_path, adapter=str(tmp_path / "start"))
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
def test_another_adapter_is_refused(tiny_base, tmp_path, name):
    theirs, mine, told = REFUSED[name]
    by_plain_peft(tiny_base, tmp_path, **theirs)
    with pytest.raises(CheckpointError, match=rf"^model\.lora\.adapter: {tmp_path}: .*{told}"):
        attach(frozen_base(tiny_base), section(adapter=str(tmp_path), **mine))


def test_an_adapter_of_a_smaller_base_is_refused(tiny_base, tmp_path):
    other = synthetic.save_tiny(tmp_path / "other", hidden_size=64)
    by_plain_peft(other, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"has shape .*or its base not model\.base"):
        attach(frozen_base(tiny_base), section(adapter=str(tmp_path / "adapter")))


def test_an_adapter_that_records_another_base_is_refused_with_both_names(tiny_base, tmp_path):
    by_plain_peft(tiny_base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/other-model"}))
    lora = SMALL | {"adapter": str(tmp_path)}
    with pytest.raises(CheckpointError, match=r"trained on some/other-model, .*set model\.base_id: some/other-model"):
        Phi3LoRAModule(tiny_base, base_id="our/model", lora=lora).configure_model()
    Phi3LoRAModule(tiny_base, base_id="some/other-model", lora=lora).configure_model()
    Phi3LoRAModule(tiny_base, lora=lora).configure_model()  # a local folder: nobody can tell


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"lora_alpha": 9}, "lora_alpha: 8, and here it is 9"),
        ({"backend": "loralib"}, "backend: peft, and here it is loralib"),
        ({"target_modules": ["o_proj"]}, "other layers than model.lora asks for"),
        ({"alpha_pattern": {"o_proj": 9}}, "alpha_pattern: {}, and here it is"),
    ],
)
def test_another_checkpoint_is_refused(tiny_base, tmp_path, lora, told):
    path, _ = checkpoint(tiny_base, tmp_path)
    with pytest.raises(CheckpointError, match=rf"^model\.lora\.adapter: .*{told}"):
        Phi3LoRAModule(tiny_base, dtype="float32", lora=SMALL | lora | {"adapter": path}).configure_model()


def test_a_checkpoint_of_another_base_is_refused(tiny_base, tmp_path):
    path, _ = checkpoint(tiny_base, tmp_path)
    with pytest.raises(CheckpointError, match=r"belongs to another base \(a local folder\)"):
        Phi3LoRAModule(tiny_base, dtype="bfloat16", lora=SMALL | {"adapter": path}).configure_model()


def test_the_same_shapes_of_other_slices_are_another_adapter(tiny_base, tmp_path):
    """k and v have equally many rows: a name alone tells them apart."""
    path, _ = checkpoint(tiny_base, tmp_path, backend="loralib", target_modules=["k_proj"])
    lora = SMALL | {"backend": "loralib", "target_modules": ["v_proj"]}
    with pytest.raises(CheckpointError, match=r"slices: .*k_proj.*here it is .*v_proj"):
        Phi3LoRAModule(tiny_base, dtype="float32", lora=lora | {"adapter": path}).configure_model()
    other, trainer = Phi3LoRAModule(tiny_base, dtype="float32", lora=lora), synthetic.trainer(tmp_path)
    with pytest.raises(CheckpointError, match=r"slices is .*v_proj.* and was .*k_proj"):
        trainer.validate(other, synthetic.loader([BATCH]), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ""])
def test_what_is_not_there_is_named(tiny_base, tmp_path, suffix):
    source = str(tmp_path / f"nowhere{suffix}")
    with pytest.raises(CheckpointError, match=rf"^model\.lora\.adapter: .*{source}"):
        attach(frozen_base(tiny_base), section(backend="loralib", adapter=source))


def test_a_file_that_could_run_code_is_never_opened(tiny_base, tmp_path):
    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit('ran')",)

    for name in ("a.pt", "a.ckpt"):
        torch.save({"state_dict": {}, "x": Trap()}, tmp_path / name)
        with pytest.raises(CheckpointError, match="no whole file of tensors and plain types"):
            attach(frozen_base(tiny_base), section(backend="loralib", adapter=str(tmp_path / name)))
    by_plain_peft(tiny_base, tmp_path / "folder")
    (tmp_path / "folder/adapter_model.safetensors").rename(tmp_path / "folder/adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"with adapter_config\.json and adapter_model\.safetensors"):
        attach(frozen_base(tiny_base), section(adapter=str(tmp_path / "folder")))


def test_a_loralib_file_needs_its_backend(tiny_base, tmp_path):
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"set model\.lora\.backend: loralib"):
        attach(frozen_base(tiny_base), section(adapter=str(tmp_path / "a.pt")))
