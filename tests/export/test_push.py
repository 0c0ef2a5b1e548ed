"""A certified export goes to the hub as one commit or not at all; the hub is a stand-in on this machine.

Public reports: a card whose base_model is a local path is refused after everything was uploaded
(huggingface/transformers#33922, huggingface/trl#1873, huggingface/huggingface_hub#1927); a token that may only read is
a bare 403 (huggingface/deep-rl-class#190); everything becomes public (MervinPraison/PraisonAI#4357,
huggingface/transformers#25219); a push that failed cannot be repeated (LibreYOLO/libreyolo#693); a large folder becomes
several commits (upload_folder of huggingface_hub 2).
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hub_stand_in
import synthetic
from hub_stand_in import Hub, Refused
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.checkpoint.identity import IDENTITY
from phi3_lightning.errors import ConfigError
from phi3_lightning.export.card import Provenance
from phi3_lightning.export.chat_files import Chat
from phi3_lightning.export.export import export
from phi3_lightning.export.options import Export
from phi3_lightning.export.push import check_destination, push

# huggingface_hub's own client uploads raw content with `data=`
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TINY = Path(__file__).parents[2] / "src/phi3_lightning/assets/tiny_phi3"
WEIGHTS = "adapter_model.safetensors"
NAME = "ann/bot"
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(synthetic.save_tiny(tmp_path_factory.mktemp("base") / "phi"))


def write(base: Path, folder: Path, base_id: str = "owner/phi", revision: str | None = None, **what) -> Path:
    module = Phi3LoRAModule(str(base), base_id, revision, dtype="float32", lora={"r": 4, "lora_alpha": 8})
    synthetic.randomised(module, std=0.1).eval()
    checkpoint = {"global_step": 3, "hyper_parameters": dict(module.hparams), IDENTITY: module.checkpoint_identity()}
    chat = Chat(str(TINY), None, None, [7, 2], [[5, 6, 7, 8]])
    provenance = Provenance(base_id, checkpoint, folder.parent / "run", revision)
    export(module, chat, provenance, Export(name=NAME, **what), folder)
    return folder


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(base, tmp_path_factory.mktemp("exports") / "out")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, which a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "out"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    with hub_stand_in.serve() as hub, pytest.MonkeyPatch.context() as patch:
        hub_stand_in.use(hub, patch, tmp_path_factory.mktemp("cache"))
        yield hub


@pytest.fixture
def hub(served: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub, and a user who is logged in."""
    for state in (served.repositories, served.objects, served.requests):
        state.clear()
    served.fail = lambda request: None
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    return served


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def commits(hub: Hub) -> int:
    return sum(request.endswith("/commit/main") for request in hub.requests)


def test_the_folder_becomes_one_commit(hub: Hub, exported: Path) -> None:
    destination = check_destination(NAME)
    assert not any(request.startswith("POST") for request in hub.requests)
    assert push(exported, destination) == f"{hub.endpoint}/{NAME}"
    repository = hub.repositories["model", NAME]
    assert repository.files == {".gitattributes": b"", **content(exported)}
    assert commits(hub) == 1
    assert not repository.private


def test_the_pushed_adapter_has_the_logits_of_the_export(hub: Hub, base: Path, exported: Path) -> None:
    push(exported, check_destination(NAME))
    logits = []
    for source in (NAME, str(exported)):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), source).eval()
        with torch.inference_mode():
            logits.append(model(IDS, use_cache=False).logits)
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(NAME)("Are you open?") == AutoTokenizer.from_pretrained(TINY)("Are you open?")


def several_commits(*args: object, **options: object) -> None:
    raise AssertionError("upload_folder makes several commits of a large folder where hf_xet is installed")


def test_many_files_of_a_merged_model_are_one_commit(
    hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "upload_folder", several_commits)
    merged = write(base, tmp_path / "merged", format="merged", max_shard_size="20KB")
    assert len(list(merged.glob("*.safetensors"))) > 4
    push(merged, check_destination(NAME))
    assert commits(hub) == 1
    assert hub.repositories["model", NAME].files == {".gitattributes": b"", **content(merged)}


