"""Layers of Phi-3-mini's own width with random weights: memory in bfloat16 and in 4 bits, and the files of a run.

A few layers show what every layer adds; tests/project/test_full_size.py repeats both with all 32.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from phi3_lightning.planning.memory import CPU_PROCESS_BYTES, NF4_BYTES_PER_WEIGHT

from .program import run

LAYERS = 4
LAYER_WEIGHTS = 3072 * (9216 + 3072 + 16384) + 8192 * 3072
HEAD_WEIGHTS = 2 * 32064 * 3072
"""Embedding and head, which are not tied."""
LAYER_ADAPTER_VALUES = 16 * (3072 + 9216 + 3072 + 3072 + 3072 + 16384 + 8192 + 3072)
"""Rank 16 on the four projections."""
STEP_BYTES = 0.6e9
"""A step on 512 tokens with everything recomputed: a layer's pass, a chunk of logits, and what libraries load."""


def write_config(folder: Path, shared: Path, layers: int) -> dict:
    """Write Phi-3-mini's configuration with a number of layers, and return it."""
    folder.mkdir()
    config = json.loads((shared / "phi3-mini-4k-instruct/config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def check_training(shared: Path, real_chats: Path, tmp_path: Path, layers: int) -> None:
    """Train a step in bfloat16: the base is in memory once, and the checkpoint holds the adapter alone."""
    write_config(tmp_path / "base", shared, layers)
    _, peak = run(
        "fit", "--config=configs/phi3_mini_4k_lora.yaml", f"--model.base={tmp_path}/base",
        "--model.init=random", f"--data.train={real_chats}/messages_multiturn.jsonl", "--data.max_length=512",
        f"--data.tokenizer={shared}/phi3-mini-4k-instruct", "--data.batch_size=1", "--trainer.accelerator=cpu",
        "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}/run", "--trainer.limit_val_batches=0",
        "--trainer.accumulate_grad_batches=1", "--model.gradient_checkpointing=full", "--monitor.base_drift=false",
        "--monitor.samples=0",
    )  # fmt: skip
    base = 2 * (layers * LAYER_WEIGHTS + HEAD_WEIGHTS)
    print(f"peak memory {peak:.2f} GB, of which the base {base / 1e9:.2f}")
    adapter = 12 * layers * LAYER_ADAPTER_VALUES  # a value and two moments, in float32
    assert peak * 1e9 < base + CPU_PROCESS_BYTES + adapter * 4 / 3 + STEP_BYTES
    checkpoints = list((tmp_path / "run").rglob("*.ckpt"))
    assert [path.name for path in checkpoints] == ["last.ckpt"]
    assert checkpoints[0].stat().st_size <= 1.02 * adapter + 100_000
    state = torch.load(checkpoints[0], weights_only=True)["state_dict"]
    assert sum(tensor.numel() for tensor in state.values()) == layers * LAYER_ADAPTER_VALUES
    assert all("lora_" in name for name in state)
    others = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path not in checkpoints]
    assert all(path.stat().st_size < 1_000_000 for path in others)


@pytest.mark.slow
def test_a_base_is_in_memory_once_and_the_adapter_alone_is_saved(shared, real_chats, tmp_path):
    check_training(shared, real_chats, tmp_path, LAYERS)


SCRIPT = """
import ctypes, gc, sys, tempfile
import synthetic
from phi3_lightning import Phi3LoRAModule

def gigabytes(key):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status[key].split()[0]) * 1024 / 1e9

before = gigabytes("VmRSS")
module = Phi3LoRAModule(sys.argv[1], quantization="nf4", lora={"backend": "loralib"})
module.configure_model()
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # free heap is not the base's, and differs from run to run
print(f"resident {gigabytes('VmRSS') - before:.2f} peak {gigabytes('VmHWM') - before:.2f}")
batch = synthetic.batch_of([[synthetic.document(64, 32, 0)]])
trainer = synthetic.trainer(tempfile.mkdtemp(), max_steps=1, precision="bf16-mixed")
trainer.fit(module, synthetic.loader([batch]))
print(f"steps {trainer.global_step}")
"""


def write_random(folder: Path, shared: Path, layers: int) -> None:
    """Write weights in shards of one layer, each layer with the same values, which takes seconds."""
    options = write_config(folder, shared, layers)
    hidden, inner, vocabulary = (options[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) - 0.5).mul_(0.07).bfloat16()

    layer = {
        "self_attn.qkv_proj": values(3 * hidden, hidden), "self_attn.o_proj": values(hidden, hidden),
        "mlp.gate_up_proj": values(2 * inner, hidden), "mlp.down_proj": values(hidden, inner),
        "input_layernorm": torch.ones(hidden).bfloat16(), "post_attention_layernorm": torch.ones(hidden).bfloat16(),
    }  # fmt: skip
    shards = {
        f"{number}.safetensors": {f"model.layers.{number}.{name}.weight": tensor for name, tensor in layer.items()}
        for number in range(options["num_hidden_layers"])
    }
    shards["rest.safetensors"] = {
        "model.embed_tokens.weight": values(vocabulary, hidden), "lm_head.weight": values(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }  # fmt: skip
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    names = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def check_nf4(shared: Path, tmp_path: Path, layers: int) -> None:
    """Load in 4 bits and train a step."""
    write_random(tmp_path / "base", shared, layers)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "base")]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    shutil.rmtree(tmp_path / "base")
    assert process.returncode == 0, process.stderr
    resident, peak = map(float, re.search(r"resident ([\d.]+) peak ([\d.]+)", process.stdout).groups())
    weights = (layers * LAYER_WEIGHTS * NF4_BYTES_PER_WEIGHT + 2 * HEAD_WEIGHTS) / 1e9
    adapter = 4 * layers * LAYER_ADAPTER_VALUES * 1.25 / 1e9  # loralib's three slices of qkv_proj have more values
    print(f"resident after loading {resident:.2f} GB, peak {peak:.2f} GB; 4-bit base {weights:.2f} GB")
    assert "steps 1" in process.stdout
    assert resident < 1.15 * weights + adapter


qlora = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra qlora is not installed")


@pytest.mark.slow
@qlora
def test_a_base_in_4_bits_takes_what_its_weights_take_and_trains(shared, tmp_path):
    check_nf4(shared, tmp_path, LAYERS)
