"""The full-size Phi-3-mini with random weights: the memory of training, in bfloat16 and in 4 bits, and the files."""

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

from .program import run

ADAPTER_VALUES = 25_165_824
"""Rank 16 on the four projections of 32 layers: 16 x (3072 + 9216 + 3072 + 3072 + 3072 + 16384 + 8192 + 3072) x 32."""


@pytest.mark.slow
def test_full_size_phi3_mini_trains_within_13_gb_and_saves_its_adapter_alone(shared, real_chats, tmp_path):
    _, peak = run(
        "fit", "--config=configs/phi3_mini_4k_lora.yaml", f"--model.base={shared}/phi3-mini-4k-instruct",
        "--model.init=random", f"--data.train={real_chats}/messages_multiturn.jsonl", "--data.max_length=512",
        "--data.batch_size=1", "--trainer.accelerator=cpu", "--trainer.max_steps=1",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.limit_val_batches=0",
        "--trainer.accumulate_grad_batches=1", "--model.gradient_checkpointing=full", "--monitor.base_drift=false",
        "--monitor.samples=0",
    )  # fmt: skip
    print(f"peak memory {peak:.1f} GB")
    assert peak < 13
    checkpoints = list(tmp_path.rglob("*.ckpt"))
    assert [path.name for path in checkpoints] == ["last.ckpt"]
    assert checkpoints[0].stat().st_size <= 1.02 * ADAPTER_VALUES * 12  # a value and two moments, in float32
    state = torch.load(checkpoints[0], weights_only=True)["state_dict"]
    assert sum(tensor.numel() for tensor in state.values()) == ADAPTER_VALUES
    assert all("lora_" in name for name in state)
    others = [path for path in tmp_path.rglob("*") if path.is_file() and path not in checkpoints]
    assert all(path.stat().st_size < 1_000_000 for path in others)


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


def write_random(folder: Path, config: Path) -> None:
    """Full-size weights in shards of one layer, each layer with the same values, which takes seconds."""
    folder.mkdir()
    shutil.copy(config, folder)
    options = json.loads(config.read_text())
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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra qlora is not installed")
def test_the_base_is_under_2_6_gb_and_trains(shared, tmp_path):
    write_random(tmp_path / "base", shared / "phi3-mini-4k-instruct/config.json")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "base")]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    shutil.rmtree(tmp_path / "base")
    assert process.returncode == 0, process.stderr
    resident, peak = map(float, re.search(r"resident ([\d.]+) peak ([\d.]+)", process.stdout).groups())
    print(f"resident after loading {resident:.2f} GB, peak {peak:.2f} GB")
    assert "steps 1" in process.stdout
    adapter = 0.13  # 31 million float32 values
    assert resident < 2.6 + adapter
