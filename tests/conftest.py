"""Fixtures that the whole suite shares."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

import synthetic
from phi3_lightning.model import packed_attention

REPOSITORY = Path(__file__).parent.parent


# torch's threads do not survive a fork, and several threads at once fail to make them again ("Invalid thread pool!")
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, each by itself; the others file by file, so that a file's fixtures are made once.

    It is what ``make test`` shares out over processes, one group after the other.
    """
    items.sort(
        key=lambda item: (item.get_closest_marker("xdist_group") is None, item.get_closest_marker("slow") is None)
    )
    for item in items:
        if not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # tests run in parallel, and several pools of torch threads on the same cores slow each other down many times
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real tokenizer and chat files, which are not part of the repository."""
    folder = Path(os.environ.get("PHI3_LIGHTNING_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is missing (set PHI3_LIGHTNING_SHARED)")
    return folder


@pytest.fixture(scope="session")
def real_chats(shared: Path) -> Path:
    """Chat files of third parties; no hub has them, and scripts/fetch_models.py does not fetch them."""
    return require(shared / "data")


@pytest.fixture(scope="session")
def real_vectors(shared: Path) -> list[dict]:
    """Texts with their ids by Phi-3's tokenizer; no hub has them either."""
    return json.loads(require(shared / "phi3-mini-4k-instruct/vectors.json").read_text(encoding="utf-8"))


def require(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} was not fetched")
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random Phi-3 in float32."""
    return synthetic.save_tiny(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All documents attend in one call, and layers can be compiled; a layer that is not a single graph is an error."""
    monkeypatch.setattr(packed_attention, "takes_varlen", lambda model, device: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", synthetic.attention_by_mask)
    one_graph = torch.compile(Phi3DecoderLayer.forward, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr("phi3_lightning.model.compile._compiled", lambda: one_graph)
    yield
    torch._dynamo.reset()
