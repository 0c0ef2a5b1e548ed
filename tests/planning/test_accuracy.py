"""Prediction and three real steps, in a process of their own: within a tenth on a CPU."""

import json
import re
import subprocess
import sys

import pytest

from cli.conftest import REPOSITORY
from recipes.published import PUBLISHED

SMOLLM2 = PUBLISHED["phi3_mini_4k_lora"] | {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "original_max_position_embeddings": 8192,
    "sliding_window": None, "tie_word_embeddings": True, "vocab_size": 49152,
}  # fmt: skip
"""The shapes of SmolLM2-135M in the Phi-3 architecture."""
SHALLOW = PUBLISHED["phi3_mini_4k_lora"] | {"num_hidden_layers": 3}

WITHIN = 0.1


def measured(folder, config: dict, *options: str) -> tuple[float, str]:
    """How far the prediction is off, and what the command printed."""
    (folder / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable, "cli.py", "plan", "--measure", f"--model.base={folder}", "--model.init=random",
        "--trainer.accelerator=cpu", "--trainer.precision=bf16-mixed", *options,
    ]  # fmt: skip
    printed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    print(printed)
    return float(re.search(r"peak memory, GB.*│ *([+-][\d.]+)%", printed).group(1)) / 100, printed


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("config", [SMOLLM2, SHALLOW], ids=["smollm2", "phi3-3-layers"])
def test_memory_is_predicted_within_a_tenth(tmp_path, config, checkpointing):
    size = ("--data.max_length=1024", "--data.batch_size=1", f"--model.gradient_checkpointing={checkpointing}")
    off, _ = measured(tmp_path, config, *size)
    assert abs(off) <= WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_memory_of_short_packed_documents_is_predicted_within_a_tenth(tmp_path, shared, checkpointing):
    off, printed = measured(
        tmp_path, SMOLLM2 | {"vocab_size": 32064}, f"--data.train={shared}/data/messages_multiturn.jsonl",
        f"--data.tokenizer={shared}/phi3-mini-4k-instruct", "--data.max_length=2048", "--data.batch_size=1",
        "--data.on_bad_row=skip", f"--data.cache_dir={tmp_path}/cache",
        f"--model.gradient_checkpointing={checkpointing}",
    )  # fmt: skip
    assert "in data.train" in printed
    assert abs(off) <= WITHIN
