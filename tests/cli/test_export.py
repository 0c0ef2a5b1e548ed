"""``export`` from the command line: it needs only a checkpoint, and other libraries read its output."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch

import hub_stand_in
from cli.conftest import QUICK, TINY
from phi3_lightning.commands import export

CHECKPOINT = "--ckpt_path=runs/phi3-lora/checkpoints/last.ckpt"
READER = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base, folder = sys.argv[1], Path(sys.argv[2])
found = {}
for kind in ("peft", "merged", "loralib"):
    out = folder / kind
    if kind == "merged":
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind == "peft":
        model = PeftModel.from_pretrained(model, out)
    if kind == "loralib":
        import loralib
        for path, layer in json.loads((out / "lora.json").read_text()).items():
            old = model.get_submodule(path)
            new = getattr(loralib, layer.pop("layer"))(
                old.in_features, old.out_features, **layer, bias=False, merge_weights=False)
            new.weight = old.weight
            model.set_submodule(path, new)
        saved = torch.load(out / "lora.pt", weights_only=True)
        assert not model.load_state_dict(saved, strict=False).unexpected_keys
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Are you open?"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=False)
    with torch.inference_mode():
        found[kind] = model.eval()(ids, use_cache=False).logits[0, -1].tolist()
    found[f"{kind} stops"] = GenerationConfig.from_pretrained(out).eos_token_id
found["ours"] = sorted(name for name in sys.modules if name.startswith("phi3_lightning"))
print(json.dumps(found))
"""


