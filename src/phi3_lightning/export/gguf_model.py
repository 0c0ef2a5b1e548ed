"""A whole model as llama.cpp reads it, by llama.cpp's own converter, and what the file holds afterwards."""

import json
import math
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import gguf
import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import Phi3ForCausalLM, PreTrainedTokenizerFast

from phi3_lightning.errors import ConfigError, ModelError
from phi3_lightning.export.chat_files import TOKENIZER_CONFIG
from phi3_lightning.export.gguf import ARCHITECTURE, OUT_TYPES, weight_names
from phi3_lightning.export.options import CONVERTER

ATTENTION_FACTOR = gguf.Keys.Rope.SCALING_ATTN_FACTOR.format(arch=ARCHITECTURE)
PHI3_NAME = re.compile("phi-?3", re.IGNORECASE)
PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
"""What llama.cpp looks up in the vocabulary of a model that is named after Phi-3."""


def check_needs(converter: Path, tokenizer: Path) -> None:
    """Refuse before the work begins what the converter would refuse after it.

    ``tokenizer`` is the folder with the tokenizer's files.
    """
    if not _is_byte_level(tokenizer):
        if not (tokenizer / "tokenizer.model").is_file():
            raise ConfigError(
                "--llama_cpp: the converter reads Phi-3's vocabulary from tokenizer.model, and the tokenizer's folder "
                "has none; copy it from the repository of the base into the folder of data.tokenizer"
            )
        if find_spec("sentencepiece") is None:
            raise ConfigError("--llama_cpp: the converter reads tokenizer.model with pip install sentencepiece")
    listing = subprocess.run(
        [sys.executable, str(converter), "--print-supported-models"], capture_output=True, text=True, check=False
    )
    lines = f"{listing.stdout}\n{listing.stderr}".split()
    if Phi3ForCausalLM.__name__ not in lines:
        reason = (listing.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(
            f"--llama_cpp: {CONVERTER} does not list {Phi3ForCausalLM.__name__} ({reason}); it needs the packages of "
            "requirements/requirements-convert_hf_to_gguf.txt beside it, or is too old"
        )


def prepare(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Name in the files of a merged model what the converter would misread.

    It takes a byte-level vocabulary from tokenizer.json under the class name ``GPT2Tokenizer`` alone, and llama.cpp
    puts a BOS token before every text of a SentencePiece vocabulary for which nothing else is recorded.
    """
    path = folder / TOKENIZER_CONFIG
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if _is_byte_level(folder):
        settings["tokenizer_class"] = "GPT2Tokenizer"
    settings["add_bos_token"] = adds_bos(tokenizer)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"architectures": [Phi3ForCausalLM.__name__]}
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a plain text gets a BOS token."""
    ids: list[int] = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def convert(converter: Path, folder: Path, dtype: torch.dtype, name: str, file: Path) -> None:
    """Run the converter on the files of a merged model; its output is shown."""
    command = [sys.executable, str(converter), str(folder), "--outfile", str(file), "--outtype", OUT_TYPES[dtype]]
    result = subprocess.run([*command, "--model-name", name], check=False)
    if result.returncode != 0 or not file.is_file():
        raise ModelError(
            f"--llama_cpp: {CONVERTER} ended with status {result.returncode}, its output is above; nothing was "
            "written. Where it does not recognise the pre-tokenizer, take a newer llama.cpp"
        )


def record_name(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the ``general.name`` with which llama.cpp gives a text the ids of the tokenizer.

    Phi-3's role tokens swallow the white space that follows them. No key of GGUF records that, and llama.cpp does it
    for models whose name has ``phi-3`` or ``phi3`` in it; it cannot load such a name without Phi-3's vocabulary.
    """
    if _stripping_tokens(tokenizer) and tokenizer.get_vocab().keys() >= PHI3_TOKENS:
        return name if PHI3_NAME.search(name) else f"{name} phi-3"
    return PHI3_NAME.sub("phi 3", name)


def warn_of_white_space(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Warn where llama.cpp keeps white space that the tokenizer drops."""
    tokens = _stripping_tokens(tokenizer)
    if tokens and not PHI3_NAME.search(name):
        rank_zero_warn(
            f"llama.cpp keeps the white space after {', '.join(tokens[:4])}, which this tokenizer drops: a chat gets "
            "other ids there than in training; render it without white space after these tokens"
        )


def _stripping_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The special tokens that swallow the white space after them."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip and token.special]


@torch.no_grad()
def load_weights(model: Phi3ForCausalLM, file: Path) -> None:
    """Give a model the weights that a GGUF file holds.

    Raises:
        ModelError: If the file lacks a weight, has one more, or one of another shape.
    """
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = weight_names(model, model.config.num_hidden_layers)
    expected = {*names.values(), *(_rope_factors(model))}
    if wrong := sorted(tensors.keys() ^ expected):
        raise ModelError(f"{file.name}: the converter wrote other tensors than the model has: {', '.join(wrong[:4])}")
    for name, parameter in model.named_parameters():
        tensor = tensors[names[name]]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if values.shape != parameter.shape:
            shapes = f"{tuple(values.shape)}, and in the model {tuple(parameter.shape)}"
            raise ModelError(f"{file.name}: {tensor.name} has shape {shapes}; take a newer llama.cpp")
        parameter.copy_(values)


def _rope_factors(model: Phi3ForCausalLM) -> dict[str, list[float]]:
    """Longrope's factors, by the names of their tensors."""
    rope = cast("dict[str, Any]", model.config.rope_parameters)
    names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
    return {name: rope[key] for name, key in names.items() if key in rope}


def check_metadata(model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, file: Path) -> None:
    """Compare what a GGUF file records besides weights with the model and its tokenizer.

    Raises:
        ModelError: If llama.cpp would compute something else, or give a text other ids.
    """
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    fields |= {tensor.name: tensor.data.tolist() for tensor in reader.tensors if tensor.name in _rope_factors(model)}
    fields.setdefault(ATTENTION_FACTOR, 1.0)
    tokens = fields[gguf.Keys.Tokenizer.LIST]
    expected = {
        gguf.Keys.General.NAME: name,
        gguf.Keys.Tokenizer.EOS_ID: tokenizer.eos_token_id,
        gguf.Keys.Tokenizer.ADD_BOS: adds_bos(tokenizer),
        gguf.Keys.Tokenizer.CHAT_TEMPLATE: tokenizer.chat_template,
        **_hyper_parameters(model),
        **_rope_factors(model),
    }
    wrong = [key for key, value in expected.items() if not _equal(fields.get(key), value)]
    wrong += [token for token, index in tokenizer.get_vocab().items() if tokens[index : index + 1] != [token]]
    if wrong:
        raise ModelError(
            f"{file.name}: the converter recorded other values than model and tokenizer have for "
            f"{', '.join(wrong[:4])}; take a newer llama.cpp"
        )


def _hyper_parameters(model: Phi3ForCausalLM) -> dict[str, Any]:
    config, rope = model.config, cast("dict[str, Any]", model.config.rope_parameters)
    rotated = int(rope.get("partial_rotary_factor", 1.0) * config.hidden_size) // config.num_attention_heads
    values = {
        gguf.Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        gguf.Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        gguf.Keys.LLM.FEED_FORWARD_LENGTH: config.intermediate_size,
        gguf.Keys.LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        gguf.Keys.Attention.HEAD_COUNT: config.num_attention_heads,
        gguf.Keys.Attention.HEAD_COUNT_KV: config.num_key_value_heads,
        gguf.Keys.Attention.LAYERNORM_RMS_EPS: config.rms_norm_eps,
        gguf.Keys.Rope.FREQ_BASE: float(rope["rope_theta"]),
        gguf.Keys.Rope.DIMENSION_COUNT: rotated,
    }
    keys = {key.format(arch=ARCHITECTURE): value for key, value in values.items()}
    return keys | {ATTENTION_FACTOR: model.model.rotary_emb.attention_scaling}


def _equal(actual: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return isinstance(actual, list) and len(actual) == len(expected) and all(map(_equal, actual, expected))
    if isinstance(expected, float):
        return actual is not None and math.isclose(actual, expected, rel_tol=1e-6)  # float32 in the file
    return bool(actual == expected)


def _is_byte_level(folder: Path) -> bool:
    """Whether the vocabulary in tokenizer.json is of bytes, as GPT-2's and Phi-4's are, and not SentencePiece's."""
    state: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return '"ByteLevel"' in json.dumps(state.get("pre_tokenizer"))
