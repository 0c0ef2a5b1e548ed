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
from phi3_lightning.export.gguf_model import convert, find_converter, prepare, record_name

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
class Result:
    """One prompt on both sides."""

    text: str
    ids: list[int]
    theirs: list[int]
    """The ids that llama.cpp makes of the text."""
    max_logit: float
    same: int
    """Tokens before the first that differs."""
    gap: float
    """Distance of transformers' two best logits at that token."""


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


@torch.inference_mode()
def continue_greedily(model: nn.Module, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """The tokens that transformers takes, and the distance of the two best logits at each."""
    tokens, gaps = list(ids), []
    for _ in range(count):
        best = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float().topk(2)
        gaps.append((best.values[0] - best.values[1]).item())
        tokens.append(int(best.indices[0]))
    return tokens[len(ids) :], gaps


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
            tokens.append(int(scores[-1].argmax()))
            self.model.eval(tokens[-1:])
            scores = torch.from_numpy(self.model.scores[: len(ids) + len(tokens)].copy())
        return tokens


def compare(theirs: LlamaCpp, ours: nn.Module, text: str, ids: list[int], count: int) -> Result:
    """Compare logits and continuation of one prompt, from the same ids."""
    expected, gaps = continue_greedily(ours, ids, count)
    found = theirs.continue_greedily(ids, count)
    live = logits(ours, [ids], torch.inference_mode())
    same = next((n for n, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]), count)
    gap = gaps[same] if same < count else 0.0
    return Result(text, ids, theirs.tokenize(text), difference(live, theirs.logits(ids)).max_logit, same, gap)


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
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.float32, torch.float16):
            file = convert_base(options.base, options.llama_cpp, dtype, Path(folder))
            theirs, alone = (LlamaCpp(file, lora, context=256) for lora in (adapter, None))
            for kind, texts in prompts.items():
                ids = [tokenizer(text).input_ids for text in texts]
                live = logits(ours, ids, torch.inference_mode())
                with rounded(ours.base_model.model, layers, torch.float16):
                    tolerance = ROUNDINGS * difference(live, logits(ours, ids, torch.inference_mode())).max_logit
                effect = difference(live, torch.cat([alone.logits(each) for each in ids])).max_logit
                results = [compare(theirs, ours, *each, options.tokens) for each in zip(texts, ids, strict=True)]
                figures.append(summarise(f"{dtype}, {kind}", results, tolerance, effect, options.tokens))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    if not all(figure["holds"] for figure in figures):
        sys.exit("llama.cpp does not continue as transformers does")


def summarise(kind: str, results: list[Result], tolerance: float, effect: float, tokens: int) -> dict:
    """Print the figures of five prompts, and return them."""
    worst = max(result.max_logit for result in results)
    same = sum(result.same == tokens for result in results)
    agree = sum(result.same == tokens or result.gap < 2 * tolerance for result in results)
    print(
        f"{kind}: {same} of {len(results)} continuations of {tokens} tokens are the same, {agree} agree; logits "
        f"differ by up to {worst:.4f}, tolerance {tolerance:.4f}, the adapter's effect {effect:.1f}"
    )
    for result in results:
        report(result, tokens)
    holds = agree == len(results) and worst <= tolerance < effect / 10  # an adapter without effect shows nothing
    return {"kind": kind, "same": same, "agree": agree, "max_logit": worst, "tolerance": tolerance, "effect": effect,
            "holds": holds}  # fmt: skip


def report(result: Result, tokens: int) -> None:
    if result.same < tokens:
        print(f"  {result.text!r}: {result.same} tokens, then two logits {result.gap:.4f} apart")
    if result.theirs != result.ids:
        print(f"  {result.text!r}\n    tokenizer: {result.ids}\n    llama.cpp: {result.theirs}")


if __name__ == "__main__":
    main()
