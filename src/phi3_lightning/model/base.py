"""The frozen Phi-3: which models are accepted, and how one is loaded."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, Phi3Config, Phi3ForCausalLM, PreTrainedConfig
from transformers.utils.import_utils import is_bitsandbytes_available, is_flash_attn_2_available

from phi3_lightning.errors import ModelError
from phi3_lightning.hub import refusal, with_revision
from phi3_lightning.model import int8_dynamic
from phi3_lightning.model.packed_attention import PACKED

DType = Literal["bfloat16", "float16", "float32"]
Initialisation = Literal["pretrained", "random"]
Quantization = Literal["nf4", "int8", "int8_dynamic"]
Attention = Literal["auto", "documents", "sdpa", "eager", "flash_attention_2"]

RELATIVES = {
    "phi3small": "Phi-3-small has its own block-sparse architecture",
    "phi3_v": "Phi-3-vision takes images",
    "phimoe": "Phi-3.5-MoE is a mixture of experts",
    "phi4mm": "Phi-4-multimodal takes images and sound",
    "phi": "Phi-1 and Phi-2 have another architecture",
}
"""Models that are easily mistaken for a ``Phi3ForCausalLM``, and why they are not one."""


def read_config(base: str, revision: str | None = None) -> Phi3Config:
    """Read the configuration of a base model, and refuse what is not a ``Phi3ForCausalLM``.

    The rope type ``su`` of early 128k models gets its present name ``longrope``.

    Raises:
        ModelError: If there is no configuration, or it describes another architecture.
    """
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise ModelError(f"model.base: {base} has no config.json; give the folder that holds the model's files")
    try:
        config, _ = PreTrainedConfig.get_config_dict(base, revision=revision)
    except (OSError, ValueError) as error:
        why = refusal(error, base, revision) or error
        raise ModelError(
            f"model.base: no configuration for {with_revision(base, revision)!r}; give a folder with config.json or a "
            f"hub id ({why})"
        ) from error
    kind, architectures = config.get("model_type"), config.get("architectures") or ["Phi3ForCausalLM"]
    if kind != "phi3" or architectures != ["Phi3ForCausalLM"]:
        reason = RELATIVES.get(str(kind), "it has another architecture")
        raise ModelError(
            f"model.base: {base} is a {kind!r} model ({', '.join(architectures)}): {reason}. "
            "Phi3ForCausalLM models work: Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4, Phi-4-mini"
        )
    rope = config.get("rope_scaling") or {}
    if rope.get("type") == "su":
        config["rope_scaling"] = {**rope, "type": "longrope"}
    return Phi3Config.from_dict(config)


def skeleton(
    config: Phi3Config, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> Phi3ForCausalLM:
    """Return the model of ``config`` without weights, frozen, in evaluation mode, on the meta device."""
    with torch.device("meta"):
        model = Phi3ForCausalLM._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    return cast("Phi3ForCausalLM", model.requires_grad_(False).eval())


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Draw the same random base weights in every run, so that a checkpoint finds its base again."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def load(
    base: str,
    *,
    revision: str | None = None,
    init: Initialisation = "pretrained",
    dtype: DType = "bfloat16",
    attn_implementation: Attention = "auto",
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
) -> Phi3ForCausalLM:
    """Load a frozen base model, or make one with random weights from its configuration.

    Args:
        init: ``pretrained`` reads the safetensors; ``random`` needs config.json alone.
        quantization: Keep the linear layers' weights in 4 bits (``nf4`` with double quantisation, Dettmers et al. 2023,
            https://arxiv.org/abs/2305.14314) or 8 bits (``int8``) and compute in ``dtype``; ``int8_dynamic`` computes
            in 8 bits too (:mod:`~phi3_lightning.model.int8_dynamic`).

    Raises:
        ModelError: If the model cannot be used, or the attention kernel is not available.
    """
    config = read_config(base, revision)
    attention = choose_attention(attn_implementation, torch.device(device))
    torch_dtype = getattr(torch, dtype)
    quantized = None
    if quantization == "int8_dynamic":
        int8_dynamic.check_device(torch.device(device).type)
    elif quantization is not None:
        quantized = _quantization_config(quantization, init, torch_dtype)
    if init == "random":
        model = _random(config, torch_dtype, attention, torch.device(device))
    else:
        try:
            model = Phi3ForCausalLM.from_pretrained(
                base,
                config=config,
                revision=revision or "main",
                dtype=torch_dtype,
                attn_implementation=attention,
                quantization_config=quantized,
                use_safetensors=True,
                device_map={"": device},
            )
        except OSError as error:
            raise ModelError(
                f"model.base: {base} has no safetensors weights ({error}); give a folder or hub id that has them, "
                "or set model.init: random for a trial without weights"
            ) from error
    if quantization == "int8_dynamic":
        int8_dynamic.quantize_layers(model)
    if quantization is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point():  # a norm that is not copied keeps the pages of its whole file in memory
                parameter.data = parameter.data.clone()
    return model.requires_grad_(False)


def _quantization_config(kind: Literal["nf4", "int8"], init: Initialisation, dtype: torch.dtype) -> BitsAndBytesConfig:
    if init == "random":
        raise ModelError(f"model.quantization: {kind} needs trained weights; leave it out with model.init: random")
    if not is_bitsandbytes_available():
        raise ModelError(f"model.quantization: {kind} needs bitsandbytes: pip install 'phi3-lightning[qlora]'")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_as_quantized(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for its inference kernel on a CPU, at the first evaluation.

    The repacked weights have rounded scales, and later training steps get no gradient through them.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        from bitsandbytes.nn.modules import Linear4bit  # an extra

        for layer in model.modules():
            if isinstance(layer, Linear4bit):
                layer.support_avx512bf16_for_cpu = False


def _random(config: Phi3Config, dtype: torch.dtype, attention: str, device: torch.device) -> Phi3ForCausalLM:
    model = skeleton(config, dtype, attention)
    model.to_empty(device=device)
    model.tie_weights()
    with fixed_seed():
        for module in model.modules():
            model._init_weights(module)
    return model


def choose_attention(kernel: Attention, device: torch.device) -> str:
    """Return the name of an attention kernel, as transformers has it, that runs on a device."""
    if kernel == "flash_attention_2" and not (device.type == "cuda" and is_flash_attn_2_available()):
        raise ModelError(
            f"model.attn_implementation: flash_attention_2 needs a CUDA device and the package flash-attn, "
            f"and this run uses {device.type}; use documents"
        )
    return PACKED if kernel == "auto" else kernel


@torch.no_grad()
def fingerprint(model: nn.Module, base_name: Callable[[str], str] = lambda name: name, samples: int = 64) -> str:
    """Return a hash of 64 hexadecimal digits that tells base models apart in well under a second for 7.6 GB.

    It covers the shape and dtype of each frozen parameter, ``samples`` evenly spaced values of it, and the name that it
    has without an adapter, by ``base_name``. Trainable parameters do not count.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        count = min(samples, parameter.numel())
        positions = torch.arange(count, device=parameter.device) * (parameter.numel() - 1) // max(count - 1, 1)
        digest.update(f"{base_name(name)} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_values(parameter.detach(), positions).cpu().numpy().tobytes())
    return digest.hexdigest()


def _values(parameter: Tensor, positions: Tensor) -> Tensor:
    """The values at positions of the flattened parameter, float32, the same on all ranks that share it."""
    if not isinstance(parameter, DTensor):
        return parameter.reshape(-1)[positions].float()
    local = parameter.to_local().reshape(-1)
    first = -(-parameter.shape[0] // parameter.device_mesh.size()) * parameter.device_mesh.get_local_rank()
    inside = positions - first * parameter.stride(0)
    own = (inside >= 0) & (inside < local.numel())
    # as whole numbers: adding zeros would lose the sign of a zero
    bits = torch.zeros(positions.shape, dtype=torch.int32, device=positions.device)
    bits[own] = local[inside[own]].float().view(torch.int32)
    bits = bits.to(parameter.device_mesh.device_type)
    torch.distributed.all_reduce(bits, group=parameter.device_mesh.get_group())
    return bits.view(torch.float32)
