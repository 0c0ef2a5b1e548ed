"""Whether llama.cpp, with a base and an exported adapter in GGUF, continues prompts as transformers and PEFT do.

    python examples/llama_cpp_check.py my-bot my-bot-gguf --base BASE_FOLDER --llama_cpp LLAMA_CPP_FOLDER

`my-bot` is an export of the format peft, `my-bot-gguf` one of the format gguf of the same checkpoint, and the last
folder a checkout of llama.cpp or the unpacked source package of llama-cpp-python, which has to be installed as well.
The base is converted by llama.cpp's converter to float32 and float16. Both sides get the same ids; the ids that
llama.cpp itself makes of the text are shown where they differ.

A continuation agrees if its tokens are the same, or if transformers' two best logits at the first other token are
closer than twice the tolerance of logits, so that either may be taken. That tolerance is four times the effect of one
rounding to float16 in every linear layer: llama.cpp rounds the input of each product, keys and values.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from phi3_lightning.export.certificate import ROUNDINGS, difference, logits, rounded
from phi3_lightning.export.gguf_model import convert, prepare, record_name
from phi3_lightning.export.options import find_converter

PLAIN = (
    "The capital of France is",
    "Once upon a time there was a",
    "To boil an egg, first",
    "The sea is",
    "Three colours of the rainbow are",
)
CHAT = (
    "What can you do for me?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "How long do I boil an egg?",
    "Who wrote Hamlet?",
)


@dataclass(frozen=True)
class Reference:
    """Prompts of one kind in transformers and PEFT."""

    texts: list[str]
    ids: list[list[int]]
    continuations: list[list[int]]
    gaps: list[list[float]]
    """Distance of the two best logits at each token of the continuations."""
    logits: list[torch.Tensor]
    tolerance: float
    """How far other logits may be."""


def convert_base(base: Path, llama_cpp_folder: str, dtype: torch.dtype, folder: Path) -> Path:
    """Convert a base; its files are linked into another folder, since the converter needs some settings changed."""
    source, tokenizer = folder / "base", PreTrainedTokenizerFast.from_pretrained(base)
    source.mkdir(exist_ok=True)
    for path in base.iterdir():
        link = source / path.name
        if path.name in ("config.json", "tokenizer_config.json"):
            link.write_bytes(path.read_bytes())
        elif not link.exists():
            link.symlink_to(path.resolve())
    prepare(source, tokenizer)
    file = folder / f"base-{dtype}.gguf"
    convert(find_converter(llama_cpp_folder), source, dtype, record_name("base", tokenizer), file)
    return file


def best(scores: torch.Tensor) -> int:
    """The token with the largest logit; of equal ones, as copied embeddings have, the first."""
    return int((scores == scores.max()).nonzero()[0])


@torch.inference_mode()
def continue_greedily(model: nn.Module, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """The tokens that transformers takes, and the distance of the two best logits at each."""
    tokens, gaps = list(ids), []
    for _ in range(count):
        scores = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
        first, second = scores.topk(2).values.tolist()
        gaps.append(first - second)
        tokens.append(best(scores))
    return tokens[len(ids) :], gaps


def measure(model: PeftModel, layers: list[str], texts: list[str], ids: list[list[int]], count: int) -> Reference:
    """Let transformers and PEFT continue prompts, and derive the tolerance."""
    live = [logits(model, [each], torch.inference_mode()) for each in ids]
    with rounded(model.base_model.model, layers, torch.float16):
        moved = [logits(model, [each], torch.inference_mode()) for each in ids]
    continuations, gaps = zip(*(continue_greedily(model, each, count) for each in ids), strict=True)
    tolerance = ROUNDINGS * difference(torch.cat(live), torch.cat(moved)).max_logit
    return Reference(texts, ids, list(continuations), list(gaps), live, tolerance)


class LlamaCpp:
    """A model of llama.cpp."""

    def __init__(self, model: Path, adapter: Path | None, context: int) -> None:
        lora = {} if adapter is None else {"lora_path": str(adapter)}
        self.model = llama_cpp.Llama(str(model), n_ctx=context, logits_all=True, verbose=False, **lora)

    def tokenize(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=False, special=True)

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.model.reset()
        self.model.eval(ids)
        return torch.from_numpy(self.model.scores[: len(ids)].copy())

    def continue_greedily(self, ids: list[int], count: int) -> list[int]:
        scores, tokens = self.logits(ids), []
        for _ in range(count):
            tokens.append(best(scores[-1]))
            self.model.eval(tokens[-1:])
            scores = torch.from_numpy(self.model.scores[: len(ids) + len(tokens)].copy())
        return tokens


def compare(kind: str, theirs: LlamaCpp, alone: LlamaCpp, expected: Reference) -> dict:
    """Compare logits and continuations of prompts, from the same ids, and print the figures."""
    count, same, agree, worst, effect = len(expected.continuations[0]), 0, 0, 0.0, 0.0
    for text, ids, tokens, gaps, live in zip(
        expected.texts, expected.ids, expected.continuations, expected.gaps, expected.logits, strict=True
    ):
        worst = max(worst, difference(live, theirs.logits(ids)).max_logit)
        effect = max(effect, difference(live, alone.logits(ids)).max_logit)
        actual = theirs.continue_greedily(ids, count)
        first = next((n for n, pair in enumerate(zip(tokens, actual, strict=True)) if pair[0] != pair[1]), count)
        same += first == count
        agree += first == count or gaps[first] < 2 * expected.tolerance
        if first < count:
            print(f"  {text!r}: {first} tokens, then {tokens[first]} or {actual[first]}, {gaps[first]:.4f} apart")
        if theirs.tokenize(text) != ids:
            print(f"  {text!r}\n    tokenizer: {ids}\n    llama.cpp: {theirs.tokenize(text)}")
    print(
        f"{kind}: {same} of {len(expected.ids)} continuations of {count} tokens are the same, {agree} agree; logits "
        f"differ by up to {worst:.4f}, tolerance {expected.tolerance:.4f}, the adapter's effect {effect:.1f}",
        flush=True,
    )
    # an adapter without effect shows nothing
    holds = agree == len(expected.ids) and worst <= expected.tolerance < effect / 10
    return {"kind": kind, "same": same, "agree": agree, "max_logit": worst, "tolerance": expected.tolerance,
            "effect": effect, "holds": holds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="folder of `export --format peft`")
    parser.add_argument("gguf", type=Path, help="folder of `export --format gguf`")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument("--llama_cpp", required=True, help="folder of llama.cpp's converter")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()

    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.peft)
    prompts = {"plain": list(PLAIN), "chat": [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in CHAT
    ]}  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    layers = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    ours = PeftModel.from_pretrained(base, str(options.peft)).eval()
    [adapter] = options.gguf.glob("*.gguf")
    references = {
        kind: measure(ours, layers, texts, [tokenizer(text).input_ids for text in texts], options.tokens)
        for kind, texts in prompts.items()
    }
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.float32, torch.float16):
            file = convert_base(options.base, options.llama_cpp, dtype, Path(folder))
            theirs, alone = (LlamaCpp(file, lora, context=256) for lora in (adapter, None))
            for kind, reference in references.items():
                figures.append(compare(f"base in {dtype}, {kind}", theirs, alone, reference))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    if not all(figure["holds"] for figure in figures):
        sys.exit("llama.cpp does not continue as transformers does")


if __name__ == "__main__":
    main()
