"""A checkpoint's adapter as a folder for others, compared with the live model before it gets its name."""

import gc
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, Phi3ForCausalLM, PreTrainedTokenizerFast

from phi3_lightning.adapters.adapter import Adapter, PeftForm
from phi3_lightning.errors import ConfigError
from phi3_lightning.export import adapter_files, chat_files, ollama
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
from phi3_lightning.export.options import Export, find_converter
from phi3_lightning.model import base as base_model
from phi3_lightning.module import Phi3LoRAModule


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
    if what.whole and module.init == "random":
        raise ConfigError("--merge: model.init: random has no files to merge into; export the adapter alone")
    weights = BaseWeights(module.base, module.revision) if what.whole else None
    form = _adapter(module).to_peft()
    name = what.name or target.name
    with _new_folder(target) as folder:
        chat_files.write_tokenizer(chat, folder, bare=what.format != "merged")
        if weights is None:
            certificate = _write_adapter(module, form, chat, provenance.base, what, folder, target.name)
        elif what.format == "merged":
            certificate = _write_merged(module, form, chat, weights, what, folder)
        else:
            certificate = _write_gguf_model(module, form, chat, weights, what, folder, target.name)
        serving = None
        if what.format == "peft":
            serving = adapter_files.serving_hint(form, provenance.base, name, provenance.revision)
        elif what.format == "gguf":
            [file] = folder.glob("*.gguf")
            context = ollama.short_context(base_model.read_config(module.base, module.revision))
            serving = _llama_cpp_hint(context, file.name, whole=what.whole)
            base = None if what.whole else provenance.base
            ollama.write_modelfile(
                folder, chat.stop_ids, file.name, adapter_of=base, ollama_from=what.ollama_from, context=context
            )
        chat_files.write_generation_config(chat, fetch(module.base, module.revision, ["*.json"]), folder)
        content = {**certificate.content(), "files": file_hashes(folder, (path.name for path in folder.iterdir()))}
        (folder / CERTIFICATE).write_text(json.dumps(content, indent=2), encoding="utf-8")
        write_card(provenance, what.format, certificate, serving, folder, name, whole=what.whole)
        certificate.check()
    return Exported(certificate, serving)


def _adapter(module: Phi3LoRAModule) -> Adapter:
    return cast("Adapter", module.adapter)


def _write_adapter(
    module: Phi3LoRAModule, form: PeftForm, chat: Chat, base_id: str, what: Export, folder: Path, name: str
) -> Certificate:
    if what.format == "gguf":
        return _write_gguf_adapter(module, form, chat, base_id, what.torch_dtype or torch.float32, folder, name)
    targets = _adapter(module).targets
    compared = "adapter in PEFT" if what.format == "peft" else what.format
    reference = _measure(module, chat, compared, module.loaded_model.dtype)
    base = module.detach_adapter()  # plain transformers, every weight as it was loaded
    if what.format == "peft":
        adapter_files.write_peft(form, base_id, module.revision, folder)
        exported = cast("nn.Module", PeftModel.from_pretrained(base, str(folder)))
    else:
        adapter_files.write_loralib(form, targets, folder)
        exported = with_loralib(base, folder)
    return reference.certify(logits(exported, chat.prompts, nullcontext()))


def _write_gguf_adapter(
    module: Phi3LoRAModule, form: PeftForm, chat: Chat, base_id: str, dtype: torch.dtype, folder: Path, name: str
) -> Certificate:
    from phi3_lightning.export import gguf

    config = base_model.read_config(module.base, module.revision)
    names = gguf.weight_names(base_model.skeleton(config), config.num_hidden_layers)
    gguf.check_adapter(form, names)
    reference = _measure(module, chat, "adapter in GGUF", _coarsest(module.loaded_model.dtype, dtype))
    base = module.detach_adapter()
    file = folder / gguf.file_name(name, dtype, adapter=True)
    gguf.write_adapter(form, names, dtype, name, base_id, file)
    with tempfile.TemporaryDirectory() as read_back:
        adapter_files.write_peft(gguf.read_adapter(file, names), base_id, module.revision, Path(read_back))
        exported = cast("nn.Module", PeftModel.from_pretrained(base, read_back))
    return reference.certify(logits(exported, chat.prompts, nullcontext()))


def _write_merged(
    module: Phi3LoRAModule, form: PeftForm, chat: Chat, weights: BaseWeights, what: Export, folder: Path
) -> Certificate:
    dtype, attention = module.loaded_model.dtype, module.loaded_model.config._attn_implementation
    reference = _measure_whole(module, form, chat, what, "merged")
    write_merged(weights, _merger(module, form), folder, what.torch_dtype, what.max_shard_size)
    exported = _load(folder, module, dtype, attention)
    return reference.certify(logits(exported, chat.prompts, nullcontext()))


def _write_gguf_model(
    module: Phi3LoRAModule, form: PeftForm, chat: Chat, weights: BaseWeights, what: Export, folder: Path, name: str
) -> Certificate:
    from phi3_lightning.export import gguf, gguf_model

    converter = find_converter(cast("str", what.llama_cpp))
    gguf_model.check_needs(converter, folder)
    dtype, attention = module.loaded_model.dtype, module.loaded_model.config._attn_implementation
    reference = _measure_whole(module, form, chat, what, "merged model in GGUF")
    merged = folder / name
    merged.mkdir()
    chat_files.write_tokenizer(chat, merged, bare=False)
    written = write_merged(weights, _merger(module, form), merged, what.torch_dtype, what.max_shard_size)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(merged))
    gguf_model.prepare(merged, tokenizer)
    file = folder / gguf.file_name(name, written, adapter=False)
    record = gguf_model.record_name(name, tokenizer)
    gguf_model.convert(converter, merged, written, record, file)
    exported = _load(merged, module, dtype, attention)
    gguf_model.load_weights(exported, file)
    gguf_model.check_metadata(exported, tokenizer, record, file)
    gguf_model.warn_of_white_space(tokenizer, record)
    shutil.rmtree(merged)
    return reference.certify(logits(exported, chat.prompts, nullcontext()))


def _merger(module: Phi3LoRAModule, form: PeftForm) -> Merger:
    return Merger(base_model.skeleton(base_model.read_config(module.base, module.revision)), form)


def _load(folder: Path, module: Phi3LoRAModule, dtype: torch.dtype, attention: str) -> Phi3ForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, device_map={"": module.device}
    )
    return cast("Phi3ForCausalLM", model)


def _coarsest(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda kind: torch.finfo(kind).eps)


def _measure_whole(module: Phi3LoRAModule, form: PeftForm, chat: Chat, what: Export, exported: str) -> Reference:
    """Measure what a whole model is compared with, and detach the adapter."""
    dtype = module.loaded_model.dtype
    coarsest = _coarsest(dtype, what.torch_dtype or dtype)
    if module.quantization is None:
        reference = _measure(module, chat, exported, coarsest)
        module.detach_adapter()
    else:
        paths = [target.path for target in _adapter(module).targets]
        module.detach_adapter()
        gc.collect()
        reference = _measure_in_full(module, form, chat, paths, coarsest)
    gc.collect()
    return reference


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


def _llama_cpp_hint(context: int | None, file: str, *, whole: bool) -> str:
    """Return how llama.cpp runs a GGUF file; ``context``: up to which length a longrope model has its short factors."""
    model = f"-m {file}" if whole else f"-m BASE.gguf --lora {file}"
    if context is None:
        return f"llama-cli {model} --jinja"
    return (
        f"llama-cli {model} --jinja -c {context} (with a longer context llama.cpp takes longrope's long factors for "
        "short chats too)"
    )


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
