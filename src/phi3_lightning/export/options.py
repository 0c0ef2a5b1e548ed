"""What an export writes."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from phi3_lightning.errors import ConfigError
from phi3_lightning.export.ollama import check_ollama_from
from phi3_lightning.files import local_path
from phi3_lightning.model.base import DType

Format = Literal["peft", "merged", "loralib", "gguf"]
GgufType = Literal["f32", "f16"]
CONVERTER = "convert_hf_to_gguf.py"


def find_converter(folder: str) -> Path:
    """Return llama.cpp's converter in a checkout, or in the unpacked source package of llama-cpp-python."""
    root = local_path("--llama_cpp", folder)
    for place in (root, root / "vendor/llama.cpp"):
        if (place / CONVERTER).is_file():
            return (place / CONVERTER).resolve()
    raise ConfigError(
        f"--llama_cpp: {folder} has no {CONVERTER}; give a checkout of llama.cpp, or the unpacked source package of "
        "llama-cpp-python"
    )


@dataclass(frozen=True)
class Export:
    """What is written."""

    format: Format = "peft"
    """``peft``: the adapter, for PEFT and servers; ``merged``: a whole model; ``loralib``: a state dict of loralib's
    layers; ``gguf``: the adapter for llama.cpp, or with ``merge`` a whole model."""
    dtype: DType | GgufType | None = None
    """Type of the weights: of a merged model one of torch's, in a GGUF file ``f32`` or ``f16``; None: that of the
    base's files, and float32 for an adapter."""
    max_shard_size: str = "1GB"
    """Largest file of a merged model."""
    name: str | None = None
    """What its card calls it, such as the name of its repository on the hub; None: the name of the folder."""
    merge: bool = False
    """Whether a GGUF file holds base and adapter as one model."""
    llama_cpp: str | None = None
    """Folder of llama.cpp, whose converter writes a whole model as GGUF."""
    ollama_from: str | None = None
    """What ``FROM`` names in an adapter's Modelfile: a model of Ollama's, or the relative path of a GGUF file."""

    def __post_init__(self) -> None:
        """Refuse options that the format has no use for."""
        if self.dtype is not None and self.format not in ("merged", "gguf"):
            raise ConfigError(
                f"--dtype: adapters are written in float32, and {self.dtype} is for --format merged or gguf"
            )
        allowed = get_args(GgufType if self.format == "gguf" else DType)
        if self.dtype is not None and self.dtype not in allowed:
            raise ConfigError(f"--dtype: --format {self.format} has {' or '.join(allowed)}, and not {self.dtype}")
        if self.merge and self.format not in ("merged", "gguf"):
            raise ConfigError(f"--merge: --format {self.format} holds the adapter alone; leave one of the two out")
        if (self.format == "gguf" and self.merge) != (self.llama_cpp is not None):
            raise ConfigError(
                "--llama_cpp: --format gguf --merge needs the folder of llama.cpp, and nothing else does; give "
                "--format gguf --merge --llama_cpp FOLDER"
            )
        if self.ollama_from is not None and (self.format != "gguf" or self.merge):
            raise ConfigError(
                "--ollama_from: it is the base of an adapter in GGUF; give --format gguf without --merge, or no base"
            )
        check_ollama_from(self.ollama_from)
        if self.format == "gguf" and importlib.util.find_spec("gguf") is None:
            raise ConfigError("--format gguf: it needs pip install 'phi3-lightning[gguf]'")
        if self.llama_cpp is not None:
            find_converter(self.llama_cpp)

    @property
    def whole(self) -> bool:
        """Whether a whole model is written, and not an adapter."""
        return self.format == "merged" or self.merge

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type of the weights, as torch has it."""
        names = {"f32": "float32", "f16": "float16"}
        return None if self.dtype is None else getattr(torch, names.get(self.dtype, self.dtype))
