r"""Write a small Llama-type model as the Phi-3 that computes the same: a real pretrained base of any size for trials.

    python scripts/llama_to_phi3.py HuggingFaceTB/SmolLM2-135M-Instruct smollm2-phi3

A Phi-3 block is a Llama block whose q, k, v and gate, up lie in one matrix each. The tokenizer gets Phi-3's chat tokens
in the place of special tokens that chats never hold, and Phi-3's template.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from phi3_lightning.config.lora import PHI3_FUSED_LAYERS

ASSETS = Path(__file__).parent.parent / "src/phi3_lightning/assets/tiny_phi3"
EOS, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TOKENS = {
    "<|user|>": ("<jupyter_start>", TURN_START),
    "<|assistant|>": ("<jupyter_text>", TURN_START),
    "<|system|>": ("<jupyter_script>", TURN_START),
    "<|end|>": ("<empty_output>", TURN_END),
}
"""Of SmolLM2: whose id a chat token of Phi-3 takes, and with whose embedding it starts."""

SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "rope_parameters",
)  # fmt: skip


def convert(llama: LlamaForCausalLM) -> Phi3ForCausalLM:
    """Return the Phi-3 that computes what ``llama`` does, in its dtype.

    Args:
        llama: Any size; heads as wide as ``hidden_size / num_attention_heads``, no biases, default rotary angles.

    Raises:
        ValueError: If Phi-3 has no equal for the architecture.
    """
    given = llama.config
    wide = given.head_dim * given.num_attention_heads != given.hidden_size
    if given.attention_bias or given.mlp_bias or wide or given.rope_parameters["rope_type"] != "default":
        raise ValueError("Phi-3 has no biases, no heads of another width, and no such scaling of rotary angles")
    eos = given.eos_token_id
    config = Phi3Config(
        **{key: getattr(given, key) for key in SAME}, bos_token_id=given.bos_token_id, eos_token_id=eos,
        pad_token_id=eos, sliding_window=None, original_max_position_embeddings=given.max_position_embeddings,
    )  # fmt: skip
    phi3 = Phi3ForCausalLM(config).to(llama.dtype)
    weights = llama.state_dict()
    for name in set(phi3.state_dict()) - set(weights):
        [(fused, parts)] = [pair for pair in PHI3_FUSED_LAYERS.items() if pair[0] in name]
        weights[name] = torch.cat([weights.pop(name.replace(fused, part)) for part in parts])
    phi3.load_state_dict(weights)
    phi3.tie_weights()
    return phi3.eval()


def with_chat_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return SmolLM2's tokenizer with Phi-3's chat tokens and template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for token, (old, _) in CHAT_TOKENS.items():
        vocabulary[token] = vocabulary.pop(old)
    replaced = {vocabulary[token] for token in CHAT_TOKENS}
    plain = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    state["added_tokens"] = sorted(
        [
            *(added for added in state["added_tokens"] if added["id"] not in replaced),
            # as in Phi-3: a role token swallows the line break behind it
            *({"id": vocabulary[token], "content": token, "rstrip": True} | plain for token in CHAT_TOKENS),
        ],
        key=lambda added: added["id"],
    )
    template = json.loads((ASSETS / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token=EOS, eos_token=EOS, pad_token=EOS,
        unk_token=EOS, padding_side="left", model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False, chat_template=template,
    )  # fmt: skip


def write(source: str, folder: Path) -> None:
    """Write model and tokenizer.

    Args:
        source: Folder or hub id of SmolLM2, or of a model with its special tokens.
        folder: Where to.
    """
    tokenizer = with_chat_tokens(AutoTokenizer.from_pretrained(source))
    llama = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    phi3 = convert(llama)
    ids = tokenizer("The quick brown fox jumps over the lazy dog; 2 + 2 = 4.", return_tensors="pt").input_ids
    with torch.no_grad():
        # float32 rounds logits of some tens by less than a thousandth; rows in a wrong place move them by units
        torch.testing.assert_close(phi3(input_ids=ids).logits, llama(input_ids=ids).logits, rtol=0, atol=1e-2)
        rows = phi3.get_input_embeddings().weight
        for token, (_, like) in CHAT_TOKENS.items():
            rows[tokenizer.convert_tokens_to_ids(token)] = rows[tokenizer.convert_tokens_to_ids(like)]
    stops = [tokenizer.convert_tokens_to_ids(token) for token in (EOS, "<|end|>", TURN_END)]
    phi3.generation_config = GenerationConfig(eos_token_id=stops, bos_token_id=stops[0], pad_token_id=stops[0])
    tokenizer.save_pretrained(folder)
    phi3.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    """Convert what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or hub id")
    parser.add_argument("folder", type=Path, help="where to")
    given = parser.parse_args()
    write(given.source, given.folder)


if __name__ == "__main__":
    main()
