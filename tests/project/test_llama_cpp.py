"""llama.cpp itself, where it is installed: the same continuations as transformers and PEFT, and the same ids."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Phi3ForCausalLM, PreTrainedTokenizerFast

import synthetic
from cli.conftest import REPOSITORY, TINY, start
from export.conftest import llama_cpp as llama_cpp
from export.test_export import live
from export.test_gguf import LORA
from phi3_lightning.export.certificate import ROUNDINGS, difference, logits, rounded
from phi3_lightning.export.gguf import weight_names, write_adapter
from phi3_lightning.export.gguf_model import record_name
from real.test_pretrained import real_base as real_base

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
TEXT = "<|user|>\nWho wrote Hamlet?<|end|>\n<|assistant|>\n"


@pytest.fixture
def run(real_base, tmp_path):
    """Export what a few steps on the real model have taught."""

    def command(*args: str) -> str:
        process = start(tmp_path, *args)
        assert process.wait(900) == 0, process.text
        return process.text

    command(
        "fit", f"--config={REPOSITORY}/configs/phi3_mini_4k_lora.yaml", f"--model.base={real_base}", "--run=bot",
        "--model.base_id=local/phi3-small", f"--data.train={TINY}/chats_train.jsonl", "--data.max_length=192",
        "--data.batch_size=1", "--data.val_fraction=0.0", "--model.optimizer.lr=1e-3", "--trainer.accelerator=cpu",
        "--trainer.max_steps=12", "--trainer.accumulate_grad_batches=1", "--trainer.callbacks=null",
        "--model.gradient_checkpointing=none", "--monitor.base_drift=false", "--monitor.samples=0",
    )  # fmt: skip
    return lambda *options: command("export", "--run=bot", *options)


def test_it_continues_as_transformers_does(run, real_base, llama_cpp, tmp_path):
    run("--output_dir=peft")
    run("--output_dir=gguf", "--format=gguf")
    whole = run("--output_dir=whole", "--format=gguf", "--merge", f"--llama_cpp={llama_cpp}")
    assert "merged model in GGUF to" in whole
    script = [sys.executable, str(REPOSITORY / "examples/llama_cpp_check.py"), "peft", "gguf", "--base", str(real_base)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    subprocess.run(
        [*script, "--llama_cpp", str(llama_cpp), "--json", "figures.json"], check=True, cwd=tmp_path, env=environment
    )
    assert all(figure["holds"] for figure in json.loads((tmp_path / "figures.json").read_text()))


@pytest.fixture(scope="module")
def program():
    return runpy.run_path(str(REPOSITORY / "examples/llama_cpp_check.py"))


@pytest.fixture(scope="module")
def base(real_base, llama_cpp, program, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny base of two separate embeddings with the real model's tokenizer, and llama.cpp's file of it."""
    folder, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("gguf")
    for path in real_base.glob("*token*"):
        shutil.copy(path, folder)
    synthetic.save_tiny(folder, vocab_size=49152, hidden_size=64, intermediate_size=128)
    return folder, program["convert_base"](folder, str(llama_cpp), torch.float32, out)


@pytest.mark.parametrize("kind", LORA)
def test_each_kind_of_adapter_has_the_logits_of_the_live_model(base, program, tmp_path, kind):
    folder, file = base
    module = live(folder, lora={"r": 4, "lora_alpha": 8} | LORA[kind])
    names = weight_names(Phi3ForCausalLM.from_pretrained(folder), 2)
    write_adapter(module.adapter.to_peft(), names, torch.float32, "bot", "base", tmp_path / "a.gguf")
    prompt, layers = list(range(100, 140)), [target.path for target in module.adapter.targets]

    def live_logits() -> torch.Tensor:
        return logits(module.loaded_model, [prompt], torch.inference_mode())

    expected = live_logits()
    with rounded(module.loaded_model, layers, torch.float16):  # llama.cpp keeps keys and values in float16
        tolerance = ROUNDINGS * difference(expected, live_logits()).max_logit
    with module.base_answers():
        effect = difference(expected, live_logits()).max_logit
    found = program["LlamaCpp"](file, tmp_path / "a.gguf", 128).logits(prompt)
    assert difference(expected, found).max_logit <= tolerance < effect / 50


def ids(vocabulary: Path, name: str, folder: Path) -> list[int]:
    """What llama.cpp makes of a chat with a vocabulary whose model has a name."""
    import llama_cpp

    file = folder / "vocabulary.gguf"
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--force", "--general-name", name]
    subprocess.run([*command, str(vocabulary), str(file)], check=True, capture_output=True)
    return llama_cpp.Llama(str(file), vocab_only=True, verbose=False).tokenize(TEXT.encode(), False, True)


def test_it_drops_white_space_as_phi3_does_under_the_recorded_name_alone(shared, llama_cpp, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "phi3-mini-4k-instruct")
    vocabulary = llama_cpp / "models/ggml-vocab-phi-3.gguf"
    expected = [32010, 11644, 5456, 7904, 1026, 29973, 32007, 32001]
    assert tokenizer(TEXT).input_ids == expected
    assert ids(vocabulary, record_name("bot", tokenizer), tmp_path) == expected
    # the name that the converter makes of Phi-3-mini-4k-instruct
    found = ids(vocabulary, "Phi 3 Mini 4k Instruct", tmp_path)
    assert found == [32010, 29871, 13, 22110, 5456, 7904, 1026, 29973, 32007, 29871, 13, 32001, 29871, 13]
