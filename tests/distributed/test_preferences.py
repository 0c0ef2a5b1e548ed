"""Pairs on ranks of DDP and FSDP2: one gradient, one reference, and metrics over all ranks."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Sampler

import synthetic
from phi3_lightning.config import LoRA, Objective, Optimizer
from phi3_lightning.distributed.fsdp2 import check_shardable
from phi3_lightning.errors import ConfigError

from . import cases, ranks

PAIRS = [synthetic.pair(3 + 5 * seed % 17, 2 + 3 * seed % 7, 1 + 5 * seed % 8, seed) for seed in range(5)]
FILLER = synthetic.batch_of([[]])
TOLERANCE = 40 * 10 * cases.EPSILON
"""Sums of 40 tokens of 10 documents in another order."""
STRATEGIES = {"ddp": "ddp", "fsdp2": {}, "fsdp2, kept after forward": {"reshard_after_forward": False}}


def labelled(first: int, last: int) -> dict:
    rows = [[pair[index % 2]] for index, pair in enumerate(PAIRS)][first:last]
    return synthetic.labelled_of(rows, [[index % 2 == 0] for index in range(first, last)], first)


WINDOWS = {
    "dpo": [synthetic.pairs_of([PAIRS[:1]]), synthetic.pairs_of([PAIRS[1:4], PAIRS[4:]], 1)],
    "simpo": [synthetic.pairs_of([PAIRS]), FILLER],
    "kto": [labelled(0, 2), labelled(2, 5)],
}
"""Two micro-batches, which are one window."""


def fit(folder, base: str, name: str, strategy="auto", world: int = 1) -> dict:
    """Gradient and metrics of a window of two micro-batches, on one process or a rank each."""
    import os

    pl.seed_everything(3, verbose=False)
    rank = int(os.environ.get("LOCAL_RANK", "0")) if world > 1 else 0
    strategy = cases.fsdp2(**strategy) if isinstance(strategy, dict) else strategy
    steps, module = cases.RecordSteps(), cases.module(base, objective={"name": name}, gradient_checkpointing="full")
    options = {"callbacks": [steps], "use_distributed_sampler": False, "accumulate_grad_batches": 2 // world}
    trainer = cases.trainer(folder, strategy, world, **options)
    batches = cases.loader(WINDOWS[name], rank, world)
    trainer.fit(module, batches, batches)
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
    return {"gradient": steps.gradients[0], "metrics": metrics}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", WINDOWS)
def test_two_ranks_have_the_gradient_and_the_metrics_of_one_process(base, tmp_path, strategy, name):
    alone = fit(tmp_path, base, name)
    assert {"train/preference_accuracy", "val/ranking_accuracy"} <= alone["metrics"].keys()
    for found in ranks.run(tmp_path, 2, fit, tmp_path, base, name, STRATEGIES[strategy], 2):
        largest = alone["gradient"].abs().max()
        assert (found["gradient"] - alone["gradient"]).abs().max() <= TOLERANCE * largest
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-5)


def test_ranks_with_other_references_are_refused(base, tmp_path):
    def start() -> str:
        import os

        lora = {"r": 4, "init_lora_weights": False}
        module = cases.Phi3LoRAModule(base, dtype="float32", lora=lora, objective={"name": "dpo"})
        torch.manual_seed(int(os.environ["LOCAL_RANK"]))
        module.configure_model()
        try:
            cases.trainer(tmp_path, "ddp", 2).fit(module, synthetic.loader([FILLER]))
        except Exception as error:
            return str(error)
        return ""

    _, second = ranks.run(tmp_path, 2, start)
    assert "rank 1 has other frozen weights than rank 0" in second


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_batch_that_another_rank_has_had_needs_no_reference_again(base, tmp_path, strategy):
    """The two ranks exchange their batches after the first epoch. Shards of a model are passed through together."""

    class Alternating(Sampler):
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def __len__(self) -> int:
            return 1

        def __iter__(self):
            yield self.rank
            self.rank = 1 - self.rank

    def count() -> int:
        import os

        rank, passes = int(os.environ["LOCAL_RANK"]), []
        module = cases.module(base, objective={"name": "dpo"})
        active = module.reference.active
        module.reference.active = lambda *args: passes.append(1) or active(*args)
        chosen = cases.fsdp2() if strategy == "fsdp2" else "ddp"
        trainer = cases.trainer(tmp_path, chosen, 2, use_distributed_sampler=False, max_epochs=4)
        trainer.fit(module, DataLoader(WINDOWS["dpo"], batch_size=None, sampler=Alternating(rank)))
        return len(passes)

    assert ranks.run(tmp_path, 2, count) == ([1, 1] if strategy == "ddp" else [4, 4])


def test_fsdp2_takes_the_base_for_a_reference_and_no_copy():
    check_shardable(False, None, LoRA(), Optimizer(), Objective("dpo"))
    check_shardable(False, None, LoRA(init_from="x"), Optimizer(), Objective("simpo"))
    for lora in (LoRA(init_from="x"), LoRA(init_lora_weights=False)):
        with pytest.raises(ConfigError, match=r"^model\.objective\.name: 'dpo' .*use trainer\.strategy: ddp"):
            check_shardable(False, None, lora, Optimizer(), Objective("dpo"))


def test_every_rank_has_the_reference_of_the_checkpoint(base, tmp_path):
    """Whatever its own adapter began with."""

    def run(steps: int, strategy="auto", world: int = 1, resume=None) -> str | None:
        import os

        rank = int(os.environ.get("LOCAL_RANK", "0")) if world > 1 else 0
        lora = {"r": 4, "init_lora_weights": False}
        module = cases.Phi3LoRAModule(base, dtype="float32", lora=lora, objective={"name": "dpo"})
        torch.manual_seed(steps + rank)
        module.configure_model()
        trainer = cases.trainer(tmp_path, strategy, world, use_distributed_sampler=False, max_steps=steps)
        trainer.fit(module, cases.loader(WINDOWS["dpo"] * 2, rank, world), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.reference.fingerprint

    alone = run(1)
    assert ranks.run(tmp_path, 2, run, 2, "ddp", 2, tmp_path / "1.ckpt") == [alone, alone]