def test_a_private_repository_is_private_from_the_beginning(
    hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(exported, check_destination(NAME, True))
    assert hub.repositories["model", NAME].private
    assert check_destination(NAME, overwrite=True).private


@pytest.mark.parametrize("private", [True, False])
def test_a_push_does_not_change_who_sees_a_repository(hub: Hub, private: bool) -> None:
    hub.add("model", NAME, {".gitattributes": b""}, private=not private)
    is_ = "public" if private else "private"
    with pytest.raises(ConfigError, match=f"--push: {NAME} exists and is {is_}, which a push does not change"):
        check_destination(NAME, private)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bot", "--push: bot is not the name of a repository on the hub; give owner/name"),
        ("ann/bot@v1", "ann/bot@v1 is not the name of a repository"),
        ("../ann/bot", "../ann/bot is not the name of a repository"),
    ],
)
def test_a_name_without_an_owner_is_refused(hub: Hub, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_destination(name)
    assert not hub.requests


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "you are not logged in to http://.*: run `hf auth login`, or set HF_TOKEN, with write permission"),
        ("hf_read", "the token has only read permission; run `hf auth login`, or set HF_TOKEN, with write permission"),
        ("hf_old", r"the token is not valid: log in again \(.*\); nothing was exported"),
    ],
)
def test_a_token_that_cannot_write_is_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=f"^--push: {NAME}: {message}") as caught:
        check_destination(NAME)
    assert "\n" not in str(caught.value)
    assert str(token) not in str(caught.value)


def test_a_hub_that_is_away_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match=f"--push: {NAME}: HF_HUB_OFFLINE is set; unset it to push; nothing was"):
            check_destination(NAME)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"the hub cannot be reached, or fails \(.*refused.*\); nothing was exported"):
        check_destination(NAME)


FAILURES = [
    ("POST /api/repos/create", 403, "the token may not write there: use one with write permission"),
    ("POST /api/repos/create", 409, "it was changed at the same time"),
    ("POST /api/validate-yaml", 400, "the hub refuses the files"),
    ("POST /api/models/ann/bot/preupload/main", 404, "there is no such repository, or the token may not see it"),
    ("POST /ann/bot.git/info/lfs/objects/batch", 403, "the token may not write there"),
    ("PUT /upload/", 403, "the token may not write there"),
    ("PUT /upload/", 400, "the hub refuses the files"),
    ("POST /api/models/ann/bot/commit/main", 403, "the token may not write there"),
    ("POST /api/models/ann/bot/commit/main", 404, "there is no such repository"),
    ("POST /api/models/ann/bot/commit/main", 409, "it was changed at the same time: run the command again"),
    ("POST /api/models/ann/bot/commit/main", 500, r"the hub cannot be reached, or fails \("),
]


@pytest.mark.parametrize(("request_", "status", "message"), FAILURES)
def test_a_failure_in_the_middle_publishes_nothing_and_can_be_repeated(
    hub: Hub, exported: Path, request_: str, status: int, message: str
) -> None:
    destination = check_destination(NAME)
    hub.fail = lambda request: Refused(status, message="why") if request.startswith(request_) else None
    with pytest.raises(ConfigError, match=f"^--push: {NAME}: {message}") as caught:
        push(exported, destination)
    assert any(request.startswith(request_) for request in hub.requests)
    assert "\n" not in str(caught.value)
    assert "hf_write" not in str(caught.value)
    assert f"so nothing was published in part; {exported} is complete: try again with --overwrite" in str(caught.value)
    if (repository := hub.repositories.get(("model", NAME))) is not None:
        assert repository.files == {".gitattributes": b""}
        assert len(repository.commits) == 1
    hub.fail = lambda request: None
    push(exported, check_destination(NAME, overwrite=True))
    assert hub.repositories["model", NAME].files == {".gitattributes": b"", **content(exported)}


def test_a_repository_in_use_is_kept(hub: Hub, exported: Path) -> None:
    repository = hub.add("model", NAME, {".gitattributes": b"mine", "README.md": b"mine", "old/model.gguf": b"mine"})
    with pytest.raises(ConfigError, match=r"ann/bot holds README\.md, old/model\.gguf; give another .* or --overwrite"):
        check_destination(NAME)
    assert len(repository.commits) == 1
    push(exported, check_destination(NAME, overwrite=True))
    assert commits(hub) == 1
    assert repository.files == {".gitattributes": b"mine", **content(exported)}


def test_what_others_push_meanwhile_is_kept(hub: Hub, exported: Path) -> None:
    repository = hub.add("model", NAME, {".gitattributes": b""})
    destination = check_destination(NAME)
    repository.commit({"theirs.txt": b"theirs"})
    with pytest.raises(ConfigError, match="it was changed at the same time: run the command again"):
        push(exported, destination)
    assert repository.files == {"theirs.txt": b"theirs"}


