"""What scripts/fetch_models.py requests from a stand-in of the hub, and the folder that it writes."""

import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parents[2]
ASSETS = REPOSITORY / "src/phi3_lightning/assets/tiny_phi3"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<jupyter_start>", "<jupyter_text>", "<jupyter_script>"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def llama_folder(folder: Path) -> Path:
    """A random Llama with grouped queries and the kind of tokenizer that SmolLM2 has."""
    special = [*SPECIAL, "<empty_output>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: index for index, token in enumerate([*special, *letters])}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(special)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", model_max_length=256).save_pretrained(
        folder
    )
    config = LlamaConfig(
        vocab_size=len(special) + len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def fetch_models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    import fetch_models

    yield fetch_models
    for name in ("fetch_models", "llama_to_phi3"):
        sys.modules.pop(name, None)


@pytest.fixture
def requests(fetch_models, monkeypatch, tmp_path) -> list[tuple]:
    """The requests to a stand-in of the hub, which serves the files of a repository that match the patterns."""
    phi3 = tmp_path / "hub/phi3"
    phi3.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (phi3 / name).write_bytes((ASSETS / name).read_bytes())
    for name in ("model-00001-of-00002.safetensors", "modeling_phi3.py"):
        (phi3 / name).write_text("never to be fetched")
    hub = {
        "microsoft/Phi-3-mini-4k-instruct": phi3,
        "HuggingFaceTB/SmolLM2-135M-Instruct": llama_folder(tmp_path / "hub/llama"),
    }
    calls = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns, local_dir):
        calls.append((repo_id, revision))
        for path in hub[repo_id].iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                Path(local_dir).mkdir(parents=True, exist_ok=True)
                (Path(local_dir) / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(fetch_models, "snapshot_download", snapshot_download)
    return calls


def test_the_folder_is_what_the_suite_reads(fetch_models, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fetch_models.py", str(tmp_path / "models"), "--revision", "abc"])
    fetch_models.main()
    assert requests == [("microsoft/Phi-3-mini-4k-instruct", "abc"), ("HuggingFaceTB/SmolLM2-135M-Instruct", None)]
    found = {path.name for path in (tmp_path / "models/phi3-mini-4k-instruct").iterdir()}
    assert found == {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"phi3-mini-4k-instruct", "smollm2-phi3"}
    fetch_models.main()
    assert len(requests) == 2  # existing files are not fetched again


def test_the_converted_model_computes_what_the_llama_does(fetch_models, requests, tmp_path):
    fetch_models.fetch(tmp_path / "models")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "models/smollm2-phi3")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hub/llama", dtype=torch.bfloat16)
    assert ours.config.model_type == "phi3"
    assert ours.dtype == torch.bfloat16
    with torch.no_grad():  # the chat tokens' own rows are new, and in a tied head their logits too
        ids = torch.arange(7, 60)[None]
        found, expected = (model.float()(input_ids=ids).logits[..., 7:] for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # logits of about 0.1, in float32
    rows = ours.get_input_embeddings().weight
    assert torch.equal(rows[6], rows[2])  # <|end|> starts as <|im_end|>


def test_the_converted_tokenizer_has_the_format_of_phi3(fetch_models, requests, tmp_path):
    fetch_models.fetch(tmp_path / "models")
    ours, phi3 = AutoTokenizer.from_pretrained(tmp_path / "models/smollm2-phi3"), AutoTokenizer.from_pretrained(ASSETS)
    text = phi3.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == text
    ids = ours(text).input_ids
    assert [index for index in ids if index < 7] == [5, 6, 3, 6, 4]
    assert ours.decode([index for index in ids if index >= 7]) == "Be brief.Hi"  # white space is the chat tokens' own


def test_rows_in_another_order_would_be_seen(fetch_models, tmp_path, monkeypatch):
    import llama_to_phi3

    monkeypatch.setattr(
        llama_to_phi3, "PHI3_FUSED_LAYERS",
        {"qkv_proj": ("q_proj", "v_proj", "k_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    )  # fmt: skip
    with pytest.raises(AssertionError, match="not close"):
        llama_to_phi3.write(str(llama_folder(tmp_path / "llama")), tmp_path / "phi3")
    assert not (tmp_path / "phi3").exists()


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"head_dim": 16}])
def test_an_architecture_without_an_equal_is_refused(fetch_models, changes):
    import llama_to_phi3

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=20, **changes)
    with pytest.raises(ValueError, match="Phi-3 has no"):
        llama_to_phi3.convert(LlamaForCausalLM(config))
