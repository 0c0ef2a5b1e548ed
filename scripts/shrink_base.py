r"""Write a base of two small layers with the architecture and the tokenizer of a real one, without weights, for trials.

    python scripts/shrink_base.py microsoft/Phi-4-mini-instruct small-phi4
    python cli.py fit --config configs/phi4_mini_lora.yaml --config configs/overlays/tiny.yaml \
      --model.base small-phi4 --model.init random

Heads keep their size, and with it the rotary angles, and their ratio to key heads, of which there are one or two.
"""

import argparse
from pathlib import Path

from phi3_lightning.data.template import load_tokenizer
from phi3_lightning.model.base import read_config


def main() -> None:
    """Read what the command line names, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or hub id; only its configuration and its tokenizer are read")
    parser.add_argument("folder", type=Path, help="the folder to make")
    given = parser.parse_args()

    config = read_config(given.base)
    head = config.hidden_size // config.num_attention_heads
    ratio = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = 2 if ratio == 1 else 1
    config.num_attention_heads = ratio * config.num_key_value_heads
    config.hidden_size = config.num_attention_heads * head
    config.intermediate_size = 2 * config.hidden_size
    config.num_hidden_layers = 2
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(given.folder)
    load_tokenizer(given.base, None, None).save_pretrained(given.folder)
    print(f"{given.folder}: {config.num_attention_heads} heads of {head}, {config.vocab_size} tokens")


if __name__ == "__main__":
    main()
