"""Builds the embedded default: a tiny pretrained Phi-3, its tokenizer, and the chats and pairs of the quickstart.

Usage: python scripts/build_tiny_phi3.py [--out FOLDER]. Everything follows from fixed seeds and runs on the
CPU in one thread, whose sums are the same on every number of cores, in a few minutes.
"""

import argparse
import json
import random
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tiny_phi3_chats import Messages, build_chats
from tiny_phi3_corpus import pretraining_documents
from tiny_phi3_pairs import build_pairs
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerBase

ASSETS = Path(__file__).parent.parent / "src/phi3_lightning/assets/tiny_phi3"
SEED = 0
VOCABULARY, CONTEXT = 1024, 1024
DOCUMENTS, ECHOES, ROW = 25_000, 1_500, 256
STEPS, ROWS, PEAK_LR, WARMUP, SMOOTHING = 500, 12, 4e-3, 50, 0.05

UNK, BOS, CLOSE, EOS, END = "<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>"
CHAT_TOKENS = (
    *("<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>"),
    *("<|system|>", END, "<|placeholder5|>", "<|placeholder6|>", "<|user|>"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-fallback BPE built as Phi-3's is: spaces belong to words, chat tokens swallow white space."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw = Tokenizer(BPE(byte_fallback=True))
    raw.normalizer = spaces
    # Merges stay inside words and digits stay single. Only training splits: Phi-3 itself has no pre-tokenizer.
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|."), "isolated")
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 1 - len(CHAT_TOKENS),
        special_tokens=[UNK, BOS, CLOSE, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["▁", *string.ascii_letters, *string.digits, *string.punctuation],
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    learned = json.loads(raw.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(BPE(learned["vocab"], merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = spaces
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (UNK, BOS)])
    tokenizer.add_tokens([AddedToken(CLOSE, rstrip=True, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in CHAT_TOKENS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerBase:
    """Write the tokenizer's files and return it as users will load it."""
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": UNK}
    settings = names | {
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def build_model(tokenizer: PreTrainedTokenizerBase) -> Phi3ForCausalLM:
    """Make a randomly initialised Phi-3 with grouped heads, small enough to travel with the package."""
    torch.manual_seed(SEED)
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=CONTEXT,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Phi3ForCausalLM(config)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    return model


def echoes(tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[list[int]]:
    """Chats whose answer repeats random tokens: each id of the vocabulary is read and written equally often."""
    rng = random.Random(SEED)
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", END])
    task = tokenizer("Say this:")["input_ids"]
    pool: list[int] = []
    for _ in range(count):
        if len(pool) < 12:
            pool += rng.sample(range(len(tokenizer)), len(tokenizer))
        tokens, pool = pool[:12], pool[12:]
        yield [user, *task, *tokens, end, assistant, *tokens, end, tokenizer.eos_token_id]


def pretraining_rows(documents: list[str | Messages], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Tokenise the documents, mix the echoes in, and cut the stream into rows."""
    texts = [
        document + EOS if isinstance(document, str) else tokenizer.apply_chat_template(document, tokenize=False)
        for document in documents
    ]
    encoded = [*tokenizer(texts)["input_ids"], *echoes(tokenizer, ECHOES)]
    random.Random(SEED).shuffle(encoded)
    stream = torch.tensor([token for ids in encoded for token in ids])
    return stream[: len(stream) // ROW * ROW].view(-1, ROW)


def pretrain(model: Phi3ForCausalLM, rows: torch.Tensor) -> None:
    """Train on every token of the rows in float32, with a warm-up and a linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
    )
    generator = torch.Generator().manual_seed(SEED)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(STEPS * ROWS // len(rows) + 1)])
    columns = (
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    model.model.embed_tokens.padding_idx = None  # padding is also the end of a text, whose row has to learn
    model.train()
    with Progress(*columns) as progress:
        task = progress.add_task("pretraining", total=STEPS, loss="")
        for step in range(STEPS):
            batch = rows[order[step * ROWS : (step + 1) * ROWS]]
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            # Smoothing keeps the base from being so sure of itself that an adapter cannot change its mind.
            loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, loss=f"loss {loss.item():.3f}")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Build all files of the embedded default into one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write (default: the package's own)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    chats, documents = build_chats(SEED), pretraining_documents(SEED, DOCUMENTS)
    for name, part in (("chats_train", chats.train), ("chats_val", chats.val), ("prompts", chats.prompts)):
        write_rows(folder / f"{name}.jsonl", ({"messages": messages} for messages in part))
    for name, pairs in build_pairs(SEED)._asdict().items():
        write_rows(folder / f"pairs_{name}.jsonl", pairs)
    conversations = [document for document in documents if not isinstance(document, str)] + chats.train
    texts = [document for document in documents if isinstance(document, str)]
    texts += [message["content"] for messages in conversations for message in messages]
    tokenizer = write_tokenizer(train_tokenizer(texts), folder)
    model = build_model(tokenizer)
    pretrain(model, pretraining_rows(documents, tokenizer))
    model.bfloat16().save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    Console().print(f"{folder}: {model.num_parameters():,} parameters, {size:.2f} MB")


if __name__ == "__main__":
    main()
