"""The files of a base model, in a folder or from the hub, read tensor by tensor."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from phi3_lightning.errors import ModelError
from phi3_lightning.hub import refusal

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Return the folder with the files of a hub id or of a folder; files in the hub's cache are not fetched again."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        why = refusal(error, name, revision) or error
        raise ModelError(f"model.base: {name} is no folder and cannot be fetched from the hub ({why})") from error


class BaseWeights:
    """The weights of a base model (folder or hub id) on the disk; one tensor at a time is read into memory.

    Raises:
        ModelError: If there are no safetensors, or they hold quantised weights.
    """

    def __init__(self, base: str, revision: str | None) -> None:
        self.folder = fetch(base, revision, ["*.json", "*.safetensors"])
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in self.config:
            raise ModelError(
                f"model.base: the files in {base} are quantised, and a sum with them would be rounded to a few bits; "
                "merge into the base they were made from: give it with --model.base"
            )
        self._files = self._find_files(base)

    def _find_files(self, base: str) -> dict[str, Path]:
        index = self.folder / INDEX
        if index.is_file():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: self.folder / file for name, file in files.items()}
        single = self.folder / SINGLE
        if not single.is_file():
            raise ModelError(f"model.base: {base} has no {SINGLE}, and a merged model is made from the base's files")
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)

    def shapes(self) -> dict[str, Tensor]:
        """Return all tensors on the meta device: names, shapes and types without content."""
        shapes = {}
        for path in dict.fromkeys(self._files.values()):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    part = file.get_slice(name)
                    shapes[name] = torch.empty(part.get_shape(), dtype=part[:0].dtype, device="meta")
        return {name: shapes[name] for name in self._files}

    def read(self, name: str) -> Tensor:
        """Return one tensor, on the CPU in its own type."""
        with safe_open(self._files[name], framework="pt") as file:
            return cast("Tensor", file.get_tensor(name))
