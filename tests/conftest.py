"""Fixtures that the whole suite shares."""

import gc
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


def pytest_collection_finish() -> None:
    """Exempt the libraries' objects from garbage collection, which Lightning's tuner runs often, half a second each."""
    gc.collect()
    gc.freeze()


LONGEST = ("distributed", "planning", "invariants")
"""Folders with files that take minutes: they begin first, so that no process has one left at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, which `make test` shares out over two processes one after the other."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.parent.name, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # tests run beside each other, and two pools of threads on the same cores slow each other down many times
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


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
