"""What `export` wrote, answering in plain transformers and PEFT: nothing of this package is imported.

    python examples/serve_an_export.py my-bot-full "Are you open?"                # exported with --merge
    python examples/serve_an_export.py my-bot "Are you open?" --base FOLDER       # an adapter; else by its name

The same folders in other servers, of which docs/export.md says more:

    vllm serve microsoft/Phi-3-mini-4k-instruct --enable-lora --lora-modules my-bot=/path/to/my-bot --max-lora-rank 16
    vllm serve /path/to/my-bot-full
    python convert_hf_to_gguf.py my-bot-full --outfile my-bot.gguf --outtype bf16
    llama-completion -m my-bot.gguf --jinja -p "Are you open?"
"""

import argparse
import json
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("question", nargs="+")
    parser.add_argument("--base", help="folder or hub id of the base of an adapter; else the name that it records")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    given = parser.parse_args()

    described = given.folder / "adapter_config.json"
    if described.exists():
        name = given.base or json.loads(described.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name, dtype="auto"), str(given.folder))
    else:
        model = AutoModelForCausalLM.from_pretrained(given.folder, dtype="auto")
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    stops = GenerationConfig.from_pretrained(  # both tokens that end a turn are in it
        given.folder, max_new_tokens=given.max_new_tokens, do_sample=False
    )

    for question in given.question:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**prompt, generation_config=stops)
        print(f"{question}\n  {tokenizer.decode(ids[0, prompt['input_ids'].shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
