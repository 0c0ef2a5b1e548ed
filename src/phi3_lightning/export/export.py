"""A checkpoint's adapter as a folder that others read, compared with the live model before it gets its name."""

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
from phi3_lightning.export.card import Origin, write_card
from phi3_lightning.export.certificate import Certificate, Reference, logits, refer
from phi3_lightning.export.chat_files import Chat
from phi3_lightning.export.loralib_model import with_loralib
from phi3_lightning.export.merge import Merger, attach, write_merged
from phi3_lightning.model import base as base_model
from phi3_lightning.module import Phi3LoRAModule

Format = Literal["peft", "merged", "loralib"]
DType = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Export:
    """What is written.

    Args:
        format: ``peft``: the adapter, for PEFT and servers; ``merged``: a whole model; ``loralib``: a state dict of
            loralib's layers.
        dtype: Type of a merged model's weights; None: that of the base's files.
        max_shard_size: Largest file of a merged model.
    """

    format: Format = "peft"
    dtype: DType | None = None
    max_shard_size: str = "1GB"


@dataclass(frozen=True)
class Exported:
    """What came of an export.

    Args:
        certificate: The comparison with the live model.
        serving: How vLLM serves it, or why it does not; None: as any model.
    """

    certificate: Certificate
    serving: str | None


def export(module: Phi3LoRAModule, chat: Chat, origin: Origin, what: Export, target: Path) -> Exported:
    """Write a folder, read it again with the libraries that others use, and compare it with the live model.

    The folder gets its name when the comparison holds; ``target`` is untouched before.

    Args:
        module: The model with its adapter, on the CPU or a GPU; it holds no model afterwards.
        chat: Tokenizer, stop tokens, and prompts to compare on.
        origin: Where the model comes from.
        what: Format and types.
        target: The folder to make; what it holds is replaced.

    Returns:
        The comparison, and how to serve the folder.

    Raises:
        ModelError: If base and adapter cannot be merged, or the export does not answer as the live model does.
    """
    with _new_folder(target) as folder:
        form = _live(module)[1].to_peft()
        chat_files.write_tokenizer(chat, folder, bare=what.format != "merged")
        if what.format == "merged":
            certificate = _merged(module, form, chat, what, folder)
        else:
            certificate = _adapter(module, form, chat, origin.base, what.format, folder)
        serving = adapter_files.serving_hint(form, origin.base, target.name) if what.format == "peft" else None
        files = fetch(module.base, module.revision, ["*.json"])
        config = json.loads((files / "config.json").read_text(encoding="utf-8"))
        chat_files.write_generation_config(chat, files, config, folder)
        (folder / "certificate.json").write_text(json.dumps(certificate.content(), indent=2), encoding="utf-8")
        write_card(origin, what.format, certificate, serving, folder, target.name)
        certificate.check()
    return Exported(certificate, serving)


def _adapter(module: Phi3LoRAModule, form: PeftForm, chat: Chat, base: str, kind: Format, folder: Path) -> Certificate:
    reference = _refer(module, chat, "adapter in PEFT to live model" if kind == "peft" else "loralib to live model")
    live, adapter = _live(module)
    names = adapter_files.short_names(live, form)
    model = module.detach_adapter()  # plain transformers, every weight as it was loaded
    if kind == "peft":
        adapter_files.write_peft(form, names, base, module.revision, folder)
        exported = cast("nn.Module", PeftModel.from_pretrained(model, str(folder)))
    else:
        adapter_files.write_loralib(form, adapter.targets, folder)
        exported = with_loralib(model, folder)
    return reference.certify(logits(exported, chat.prompts, nullcontext()))


def _merged(module: Phi3LoRAModule, form: PeftForm, chat: Chat, what: Export, folder: Path) -> Certificate:
    if module.init == "random":
        raise ConfigError("--format merged: model.init: random has no files to merge into; export it as peft")
    weights = BaseWeights(module.base, module.revision)
    asked = None if what.dtype is None else getattr(torch, what.dtype)
    attention, dtype = _live(module)[0].config._attn_implementation, _dtype(module)
    coarsest = dtype if asked is None or torch.finfo(asked).eps < torch.finfo(dtype).eps else asked
    if module.quantization is None:
        reference = _refer(module, chat, "merged to live model", coarsest)
        module.detach_adapter()
    else:  # a merged model has no quantised weights: it is held against the adapter on the base in full
        reference = _refer_in_full(module, form, chat, coarsest)
    gc.collect()
    config = base_model.read_config(module.base, module.revision)
    write_merged(weights, Merger(base_model.skeleton(config), form), folder, asked, what.max_shard_size)
    exported = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, device_map={"": module.device}
    )
    return reference.certify(logits(exported, chat.prompts, nullcontext()))


def _live(module: Phi3LoRAModule) -> tuple[Phi3ForCausalLM, Adapter]:
    module.configure_model()
    return cast("Phi3ForCausalLM", module.model), cast("Adapter", module.adapter)


def _dtype(module: Phi3LoRAModule) -> torch.dtype:
    return _live(module)[0].dtype  # of the first parameter: the frozen embedding


def _refer(module: Phi3LoRAModule, chat: Chat, compared: str, dtype: torch.dtype | None = None) -> Reference:
    model, adapter = _live(module)
    coarsest = dtype or _dtype(module)
    targets = [target.path for target in adapter.targets]
    return refer(compared, model, chat.prompts, targets, coarsest, module.autocast, adapter.disabled)


def _refer_in_full(module: Phi3LoRAModule, form: PeftForm, chat: Chat, dtype: torch.dtype) -> Reference:
    targets = [target.path for target in _live(module)[1].targets]
    module.detach_adapter()
    gc.collect()
    full = base_model.load(module.base, revision=module.revision, dtype=module.dtype_name, device=module.device)
    model = attach(full, form)
    inner = cast("Phi3ForCausalLM", model.base_model.model)
    compared = f"merged to the adapter on the base without {module.quantization}"
    return refer(compared, inner, chat.prompts, targets, dtype, nullcontext, model.disable_adapter)


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
