"""A checkpoint's adapter as a folder for others, compared with the live model before it gets its name."""

import gc
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, Phi3ForCausalLM

from phi3_lightning.adapters.adapter import Adapter, PeftForm
from phi3_lightning.errors import ConfigError
from phi3_lightning.export import adapter_files, chat_files
from phi3_lightning.export.base_files import BaseWeights, fetch
from phi3_lightning.export.card import Provenance, write_card
from phi3_lightning.export.certificate import (
    CERTIFICATE,
    Certificate,
    Reference,
    file_hashes,
    logits,
    measure_reference,
)
from phi3_lightning.export.chat_files import Chat
from phi3_lightning.export.loralib_model import with_loralib
from phi3_lightning.export.merge import Merger, attach_by_peft, write_merged
from phi3_lightning.model import base as base_model
from phi3_lightning.module import Phi3LoRAModule

Format = Literal["peft", "merged", "loralib"]


@dataclass(frozen=True)
class Export:
    """What is written."""

    format: Format = "peft"
    """``peft``: the adapter, for PEFT and servers; ``merged``: a whole model; ``loralib``: a state dict of loralib's
    layers."""
    dtype: base_model.DType | None = None
    """Type of a merged model's weights; None: that of the base's files."""
    max_shard_size: str = "1GB"
    """Largest file of a merged model."""
    name: str | None = None
    """What its card calls it, such as the name of its repository on the hub; None: the name of the folder."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    certificate: Certificate
    """The comparison with the live model."""
    serving: str | None
    """How vLLM serves it, or why it does not; None: as any model."""


def export(module: Phi3LoRAModule, chat: Chat, provenance: Provenance, what: Export, target: Path) -> Exported:
    """Write a folder, read it again with the libraries that others use, and compare it with the live model.

    It takes the place of ``target`` when the comparison is within the tolerance. The module, on the CPU or a GPU, holds
    no model afterwards.

    Raises:
        ModelError: If base and adapter cannot be merged, or the export does not answer as the live model does.
    """
    if what.format == "merged" and module.init == "random":
        raise ConfigError("--format merged: model.init: random has no files to merge into; export it as peft")
    weights = BaseWeights(module.base, module.revision) if what.format == "merged" else None
    form = _adapter(module).to_peft()
    name = what.name or target.name
    with _new_folder(target) as folder:
        chat_files.write_tokenizer(chat, folder, bare=weights is None)
        if weights is None:
            certificate = _write_adapter(module, form, chat, provenance.base, what.format, folder)
        else:
            certificate = _write_merged(module, form, chat, weights, what, folder)
        serving = None
        if what.format == "peft":
            serving = adapter_files.serving_hint(form, provenance.base, name, provenance.revision)
        chat_files.write_generation_config(chat, fetch(module.base, module.revision, ["*.json"]), folder)
        content = {**certificate.content(), "files": file_hashes(folder, (path.name for path in folder.iterdir()))}
        (folder / CERTIFICATE).write_text(json.dumps(content, indent=2), encoding="utf-8")
        write_card(provenance, what.format, certificate, serving, folder, name)
        certificate.check()
    return Exported(certificate, serving)


def _adapter(module: Phi3LoRAModule) -> Adapter:
    return cast("Adapter", module.adapter)


def _write_adapter(
    module: Phi3LoRAModule, form: PeftForm, chat: Chat, base_id: str, kind: Format, folder: Path
) -> Certificate:
    targets = _adapter(module).targets
    reference = _measure(module, chat, "adapter in PEFT" if kind == "peft" else kind, module.loaded_model.dtype)
    base = module.detach_adapter()  # plain transformers, every weight as it was loaded
    if kind == "peft":
        adapter_files.write_peft(form, base_id, module.revision, folder)
        exported = cast("nn.Module", PeftModel.from_pretrained(base, str(folder)))
    else:
        adapter_files.write_loralib(form, targets, folder)
        exported = with_loralib(base, folder)
    return reference.certify(logits(exported, chat.prompts, nullcontext()))


def _write_merged(
    module: Phi3LoRAModule, form: PeftForm, chat: Chat, weights: BaseWeights, what: Export, folder: Path
) -> Certificate:
    dtype, attention = module.loaded_model.dtype, module.loaded_model.config._attn_implementation
    written = dtype if what.dtype is None else getattr(torch, what.dtype)
    coarsest = max(dtype, written, key=lambda kind: torch.finfo(kind).eps)
    if module.quantization is None:
        reference = _measure(module, chat, "merged", coarsest)
        module.detach_adapter()
    else:
        paths = [target.path for target in _adapter(module).targets]
        module.detach_adapter()
        gc.collect()
        reference = _measure_in_full(module, form, chat, paths, coarsest)
    gc.collect()
    merger = Merger(base_model.skeleton(base_model.read_config(module.base, module.revision)), form)
    write_merged(weights, merger, folder, None if what.dtype is None else written, what.max_shard_size)
    exported = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, device_map={"": module.device}
    )
    return reference.certify(logits(exported, chat.prompts, nullcontext()))


def _measure(module: Phi3LoRAModule, chat: Chat, exported: str, dtype: torch.dtype) -> Reference:
    adapter, compared = _adapter(module), f"{exported} to live model"
    paths = [target.path for target in adapter.targets]
    return measure_reference(
        compared, module.loaded_model, chat.prompts, paths, dtype, module.autocast, adapter.disabled
    )


def _measure_in_full(
    module: Phi3LoRAModule, form: PeftForm, chat: Chat, paths: list[str], dtype: torch.dtype
) -> Reference:
    """Measure the adapter on its base without quantisation, since a merged model has none."""
    full = base_model.load(module.base, revision=module.revision, dtype=module.dtype_name, device=module.device)
    model = attach_by_peft(full, form)
    inner = cast("Phi3ForCausalLM", model.base_model.model)
    compared = f"merged to the adapter on the base without {module.quantization}"
    return measure_reference(compared, inner, chat.prompts, paths, dtype, nullcontext, model.disable_adapter)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Make a folder beside ``target`` that takes its name when all has gone well, and is gone when it has not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)  # made for its owner alone, as are the files of safetensors: servers run as others
        for file in folder.iterdir():
            file.chmod(0o644)
        former = None
        if target.exists():
            former = Path(tempfile.mkdtemp(prefix=f".{target.name}-former-", dir=target.parent))
            target.rename(former / target.name)
        folder.rename(target)
        if former is not None:
            shutil.rmtree(former)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