def test_a_checkpoint_is_exported_in_all_formats_and_read_without_this_package(cli, tmp_path):
    pytest.importorskip("loralib")
    cli("fit", *QUICK, "--trainer.max_steps=6", "--trainer.val_check_interval=3")
    for kind in ("peft", "merged", "loralib", "gguf"):
        exported = cli("export", CHECKPOINT, f"--output_dir=out/{kind}", f"--format={kind}")
        assert f"written: {tmp_path}/out/{kind}" in exported.text
        assert "Traceback" not in exported.text
        assert "deprecated" not in exported.text
    read = subprocess.run(
        [sys.executable, "-c", READER, str(TINY), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    found = json.loads(read.stdout.splitlines()[-1])
    assert found["ours"] == []
    assert found["peft stops"] == found["merged stops"] == [1020, 1013]
    peft, merged, loralib = (torch.tensor(found[kind]) for kind in ("peft", "merged", "loralib"))
    torch.testing.assert_close(loralib, peft, rtol=0, atol=1e-4)  # float32 throughout, in another order
    # the tiny base is stored in bfloat16, and the sum was rounded to it once: 2^-9 of each weight
    assert (merged - peft).abs().max() < 0.05 * peft.abs().max()
    card = (tmp_path / "out/peft/README.md").read_text()
    for part in ("320", "`val/loss`", "![losses by optimiser step](loss.svg)", "`model.optimizer.lr` | `0.01`"):
        assert part in card
    assert json.loads((tmp_path / "out/gguf/certificate.json").read_text())["holds"] is True
    assert gguf.GGUFReader(tmp_path / "out/gguf/gguf-F32-LoRA.gguf").get_field("general.type").contents() == "adapter"
    assert (tmp_path / "out/peft/loss.svg").read_text().startswith("<svg")
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or str(TINY).encode() not in path.read_bytes()  # a local path is useless elsewhere


def test_a_base_that_is_named_after_its_folder_is_a_warning():
    module = SimpleNamespace(base_id=None, base=str(TINY))
    with pytest.warns(match=r"the export names its base 'tiny_phi3', after the folder.*--model\.base_id"):
        assert export._base_name(module) == "tiny_phi3"


def test_what_is_typed_wins_over_the_checkpoint(cli, tmp_path):
    cli("fit", *QUICK, "--trainer.max_steps=1", "--run=bot")
    named = cli("export", "--run=bot", "--output_dir=out", "--model.base_id=owner/name", "--model.revision=v3")
    assert "vllm serve owner/name --revision v3 --enable-lora" in named.text
    assert 'from_pretrained("owner/name", revision="v3", dtype="auto")' in (tmp_path / "out/README.md").read_text()
    assert f"--lora-modules out={tmp_path}/out --max-lora-rank 16" in named.text
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v3")
    other = cli("export", "--run=bot", "--output_dir=other", "--model.lora.r=8", code=1)
    assert "r is 8 and was 16" in other.text
    from_config = cli("export", "--config=runs/bot/config.yaml", "--output_dir=third", "--merge", "--dtype=float32")
    assert "merged to live model" in from_config.text
    assert json.loads((tmp_path / "third/config.json").read_text())["dtype"] == "float32"


def test_a_folder_in_use_is_kept(cli, tmp_path):
    cli("fit", *QUICK, "--trainer.max_steps=1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    refused = cli("export", CHECKPOINT, "--output_dir=out", code=1)
    assert "is not empty; give another folder, or --overwrite" in refused.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("")
    assert "is a file" in cli("export", CHECKPOINT, "--output_dir=file", code=1).text
    cli("export", CHECKPOINT, "--output_dir=out", "--overwrite")
    assert (tmp_path / "out/adapter_config.json").is_file()
    assert not (tmp_path / "out/mine.txt").exists()


@pytest.mark.slow
def test_an_export_is_pushed(cli, tmp_path, monkeypatch):
    with hub_stand_in.serve() as hub:
        hub_stand_in.use(hub, monkeypatch, tmp_path / "cache")
        cli("fit", *QUICK, "--trainer.max_steps=1")
        options = ("export", CHECKPOINT, "--output_dir=out", "--push=ann/bot", "--model.base_id=owner/phi")
        assert "--push: ann/bot: you are not logged in" in cli(*options, code=1).text
        assert "--private: nothing is uploaded without --push" in cli(*options[:3], "--private=true", code=1).text
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        unnamed = cli(*options[:4], code=1)
        assert "--push: an adapter on the hub has to name its base there" in unnamed.text
        assert not (tmp_path / "out").exists()
        assert not hub.repositories
        pushed = cli(*options, "--private=true")
        assert f"pushed: {hub.endpoint}/ann/bot\n" in pushed.text
        assert hub.repositories["model", "ann/bot"].private
        files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert hub.repositories["model", "ann/bot"].files == {".gitattributes": b"", **files}
        assert "hf_write" not in pushed.text
        again = cli(*options[:2], "--output_dir=other", *options[3:], code=1)
        assert "--push: ann/bot holds README.md, adapter_config.json" in again.text
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "runs/phi3-lora: there is no checkpoint"),
        (("--ckpt_path=none.ckpt",), "none.ckpt: there is no such checkpoint"),
        (("--ckpt_path=none.ckpt", "--format=onnx"), "--format"),
    ],
)
def test_missing_inputs_are_named(cli, options, message):
    refused = cli("export", *options, "--output_dir=out", code=None)
    assert refused.status != 0
    assert message in refused.text
    assert "Traceback" not in refused.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype=float16",), "--dtype: adapters are written in float32"),
        (("--merge", "--format=loralib"), "--merge"),
        (("--merge", "--dtype=f16"), "--format merged has bfloat16 or float16 or float32, and not f16"),
        (("--format=gguf", "--dtype=float16"), "--format gguf has f32 or f16, and not float16"),
        (("--format=gguf", "--merge"), "--format gguf --merge --llama_cpp FOLDER"),
        (("--llama_cpp=.",), "--format gguf --merge --llama_cpp FOLDER"),
    ],
)
def test_options_that_contradict_each_other_are_refused(cli, tmp_path, options, message):
    torch.save({"state_dict": {}, "hyper_parameters": {"base": str(TINY)}}, tmp_path / "a.ckpt")
    refused = cli("export", "--ckpt_path=a.ckpt", "--output_dir=out", *options, code=1)
    assert message in refused.text


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"state_dict": {}, "hyper_parameters": {"base": str(TINY)}}])
def test_a_checkpoint_of_something_else_is_refused(cli, tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    refused = cli("export", "--ckpt_path=a.ckpt", "--output_dir=out", code=1)
    assert re.search("no checkpoint of a Phi3LoRAModule|not written by phi3_lightning", refused.text)
    assert not (tmp_path / "out").exists()


def test_the_help_explains_every_option(cli):
    shown = cli("export", "--help").text
    for option in ("--ckpt_path", "--output_dir", "--format", "--merge", "--dtype", "--overwrite", "--model.base_id"):
        assert option in shown


def test_the_chat_template_of_training_is_exported(cli, tmp_path):
    own = Path(tmp_path / "own.jinja")
    own.write_text(json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"] + "{# mine #}")
    cli("fit", *QUICK, "--trainer.max_steps=1", f"--data.chat_template={own}")
    cli("export", CHECKPOINT, "--output_dir=out")
    assert (tmp_path / "out/chat_template.jinja").read_text().endswith("{# mine #}")
