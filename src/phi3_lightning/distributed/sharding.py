"""A frozen base sharded over the ranks of FSDP2, none of which ever holds all of it.

Each decoder layer, the embedding and the head are a unit of their own, whose weights are gathered when the unit runs.
The base is built without weights, its adapters are attached, the units are sharded, and then each rank reads its own
rows of each weight. See Zhao et al. 2023, https://arxiv.org/abs/2304.11277, and ``torch.distributed.fsdp.fully_shard``.
"""

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from phi3_lightning.errors import ModelError
from phi3_lightning.model import base as base_model


@dataclass(frozen=True)
class Sharding:
    """How a model is spread over ranks."""

    mesh: DeviceMesh
    """The ranks, in one dimension."""
    device: torch.device
    """Where this rank computes."""
    reshard_after_forward: bool
    """Whether a layer's weights are freed after its forward pass and gathered again for its backward pass."""
    cpu_offload: bool
    """Whether this rank's share, its gradients and optimiser state stay in the memory of the host."""


def build_placeholder_model(
    config: Phi3Config, dtype: torch.dtype, attention: str, device: torch.device
) -> Phi3ForCausalLM:
    """Return a frozen model whose weights have shape, type and device, and take no memory.

    Each is one value, expanded to a matrix: adapters can be attached as if the weights were there.
    """
    model = base_model.skeleton(config, dtype, attention)
    _replace_frozen(model, lambda weight: torch.zeros((), dtype=weight.dtype, device=device).expand(weight.shape))
    for module in list(model.modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
    return model


def _replace_frozen(model: nn.Module, replacement: Callable[[Tensor], Tensor]) -> None:
    """Replace each frozen weight; one that is shared stays shared."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                if parameter not in replaced:
                    replaced[parameter] = nn.Parameter(replacement(parameter), requires_grad=False)
                setattr(module, name, replaced[parameter])


def shard(model: Phi3ForCausalLM, sharding: Sharding) -> None:
    """Spread a placeholder model with adapters over the ranks; base weights are still to be read.

    Two weights are not sharded: one that embedding and head share, which is needed from the first layer to the last,
    and that of the last norm, of a few KB, which would be a unit of its own.
    """
    _replace_frozen(model, lambda weight: torch.empty_like(weight, device="meta").contiguous())
    tied = model.lm_head.weight if model.config.tie_word_embeddings else None
    dtype = model.model.embed_tokens.weight.dtype
    offload = CPUOffloadPolicy(pin_memory=sharding.device.type == "cuda")
    options: dict[str, Any] = {
        "mesh": sharding.mesh,
        # autocast casts adapters for a float32 base as it does on one device
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": offload if sharding.cpu_offload else OffloadPolicy(),
        "ignored_params": {model.model.norm.weight} | (set() if tied is None else {tied}),
    }
    *layers, last = model.model.layers
    for layer in layers:
        fully_shard(layer, reshard_after_forward=sharding.reshard_after_forward, **options)
    fully_shard(last, reshard_after_forward=False, **options)  # its backward pass is next
    if tied is None:
        embedding = model.model.embed_tokens
        # the backward pass of a frozen embedding reads none of its weights
        cast("FSDPModule", fully_shard(embedding, reshard_after_forward=True, **options)).set_unshard_in_backward(
            any(parameter.requires_grad for parameter in embedding.parameters())
        )
        # the loss calls the head once a chunk: gathered by the first call, freed after the backward pass
        cast(
            "FSDPModule", fully_shard(model.lm_head, reshard_after_forward=False, **options)
        ).set_reshard_after_backward(False, recurse=False)
    fully_shard(model.model, reshard_after_forward=False, **options)  # orders the units; it has no weights of its own


def load_sharded_weights(
    model: Phi3ForCausalLM,
    sharding: Sharding,
    init: base_model.Initialisation,
    base: str,
    revision: str | None,
    base_name: Callable[[str], str],
) -> None:
    """Give a sharded model its base weights; ``base_name`` removes what an adapter inserts into their names.

    Raises:
        ModelError: If there are no safetensors, or a weight is missing or of another shape.
    """
    if init == "random":
        state = _draw_random(model, sharding, base_name)
    else:
        state = _read_pretrained(model, sharding, base, revision, base_name)
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.tie_weights()


def _read_pretrained(
    model: Phi3ForCausalLM, sharding: Sharding, base: str, revision: str | None, base_name: Callable[[str], str]
) -> dict[str, Tensor]:
    """This rank's rows of each base weight, from the safetensors files."""
    state: dict[str, Tensor] = {}
    with ExitStack() as files:
        pieces: dict[str, Any] = {}
        for path in _weight_files(base, revision):
            file = files.enter_context(safe_open(path, framework="pt"))
            pieces |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                continue
            key = base_name(name)
            shape = tuple(pieces[key].get_shape()) if key in pieces else None
            if shape != tuple(parameter.shape):
                raise ModelError(
                    f"model.base: {base} has {key} with shape {shape} and its config.json asks for "
                    f"{tuple(parameter.shape)}; the files do not belong together"
                )
            state[name] = _placed(pieces[key][_own_rows(parameter)], parameter, sharding)
    return state


def _draw_random(model: Phi3ForCausalLM, sharding: Sharding, base_name: Callable[[str], str]) -> dict[str, Tensor]:
    """This rank's rows of the random weights that the base has on one device, drawn one full weight at a time."""
    config = deepcopy(model.config)  # building another model with it sets its dtype and attention kernel
    donor = base_model.skeleton(config, model.model.embed_tokens.weight.dtype)
    missing = {
        base_name(name): (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_meta
    }
    state: dict[str, Tensor] = {}
    with base_model.fixed_seed():
        for prefix, module in donor.named_modules():
            if not dict(module.named_parameters(recurse=False)):
                continue
            module.to_empty(device=sharding.device, recurse=False)
            donor._init_weights(module)
            for key, full in module.named_parameters(prefix, recurse=False):
                name, parameter = missing[key]
                state[name] = _placed(full.detach()[_own_rows(parameter)], parameter, sharding)
            module.to(device="meta")
    if model.config.tie_word_embeddings:  # the last draw counts, as on one device
        state["model.embed_tokens.weight"] = state["lm_head.weight"]
    return state


def _weight_files(base: str, revision: str | None) -> list[str]:
    options: dict[str, Any] = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    try:
        index = cached_file(base, "model.safetensors.index.json", **options)
        if index is not None:
            return list(get_checkpoint_shard_files(base, index, revision=revision or "main")[0])
        single = cached_file(base, "model.safetensors", **options)
    except OSError as error:
        raise ModelError(f"model.base: {base} has no safetensors weights ({error})") from error
    if single is None:
        raise ModelError(
            f"model.base: {base} has no safetensors weights; give a folder or hub id that has them, "
            "or set model.init: random for a trial without weights"
        )
    return [str(Path(single))]


def _own_rows(parameter: Tensor) -> slice:
    """The rows of a sharded parameter that this rank keeps, as :func:`torch.chunk` splits them."""
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    count, ranks = parameter.shape[0], parameter.device_mesh.size()
    start = min(parameter.device_mesh.get_local_rank() * -(-count // ranks), count)
    return slice(start, min(start + -(-count // ranks), count))


def _placed(rows: Tensor, parameter: Tensor, sharding: Sharding) -> nn.Parameter:
    """These rows as what a sharded parameter keeps on this rank; a copy, also of a slice."""
    if not isinstance(parameter, DTensor):
        return nn.Parameter(rows.to(sharding.device, parameter.dtype, copy=True), requires_grad=False)
    local = rows.to("cpu" if sharding.cpu_offload else sharding.device, parameter.dtype, copy=True)
    sharded = DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(sharded, requires_grad=False)


def distribute_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return this rank's share, sharded as ``reference`` is, of a tensor that every rank holds; nothing is sent."""
    if not isinstance(reference, DTensor) or isinstance(tensor, DTensor) or tensor.shape != reference.shape:
        return tensor
    return distribute_tensor(
        tensor.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None
    )


def reshard_all(model: nn.Module) -> None:
    """Free the weights that units have gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
