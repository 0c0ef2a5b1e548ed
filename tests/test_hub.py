"""Names on the hub with a revision or a configuration, read from a stand-in of the hub, and what it refuses.

Public reports: no configuration can be named (huggingface/autotrain-advanced#644, agentscope-ai/Trinity-RFT#25); a
private or gated set "doesn't exist" (huggingface/datasets#6958, #7194, #5953, #5570); a revision does not reach the
tokenizer, or is taken for another repository's (huggingface/trl#1458, predibase/lorax#563, huggingface/peft#1567,
huggingface/transformers#29849).
"""

import json
import logging
from pathlib import Path

import datasets
import pytest
from jsonargparse import Namespace
from lightning.pytorch.utilities.seed import isolate_rng
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hub_stand_in
import synthetic
from hub_stand_in import Hub
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.adapters import adapter_config
from phi3_lightning.checkpoint.changed_options import changed_options
from phi3_lightning.commands.loading import prompt_options
from phi3_lightning.commands.parser import prepare
from phi3_lightning.config.data import DataConfig
from phi3_lightning.data.context_length import read_context_length
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.template import load_tokenizer
from phi3_lightning.errors import CheckpointError, ConfigError, DataError, ModelError
from phi3_lightning.hub import split_revision

TINY = Path(__file__).parents[1] / "src/phi3_lightning/assets/tiny_phi3"
CARD = b"""---
configs:
- config_name: main
  data_files: [{split: train, path: main/train.jsonl}, {split: test, path: main/test.jsonl}]
- config_name: other set
  data_files: [{split: train, path: other/train.jsonl}]
---
"""


def chats(count: int, word: str) -> bytes:
    return "".join(json.dumps({"prompt": f"{word} {n}", "completion": "yes"}) + "\n" for n in range(count)).encode()


