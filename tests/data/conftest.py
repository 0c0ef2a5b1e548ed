"""A small tokenizer that behaves as Phi-3's does, and files of chats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CASES = Path(__file__).parents[1] / "cases"
WORDS = ["▁the", "▁answer", "▁question", "▁is", "ing", "▁a", "▁", "<|", "|>", "end", "\n\n"]

torch.set_num_threads(1)


def build_tokenizer(*, rstrip: bool = True, pad: str = "<|endoftext|>", template: str = PHI3_TEMPLATE) -> Any:
    """Byte-fallback BPE, `▁` for blanks, and role tokens that swallow the white space after them."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges: list[tuple[str, str]] = []
    vocabulary += [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    model = models.BPE(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("<|endoftext|>", normalized=False)])
    roles = ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    backend.add_special_tokens([AddedToken(role, normalized=False, rstrip=rstrip) for role in roles])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token=pad,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3", "max_position_embeddings": 512}))
    return str(folder)


def chat(question: str = "a question", answer: str = "the answer") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def case(name: str) -> list[dict[str, Any]]:
    """The rows of a file from a fault report."""
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[Any], name: str = "chats.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write
