"""The base and its adapter as one model: summed in float32, rounded once, one tensor at a time."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.errors import ModelError
from phi3_lightning.export.base_files import INDEX, BaseWeights
from phi3_lightning.progress import count_progress

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def attach_by_peft(base: Phi3ForCausalLM, form: PeftForm) -> PeftModel:
    """Put an adapter on a base, which may be on the meta device, by PEFT alone, whatever backend trained it.

    Raises:
        ModelError: If a tensor of the adapter has no place in the model, or a place stays empty.
    """
    config = deepcopy(form.config)
    config.base_model_name_or_path = None  # PEFT sets it to that of ``base``
    model = get_peft_model(base, config)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):  # PEFT makes them where the base is, which may be nowhere
            for part in layer.adapter_layer_names:
                getattr(layer, part).to_empty(device="cpu")
        elif isinstance(layer, ModulesToSaveWrapper):
            layer.modules_to_save.to_empty(device="cpu")
    result: Any = set_peft_model_state_dict(model, form.tensors)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    misfits = [*result.unexpected_keys, *(trained & set(result.missing_keys))]
    if misfits:
        raise ModelError(f"the adapter does not fit the base: {', '.join(misfits[:5])}")
    return model.eval()


class Merger:
    """Adds an adapter's LoRA deltas to base weights, by PEFT's own arithmetic, one weight at a time."""

    def __init__(self, skeleton: Phi3ForCausalLM, form: PeftForm) -> None:
        tied = bool(skeleton.config.tie_word_embeddings)
        model = cast("nn.Module", attach_by_peft(skeleton, form).base_model.model)
        self._layers: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer | ModulesToSaveWrapper)
        }
        ends = {EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")}
        self.unties = tied and bool(ends & self._layers.keys())
        """Whether embedding and head, which share one weight in the base, become two."""

    @torch.no_grad()
    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight with the adapter's LoRA delta, in float32; as it is where there is none.

        Raises:
            ModelError: If the weight is not that of the config, or the sum is not finite.
        """
        path, _, kind = name.rpartition(".")
        layer = self._layers.get(path)
        if layer is None:
            return weight
        if isinstance(layer, ModulesToSaveWrapper):
            return layer.modules_to_save["default"].get_parameter(kind).detach().float()
        frozen = layer.get_base_layer()
        expected = frozen.weight.shape
        if weight.shape != expected:
            raise ModelError(f"{name}: the base's file has shape {tuple(weight.shape)}, its config {tuple(expected)}")
        frozen.weight = nn.Parameter(weight.float(), requires_grad=False)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"{name}: the sum of base and adapter is not finite ({error})") from error
        result: Tensor = frozen.weight.data
        frozen.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
        layer.merged_adapters.clear()
        return result


def write_merged(
    weights: BaseWeights, merger: Merger, folder: Path, dtype: torch.dtype | None, max_shard_size: str
) -> torch.dtype:
    """Write the merged model's safetensors and config.json, and return the type of the written weights.

    ``dtype`` None is that of the base's files. ``max_shard_size``, such as ``2GB``, bounds the memory that is needed
    besides the adapter: the tensors of one file.
    """
    shapes = weights.shapes()
    if merger.unties:
        shapes.setdefault(HEAD, shapes[EMBEDDING])
    target = {name: torch.empty_like(shape, dtype=dtype or shape.dtype) for name, shape in shapes.items()}
    plan = split_torch_state_dict_into_shards(
        target, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    with count_progress("merging", "tensors", len(target)) as advance:
        for file, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                weight = weights.read(EMBEDDING if name == HEAD and merger.unties else name)
                shard[name] = merger.merged(name, weight).to(target[name].dtype).contiguous()
                advance(1)
            save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    written = target[EMBEDDING].dtype
    config = _config(weights.config, written, unties=merger.unties)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return written


def _config(base: dict[str, Any], dtype: torch.dtype, *, unties: bool) -> dict[str, Any]:
    """The base's own configuration, so that every reader of it reads this one: only what has changed is changed."""
    config = {key: value for key, value in base.items() if key not in ("auto_map", "_name_or_path")}
    config["torch_dtype" if "torch_dtype" in base else "dtype"] = str(dtype).removeprefix("torch.")
    config["use_cache"] = True
    if (base.get("rope_scaling") or {}).get("type") == "su":
        config["rope_scaling"] = {**base["rope_scaling"], "type": "longrope"}
    return config | ({"tie_word_embeddings": False} if unties else {})
