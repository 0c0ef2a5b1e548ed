"""Chats as documents of lm-evaluation-harness: the prompts of training, and the last answer of each as reference."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

QUICKSTART = "src/phi3_lightning/assets/tiny_phi3/chats_val.jsonl"


def load(chats: str = QUICKSTART, tokenizer: str | None = None, pretrained: str = "", **_: Any) -> dict[str, Dataset]:
    """Read a JSONL file whose rows hold ``messages``; the harness passes ``--metadata`` and ``--model_args``."""
    template = AutoTokenizer.from_pretrained(tokenizer or pretrained)
    documents = []
    for line in Path(chats).read_text(encoding="utf-8").splitlines():
        *prompt, answer = json.loads(line)["messages"]
        text = template.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        lengths = [len(template(text + part, add_special_tokens=False).input_ids) for part in ("", answer["content"])]
        documents.append({"prompt": text, "answer": answer["content"], "tokens": lengths[1] - lengths[0]})
    return {"test": Dataset.from_list(documents)}


def token_perplexity(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Weight the log-likelihood of a reference by its tokens, and say whether the model would have written it."""
    [(log_likelihood, is_argmax)] = results
    return {"token_perplexity": (log_likelihood, document["tokens"]), "acc": float(is_argmax)}