def a_set(word: str) -> dict[str, bytes]:
    files = {
        "main/train.jsonl": chats(4, word),
        "main/test.jsonl": chats(2, "test"),
        "other/train.jsonl": chats(3, "other"),
    }
    return {"README.md": CARD, **files}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    """A hub whose sets, base and adapter each have a tag v1, and another content on the main branch."""
    with hub_stand_in.serve() as hub, pytest.MonkeyPatch.context() as patch:
        hub_stand_in.use(hub, patch, tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        for name, options in {"set": {}, "private": {"private": True}, "gated": {"gated": True}}.items():
            repository = hub.add("dataset", f"ann/{name}", a_set("old"), **options)
            repository.tags["v1"] = repository.branches["main"]
            repository.commit(a_set("new"))
        hub.add("dataset", "ann/plain", {"train.jsonl": chats(2, "plain")})
        base = tmp_path_factory.mktemp("base")
        for revision, heads in (("v1", 4), ("main", 2)):
            synthetic.save_tiny(base, num_key_value_heads=heads)
            files = {path.name: path.read_bytes() for path in [*TINY.glob("*token*.json"), *base.iterdir()]}
            if revision == "v1":
                repository = hub.add("model", "ann/phi", files)
                repository.tags["v1"] = repository.branches["main"]
            else:
                repository.commit(files)
        adapters = tmp_path_factory.mktemp("adapter")
        for rank in (2, 4):
            with isolate_rng():
                model = AutoModelForCausalLM.from_pretrained(base)
            get_peft_model(model, LoraConfig(r=rank, target_modules=["o_proj"])).save_pretrained(adapters)
            config = json.loads((adapters / "adapter_config.json").read_text()) | {"base_model_name_or_path": "ann/phi"}
            files = {"adapter_config.json": json.dumps(config).encode()}
            files["adapter_model.safetensors"] = (adapters / "adapter_model.safetensors").read_bytes()
            if rank == 2:
                adapter = hub.add("model", "ann/adapter", files)
                adapter.tags["v1"] = adapter.branches["main"]
            else:
                adapter.commit(files)
        yield hub
        datasets.enable_progress_bars()


@pytest.fixture
def hub(served: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    monkeypatch.chdir(tmp_path)
    return served


def prompts(text: str) -> list[str]:
    [source] = find_sources(text)
    return [row["prompt"] for _, row in source.rows()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ann/set/main:train", ["new 0", "new 1", "new 2", "new 3"]),
        ("ann/set/main", ["new 0", "new 1", "new 2", "new 3"]),
        ("ann/set/main@v1:train[1:3]", ["old 1", "old 2"]),
        ("ann/set/other set@main:train", ["other 0", "other 1", "other 2"]),
        ("ann/set/main:test[:50%]", ["test 0"]),
        ("ann/plain@main", ["plain 0", "plain 1"]),
    ],
)
def test_a_configuration_and_a_revision_of_a_set_are_read(hub: Hub, text: str, expected: list[str]) -> None:
    assert prompts(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ann/set:train", r"has the configurations main, other set; name one of them, as in 'ann/set/main:train'"),
        ("ann/set/nope@v1:train", r"configurations main, other set; name one of them, as in 'ann/set/main@v1:train'"),
        ("ann/set/main:val", r"has the splits train, test; name one of them, as in 'ann/set/main:train'"),
        ("ann/set/main:val[:9]", r"has the splits train, test; name one of them, as in 'ann/set/main:train'"),
        ("ann/set/main@v2:train", r"ann/set has no revision 'v2' on the hub; it has the branches main and the tags v1"),
        (
            "ann/none:train",
            r"ann/none does not exist on the hub as a dataset, or is private, and you are not logged",
        ),
        ("ann/private/main:train", r"or is private, and you are not logged in: run `hf auth login`, or set HF_TOKEN"),
        (
            "ann/gated/main:train",
            r"gated on the hub, and you are not logged in: .* access at .*/datasets/ann/gated",
        ),
        ("chats/2024/spring", r"no such file or folder, and chats/2024 does not exist on the hub"),
    ],
)
def test_the_error_has_the_names_that_the_hub_offers(hub: Hub, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prompts(text)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_a_private_set_is_read_with_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert prompts("ann/private/main@v1:train[:1]") == ["old 0"]
    with pytest.raises(DataError, match=r"as a dataset, or is private; check the name, and what your token may read"):
        prompts("ann/none:train")
    with pytest.raises(DataError, match=r"gated on the hub; ask for access at"):
        prompts("ann/gated/main:train")


def test_a_cached_set_of_another_revision_is_not_taken_for_the_one_that_is_named(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert prompts("ann/plain@main") == ["plain 0", "plain 1"]
    commit = hub.repositories["dataset", "ann/plain"].branches["main"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    caplog.set_level(logging.ERROR, "datasets")
    assert prompts("ann/plain") == ["plain 0", "plain 1"]  # as datasets does without a revision
    assert prompts(f"ann/plain@{commit}") == ["plain 0", "plain 1"]
    with pytest.raises(DataError, match=rf"cannot be reached to look up 'v1', .* holds the commit {commit}"):
        prompts("ann/plain@v1")


def test_names_of_today_keep_their_fingerprints(hub: Hub) -> None:
    [source] = find_sources("ann/plain:train")
    assert source.fingerprint().startswith("0:ann/plain:train:")
    names = ("ann/set/main:train", "ann/set/main@v1:train", "ann/set/other set:train")
    assert len({find_sources(name)[0].fingerprint() for name in names}) == 3


@pytest.mark.parametrize("name", ["a@b", "chats@v1:2.txt", "ann/set@v1", "ann/set/main:train", "deep/x@y/z.data"])
def test_a_path_with_such_characters_stays_a_path(hub: Hub, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(chats(1, "local"))
    [source] = find_sources(name)
    assert source.name() == name
    assert split_revision("model.base", name) == (name, None)


def test_a_local_folder_has_no_revision(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "ann" / "phi").mkdir(parents=True)
    for refuse in (lambda: Phi3LoRAModule("ann/phi@v1"), lambda: find_sources("ann/phi@v1:train")):
        with pytest.raises(ConfigError, match="ann/phi is a path here, and paths have no revisions"):
            refuse()


def test_a_stream_has_no_parts_of_a_split(hub: Hub) -> None:
    with pytest.raises(DataError, match=r"ann/set/main:train\[:9\]: a stream has no parts of a split; .*streaming"):
        find_sources("ann/set/main:train[:9]", streaming=True)
    options = {"train": "ann/set/main:train[:9]", "val_fraction": 0, "tokenizer": str(TINY)}
    with pytest.raises(DataError, match="a stream has no parts"):
        ChatDataModule(**options, streaming=True).validate_sources()
    [source] = find_sources("ann/set/main@v1:train", streaming=True)
    assert [row["prompt"] for _, row in source.rows()] == ["old 0", "old 1", "old 2", "old 3"]


def test_the_revision_of_a_base_is_read_from_its_name(hub: Hub) -> None:
    assert Phi3LoRAModule("ann/phi@v1").spec().config.num_key_value_heads == 4
    assert Phi3LoRAModule("ann/phi").spec().config.num_key_value_heads == 2
    module = Phi3LoRAModule("ann/phi@v1", dtype="float32", lora={"init_from": "ann/adapter@v1", "r": 2, "lora_alpha": 8,
                            "target_modules": ["o_proj"]})  # fmt: skip
    module.configure_model()
    assert module.checkpoint_identity()["base"] == "ann/phi"
    assert module.checkpoint_identity()["revision"] == "v1"
    assert module.loaded_model.config.num_key_value_heads == 4


def test_both_spellings_are_one_run(hub: Hub) -> None:
    named, given = Phi3LoRAModule("ann/phi@v1"), Phi3LoRAModule("ann/phi", revision="v1")
    assert named.hparams == given.hparams
    assert named.base_id == "ann/phi"
    assert Phi3LoRAModule("ann/phi@v1", revision="v1").hparams == given.hparams
    data = [ChatDataModule(tokenizer="ann/phi@v1"), ChatDataModule(tokenizer="ann/phi", revision="v1")]
    assert data[0].hparams == data[1].hparams
    assert DataConfig(tokenizer="ann/phi@v1") == data[1].options
    former = {"hyper_parameters": dict(named.hparams), "datamodule_hyper_parameters": dict(data[0].hparams)}
    assert not changed_options(former, given.hparams, data[1].hparams)
    assert changed_options(former, Phi3LoRAModule("ann/phi@v2").hparams, data[1].hparams)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Phi3LoRAModule("ann/phi@v1", revision="main"),
            r"model\.base: ann/phi@v1, and model\.revision is 'main'",
        ),
        (lambda: DataConfig(tokenizer="a/b@v1", revision="v2"), r"data\.tokenizer: a/b@v1, and data\.revision is 'v2'"),
    ],
)
def test_two_revisions_are_refused(hub: Hub, make, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{message}; give the revision once: leave out @v1, or set .*: null"):
        make()


def test_the_tokenizer_follows_the_revision_of_the_base(hub: Hub) -> None:
    def config(data: dict, **model: str | None):
        return Namespace(data=Namespace(data), model=Namespace(model), seed_everything=1)

    empty = {"tokenizer": None, "revision": None}
    for base in ({"base": "ann/phi@v1", "revision": None}, {"base": "ann/phi", "revision": "v1"}):
        filled = config(empty, **base)
        prepare(filled)
        assert (filled.data.tokenizer, filled.data.revision) == ("ann/phi", "v1")
        options = prompt_options(config(empty, **base), {})
        assert (options["tokenizer"], options["revision"]) == ("ann/phi", "v1")
    training = {"datamodule_hyper_parameters": {"tokenizer": "ann/phi", "revision": "v1"}}
    options = prompt_options(config(empty, base="x/y", revision=None), training)
    assert (options["tokenizer"], options["revision"]) == ("ann/phi", "v1")
    options = prompt_options(config({"tokenizer": "x/z", "revision": None}, base="x/y", revision=None), training)
    assert (options["tokenizer"], options["revision"]) == ("x/z", None)
    assert len(load_tokenizer("ann/phi", "v1")) == len(load_tokenizer(str(TINY)))
    assert read_context_length("ann/phi", "v1") is not None


def test_a_revision_of_an_adapter_is_read(hub: Hub) -> None:
    assert adapter_config.read("ann/adapter@v1", "model.lora.init_from").lora["r"] == 2
    assert adapter_config.read("ann/adapter", "model.lora.init_from").lora["r"] == 4


OFFERED = "has no revision 'v9' on the hub; it has the branches main and the tags v1"
MISSING = "does not exist on the hub as a model, or is private, and you are not logged in: run `hf auth login`"


@pytest.mark.parametrize(
    ("read", "error", "message"),
    [
        (lambda: Phi3LoRAModule("ann/phi@v9").check_base(), ModelError, f"'ann/phi@v9'; .*ann/phi {OFFERED}"),
        (lambda: Phi3LoRAModule("ann/no").check_base(), ModelError, f"'ann/no'; .*ann/no {MISSING}"),
        (lambda: load_tokenizer("ann/phi", "v9"), ConfigError, f"cannot load 'ann/phi@v9' .ann/phi {OFFERED}"),
        (lambda: load_tokenizer("ann/no"), ConfigError, f"cannot load 'ann/no' .ann/no {MISSING}"),
        (lambda: adapter_config.read("ann/adapter@v9", "KEY"), CheckpointError, f"KEY: .*ann/adapter {OFFERED}"),
        (lambda: adapter_config.read("ann/no", "KEY"), CheckpointError, f"KEY: .*ann/no {MISSING}"),
    ],
    ids=["base", "no base", "tokenizer", "no tokenizer", "adapter", "no adapter"],
)
def test_what_the_hub_refuses_is_one_line(hub: Hub, read, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)
