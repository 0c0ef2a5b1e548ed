"""What checkpoints and exports cost: seconds, bytes and memory, on Phi-3-mini's shapes with random weights.

A checkpoint is written beside ``dd`` of as many bytes to the same disk, flushed alike. The merged export needs a base
with files: random weights are written to the working folder first (7.6 GB at full size, and as much for the result).
Each part runs in a process of its own, so that peaks of memory are its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import phi3_lightning

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"
SHAPES: dict[str, dict[str, Any]] = {
    "phi3-mini": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32064},
    "small": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
              "num_key_value_heads": 12, "vocab_size": 32064},
}  # fmt: skip


def write_base(folder: Path, shape: str) -> dict[str, float]:
    """Write config.json, a tokenizer and random weights, layer by layer."""
    from transformers import Phi3Config

    from phi3_lightning.model.base import load

    config = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096}
    Phi3Config(**SHAPES[shape], **config, original_max_position_embeddings=4096).save_pretrained(folder)
    for path in TINY.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    load(str(folder), init="random").save_pretrained(folder, max_shard_size="2GB")
    return {}


def loaded(folder: Path) -> Any:
    """Return a module with an adapter that does something, rank 16 on the four projections."""
    import torch

    from phi3_lightning import Phi3LoRAModule

    module = Phi3LoRAModule(str(folder), base_id="random/base")
    module.configure_model()
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return module.eval()


def checkpoint(folder: Path) -> dict[str, float]:
    """Write a checkpoint of an adapter with its moments, and as many bytes with ``dd``."""
    import torch

    from phi3_lightning.checkpoint.io import SafeCheckpointIO
    from phi3_lightning.model.base import fingerprint

    module = loaded(folder)
    start = time.perf_counter()
    fingerprint(module.model)
    fingerprinted = time.perf_counter() - start
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    moments = {
        index: {"step": torch.tensor(1.0), "exp_avg": tensor + 1, "exp_avg_sq": tensor + 2}
        for index, tensor in enumerate(trained.values())
    }
    content = {"state_dict": trained, "optimizer_states": [{"state": moments, "param_groups": []}]}
    target = folder / "last.ckpt"
    seconds, plain = [], []
    for _ in range(3):
        start = time.perf_counter()
        SafeCheckpointIO().save_checkpoint(content, target)
        seconds.append(time.perf_counter() - start)
        count = target.stat().st_size // 2**20
        command = ["dd", "if=/dev/zero", f"of={folder / 'dd'}", "bs=1M", f"count={count}", "conv=fsync", "status=none"]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        plain.append(time.perf_counter() - start)
        (folder / "dd").unlink()
    size = target.stat().st_size / 1e6
    target.unlink()
    return {"write, s": min(seconds), "dd, s": min(plain), "size, MB": size, "fingerprint, s": fingerprinted}


def exported(folder: Path, kind: str) -> dict[str, float]:
    """Export, certificate included."""
    import shutil

    from phi3_lightning.checkpoint.identity import IDENTITY
    from phi3_lightning.export.card import Provenance
    from phi3_lightning.export.chat_files import Chat
    from phi3_lightning.export.export import export
    from phi3_lightning.export.options import Export

    start = time.perf_counter()
    module = loaded(folder)
    ready = time.perf_counter()
    content = {"global_step": 0, "hyper_parameters": dict(module.hparams), IDENTITY: module.checkpoint_identity()}
    chat = Chat(str(folder), None, None, [2], [list(range(10, 40)), list(range(50, 60))])
    made = export(module, chat, Provenance("random/base", content, None), Export(kind), folder.parent / "out")  # type: ignore[arg-type]
    end = time.perf_counter()
    size = sum(path.stat().st_size for path in (folder.parent / "out").iterdir()) / 1e6
    shutil.rmtree(folder.parent / "out")
    figures = made.certificate.export
    return {
        "load, s": ready - start, "export, s": end - ready, "size, MB": size, "max logit difference": figures.max_logit
    }  # fmt: skip


PARTS = ("base", "checkpoint", "export peft", "export merged")


def measure(part: str, folder: Path, shape: str) -> dict[str, float]:
    """Do one part in this process."""
    if part == "base":
        return write_base(folder, shape)
    return checkpoint(folder) if part == "checkpoint" else exported(folder, part.removeprefix("export "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="phi3-mini", choices=SHAPES, help="the model's size")
    parser.add_argument("--folder", type=Path, help="where to work; else a temporary folder")
    parser.add_argument("--only", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        figures = measure(given.only[0], Path(given.only[1]), given.shape)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({**figures, "peak, GB": peak}))
        return
    console = Console()
    table = Table("part", "figure", "value")
    with tempfile.TemporaryDirectory(dir=given.folder) as working:
        base = Path(working) / "base"
        base.mkdir()
        for part in PARTS:
            command = [sys.executable, __file__, "--shape", given.shape, "--only", part, str(base)]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            for name, value in json.loads(run.stdout.splitlines()[-1]).items():
                table.add_row(part, name, f"{value:,.3g}" if value < 100 else f"{value:,.0f}")
            table.add_section()
            console.print(f"{part}: done")
    console.print(table)


if __name__ == "__main__":
    main()