def test_the_same_folder_twice_is_no_second_commit(hub: Hub, exported: Path) -> None:
    push(exported, check_destination(NAME))
    assert push(exported, check_destination(NAME, overwrite=True)) == f"{hub.endpoint}/{NAME}"
    files = hub.repositories["model", NAME].files
    assert {name: files[name] for name in content(exported)} == content(exported)


def scale(folder: Path) -> None:
    tensors = {name: tensor * 2 for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)


def forget(folder: Path) -> None:
    certificate = json.loads((folder / "certificate.json").read_text())
    del certificate["files"]  # as before there was a push
    (folder / "certificate.json").write_text(json.dumps(certificate))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scale, f"{WEIGHTS} is not what was compared with the live model; export it again"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is not what was compared"),
        (lambda folder: (folder / "chats.jsonl").write_text("private"), r"chats\.jsonl is not what was compared"),
        (lambda folder: (folder / "data").mkdir(), "data is not what was compared"),
        (lambda folder: (folder / "certificate.json").unlink(), r"has no certificate\.json that lists its files"),
        (forget, r"has no certificate\.json that lists its files; export it again"),
    ],
    ids=["other weights", "no weights", "another file", "a folder", "no certificate", "an older certificate"],
)
def test_only_what_was_compared_is_pushed(hub: Hub, folder: Path, change, message: str) -> None:
    change(folder)
    with pytest.raises(ConfigError, match=message):
        push(folder, check_destination(NAME))
    assert not hub.repositories


def test_a_card_may_be_edited(hub: Hub, folder: Path) -> None:
    card = (folder / "README.md").read_text() + "\nTrained for the bookshop.\n"
    (folder / "README.md").write_text(card)
    push(folder, check_destination(NAME))
    assert hub.repositories["model", NAME].files["README.md"].decode() == card


def test_a_base_of_this_machine_is_no_metadata_of_the_card(hub: Hub, base: Path, folder: Path, tmp_path: Path) -> None:
    local = write(base, tmp_path / "local", base_id="../models/phi")
    push(local, check_destination(NAME))
    assert b"base_model:" not in hub.repositories["model", NAME].files["README.md"]
    card = (folder / "README.md").read_text()
    assert "base_model: owner/phi\n" in card
    (folder / "README.md").write_text(card.replace("base_model: owner/phi", "base_model: ../models/phi"))
    with pytest.raises(ConfigError, match=r'the hub refuses the files \(.*"base_model".* is not valid'):
        push(folder, check_destination(NAME, overwrite=True))
    assert commits(hub) == 1


def test_the_card_calls_the_model_as_the_hub_does(exported: Path, base: Path, tmp_path: Path) -> None:
    card = (write(base, tmp_path / "pinned", revision="v1") / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("owner/phi", revision="v1", dtype="auto")' in card
    assert "vllm serve owner/phi --revision v1 --enable-lora" in card
    for text in (card, (exported / "README.md").read_text()):
        assert f'PeftModel.from_pretrained(base, "{NAME}")' in text
    assert "revision" not in (exported / "README.md").read_text()


def test_no_file_has_a_path_or_a_token(hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Path(shutil.copytree(TINY, tmp_path / "tokenizer"))
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    paths = dict.fromkeys(("name_or_path", "special_tokens_map_file", "tokenizer_file"), str(tokenizer))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | paths))
    monkeypatch.setattr(f"{__name__}.TINY", tokenizer)
    for kind in ("peft", "merged", "loralib", "gguf"):
        for path in write(base, tmp_path / kind, base_id="phi", format=kind).iterdir():
            for secret in (str(tmp_path), str(base.parent), f"{Path.home()}/", "hf_write"):
                assert secret.encode() not in path.read_bytes(), path
    ids = [AutoTokenizer.from_pretrained(folder)("Open?").input_ids for folder in (tmp_path / "peft", tokenizer)]
    assert ids[0] == ids[1]


def test_negative_control_the_stand_in_refuses_what_was_not_uploaded(hub: Hub) -> None:
    hub.add("model", NAME, {".gitattributes": b""})
    with pytest.raises(Exception, match="404"):
        HfApi().model_info("ann/other")
    lines = [{"value": {}}, {"key": "lfsFile", "value": {"path": WEIGHTS, "oid": "0" * 64}}]
    with pytest.raises(Refused, match="was not uploaded"):
        hub._commit(hub.repositories["model", NAME], NAME, lines)
