"""The adapter as llama.cpp reads it: one GGUF file of type ``adapter``."""

from collections import Counter
from pathlib import Path

import gguf
import torch
from peft import LoraConfig
from torch import Tensor, nn

from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.adapters.convert import layer_keys
from phi3_lightning.adapters.targets import rank_and_scaling
from phi3_lightning.errors import ConfigError, ModelError
from phi3_lightning.export.merge import HEAD

ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHI3]
OUT_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""llama.cpp's names of types."""
FILE_TYPES = {torch.float32: gguf.LlamaFileType.ALL_F32, torch.float16: gguf.LlamaFileType.MOSTLY_F16}
EMBEDDING = "token_embd.weight"
MERGE = "export the merged model: --format gguf --merge --llama_cpp FOLDER"


def weight_names(model: nn.Module, blocks: int) -> dict[str, str]:
    """Return llama.cpp's name of each weight of a Phi-3 model; a tied head has none of its own."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, blocks)
    mapped = {name: names.get_name(name, try_suffixes=(".weight",)) for name, _ in model.named_parameters()}
    if unknown := [name for name, theirs in mapped.items() if theirs is None]:
        raise ModelError(f"--format gguf: the package gguf has no name for {', '.join(unknown[:3])}; update it")
    return {name: theirs for name, theirs in mapped.items() if theirs is not None}


def check_adapter(form: PeftForm, names: dict[str, str]) -> None:
    """Refuse an adapter that llama.cpp cannot apply.

    Its graph adds ``A`` and ``B`` of a weight's name to the product with that weight, and has nothing for magnitudes
    (DoRA) or for modules that are trained in full. A tied head has the embedding's name, so that llama.cpp would
    multiply the head's input by the embedding's ``A`` and abort.
    """
    pairs = _pairs(form, names)
    foreign = sorted(form.tensors.keys() - {key for path in pairs for key in layer_keys(path)})
    if foreign:
        raise ConfigError(
            "--format gguf: llama.cpp applies the matrices A and B alone, and this adapter has more "
            f"({', '.join(foreign[:2])}); {MERGE}"
        )
    if HEAD not in names and any(names[f"{path}.weight"] == EMBEDDING for path in pairs):
        raise ConfigError(
            "--format gguf: embed_tokens is adapted and shares its weight with lm_head in this model, and llama.cpp "
            f"would apply the adapter to both; {MERGE}"
        )


def file_name(name: str, dtype: torch.dtype, *, adapter: bool) -> str:
    """Return the name of a GGUF file by the convention of its package, from which the hub reads the type."""
    convention: str = gguf.naming_convention(
        name, None, None, None, None, OUT_TYPES[dtype].upper(), "LoRA" if adapter else None
    )
    return f"{convention}.gguf"


def write_adapter(form: PeftForm, names: dict[str, str], dtype: torch.dtype, name: str, base: str, file: Path) -> None:
    """Write the adapter's GGUF file; ``name`` and ``base`` are the names that it records.

    llama.cpp scales by alpha / rank of the tensor, with one alpha for the file. A scale that is another one for a layer
    (rsLoRA with several ranks, alpha patterns) is folded into its ``B``, exact for powers of two.

    Raises:
        ConfigError: If a value is too large for ``dtype``.
        ModelError: If the file does not hold what was written, bit by bit.
    """
    pairs = _pairs(form, names)
    alphas = {path: rank_and_scaling(form.config, path)[1] * len(down) for path, (down, _) in pairs.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in pairs.items():
        key = names[f"{path}.weight"]
        if key == EMBEDDING:
            down = down.T  # rows are looked up by token
        tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"] = down, up * (alphas[path] / alpha)
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    if huge := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ConfigError(f"--dtype {OUT_TYPES[dtype]}: {huge[0]} has values beyond its range; write f32")

    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base)
    if "/" in base:  # the hub knows no folders
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check_written(file, tensors)


def _pairs(form: PeftForm, names: dict[str, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """``A`` and ``B`` of each adapted layer's path."""
    paths = {name.removesuffix(".weight"): layer_keys(name.removesuffix(".weight")) for name in names}
    return {path: (form.tensors[a], form.tensors[b]) for path, (a, b) in paths.items() if a in form.tensors}


def _check_written(file: Path, expected: dict[str, Tensor]) -> None:
    written = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(file).tensors}
    if written.keys() != expected.keys() or not all(torch.equal(written[key], expected[key]) for key in expected):
        raise ModelError("the adapter's file does not hold what was written: the disk, or its driver, is broken")


def read_adapter(file: Path, names: dict[str, str]) -> PeftForm:
    """Read a GGUF adapter as llama.cpp does: the scale of each layer is alpha / rank of its tensors.

    Raises:
        ModelError: If llama.cpp would refuse the file.
    """
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        gguf.Keys.General.ARCHITECTURE: ARCHITECTURE,
        gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
        gguf.Keys.Adapter.TYPE: "lora",
    }
    if wrong := [key for key, value in expected.items() if fields.get(key) != value]:
        raise ModelError(f"{file.name}: llama.cpp would refuse its {', '.join(wrong)}; export it again")
    paths = {theirs: ours.removesuffix(".weight") for ours, theirs in names.items()}
    data = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for key in [name.removesuffix(".lora_a") for name in data if name.endswith(".lora_a")]:
        down, up, path = data[f"{key}.lora_a"], data[f"{key}.lora_b"], paths[key]
        ranks[path] = up.shape[1]
        pair = (down.T.contiguous() if key == EMBEDDING else down, up)
        tensors |= dict(zip(layer_keys(path), pair, strict=True))
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=fields[gguf.Keys.Adapter.LORA_ALPHA],
        target_modules=list(ranks),
        rank_pattern=ranks,
        task_type="CAUSAL_LM",
    )
    return PeftForm(config, tensors)
