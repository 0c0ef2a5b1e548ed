r"""Fetch the real Phi-3 tokenizer and a real small model from the hub, for the tests that need them.

    python scripts/fetch_models.py models
    PHI3_LIGHTNING_SHARED=$PWD/models make test test-slow

The folder gets `phi3-mini-4k-instruct/`, the tokenizer and the configuration of Phi-3-mini, and `smollm2-phi3/`,
SmolLM2-135M-Instruct in Phi-3's architecture. What is there already is left alone. Tests that compare with recorded
ids or read chat files of third parties, neither of which is on the hub, still say that they are skipped.
"""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import snapshot_download
from llama_to_phi3 import write

PHI3 = "microsoft/Phi-3-mini-4k-instruct"
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENIZER = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
"""No weights, and no code of the repository."""


def main() -> None:
    """Fill the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what PHI3_LIGHTNING_SHARED is to name")
    parser.add_argument("--revision", help=f"commit or tag of {PHI3}; its newest if left out")
    given = parser.parse_args()
    fetch(given.folder, given.revision)


def fetch(folder: Path, revision: str | None = None) -> None:
    """Fetch what is missing.

    Args:
        folder: Where to.
        revision: Of Phi-3-mini; None: its newest.
    """
    phi3, small = folder / "phi3-mini-4k-instruct", folder / "smollm2-phi3"
    if not (phi3 / "tokenizer.json").is_file():
        snapshot_download(PHI3, revision=revision, allow_patterns=TOKENIZER, local_dir=phi3)
    if not list(small.glob("*.safetensors")):
        with tempfile.TemporaryDirectory() as source:
            snapshot_download(SMALL, allow_patterns=[*TOKENIZER, "model.safetensors"], local_dir=source)
            write(source, small)
    print(f"PHI3_LIGHTNING_SHARED={folder.resolve()}")


if __name__ == "__main__":
    main()
