"""An adapter on a plain transformers model, in a training loop of your own, without Lightning's Trainer.

python examples/adapter_without_trainer.py --base FOLDER --folder my-adapter
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from phi3_lightning import adapters
from phi3_lightning.config import LoRA
from phi3_lightning.export.adapter_files import write_peft

TINY = "src/phi3_lightning/assets/tiny_phi3"
CHAT = [
    {"role": "user", "content": "Are you open?"},
    {"role": "assistant", "content": "Until nine, with lanterns lit."},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=TINY)
    parser.add_argument("--folder", type=Path, default=Path("my-adapter"))
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(given.base, dtype=torch.float32).requires_grad_(False)
    adapter = adapters.attach(model, LoRA(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], backend="loralib"))
    ids = PreTrainedTokenizerFast.from_pretrained(given.base).apply_chat_template(
        CHAT, return_tensors="pt", return_dict=True
    )["input_ids"]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-3)
    model.train()
    for step in range(given.steps):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    with adapter.disabled():
        print(f"the base alone: {model(ids, labels=ids, use_cache=False).loss.item():.3f}")

    given.folder.mkdir(parents=True, exist_ok=True)
    write_peft(adapter.to_peft(), "base/name", None, given.folder)
    with torch.no_grad():
        live = model(ids, use_cache=False).logits
        base = adapter.detach()  # as it was loaded, for the next adapter
        again = PeftModel.from_pretrained(base, str(given.folder)).eval()(ids, use_cache=False).logits
    print(f"{given.folder} in plain PEFT: logits differ by {(again - live).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
