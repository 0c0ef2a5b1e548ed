"""Validation, test and predict count every row once, whatever the number of ranks, and send no base weight."""

import csv
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import synthetic
from phi3_lightning import ChatDataModule
from phi3_lightning.callbacks import (
    AdapterStatistics,
    BaseDrift,
    EvaluationReport,
    PredictionWriter,
    Samples,
    ValidationAnswers,
)
from phi3_lightning.callbacks.validation_answers import MEASURED
from phi3_lightning.errors import ConfigError

from . import cases, ranks

TINY = Path(__file__).parents[2] / "src/phi3_lightning/assets/tiny_phi3"
STRATEGIES = {"ddp": "ddp", "fsdp2": {}}
ROWS = 7
"""Not a multiple of the ranks, and of unequal length."""


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "seven.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "word " * (3 * i + 1)}]}
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data(chats: Path, cache: Path, batch_size: int) -> ChatDataModule:
    return ChatDataModule(
        train=str(chats), val=str(chats), test=str(chats), predict=str(chats), tokenizer=str(TINY), max_length=128,
        batch_size=batch_size, predict_batch_size=batch_size, packing=False, num_workers=0, cache_dir=str(cache),
    )  # fmt: skip


def evaluate(chats: Path, folder: Path, cache: Path, strategy, world: int, batch_size: int) -> dict:
    strategy = cases.fsdp2(**strategy) if isinstance(strategy, dict) else strategy
    module = cases.module(str(TINY), generation={"max_new_tokens": 4})
    writer = PredictionWriter(folder / "predictions.jsonl")
    trainer = cases.trainer(folder, strategy, world, callbacks=[writer])
    found = trainer.validate(module, data(chats, cache, batch_size), verbose=False)[0]
    found |= trainer.test(module, data(chats, cache, batch_size), verbose=False)[0]
    trainer.predict(module, data(chats, cache, batch_size), return_predictions=False)
    return found


@pytest.fixture(scope="module")
def alone(chats, tmp_path_factory) -> tuple[dict, str]:
    folder = tmp_path_factory.mktemp("alone")
    found = evaluate(chats, folder, folder / "cache", "auto", 1, 1)
    return found, (folder / "predictions.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_and_three_ranks_give_what_one_gives(chats, tmp_path, alone, strategy):
    for world in (2, 3):
        folder = tmp_path / str(world)
        # the cache is empty: one rank prepares the data, the others wait
        run = (chats, folder, folder / "cache", STRATEGIES[strategy], world, 2)
        for found in ranks.run(folder, world, evaluate, *run):
            # sums of float64 over float32 losses; padding to another width moves a loss by a few roundings
            assert found == pytest.approx(alone[0], rel=1000 * cases.EPSILON)
        assert (folder / "predictions.jsonl").read_text() == alone[1]
        assert len(list((folder / "cache" / "phi3_lightning").iterdir())) == 2  # rows and prompts, once each
    places = [json.loads(line)["place"] for line in alone[1].splitlines()]
    assert places == [f"{chats}:{line}" for line in range(1, ROWS + 1)]


def report(chats: Path, folder: Path, cache: Path, strategy, world: int, batch_size: int, dtype: str) -> dict:
    strategy = cases.fsdp2(**strategy) if isinstance(strategy, dict) else strategy
    module = cases.module(str(TINY), generation={"max_new_tokens": 12}, dtype=dtype)
    callback = EvaluationReport(folder / "run", batch_size=2, resamples=100)
    trainer = cases.trainer(folder, strategy, world, callbacks=[callback])
    return trainer.test(module, data(chats, cache, batch_size), verbose=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "dtype"), [("ddp", "float32"), ("ddp", "bfloat16"), ("fsdp2", "float32")])
def test_a_report_is_the_same_for_any_number_of_ranks(chats, tmp_path, strategy, dtype):
    """Answers of unequal length, so that ranks end their batches at different steps; 7 rows, in batches of 2."""
    expected = report(chats, tmp_path / "alone", tmp_path / "cache", "auto", 1, 2, dtype)
    alone = json.loads((tmp_path / "alone/run/test.json").read_text())
    assert len({found["tuned"]["tokens"] for found in alone["answers"]}) > 1
    for world in (2, 3):
        folder = tmp_path / str(world)
        run = (chats, folder, tmp_path / "cache", STRATEGIES[strategy], world, 2, dtype)
        for found in ranks.run(folder, world, report, *run):
            assert found == pytest.approx(expected, rel=1000 * cases.EPSILON)  # the same products in another order
        content = json.loads((folder / "run/test.json").read_text())
        assert content["answers"] == alone["answers"]  # bit-identical in bfloat16 too: the same batches on other ranks
        assert [found["row"] for found in content["answers"]] == list(range(ROWS))
        assert not list((folder / "run").glob("*partial*"))


def answered(answer: str, reference: str, row: dict) -> float:
    """Another value for each row, so that a row that counts twice changes the mean."""
    return len(row["messages"][1]["content"]) + len(answer) / 1000


def broken_for_one(answer: str, reference: str, row: dict) -> float:
    if row["messages"][0]["content"] == "Say 0":  # the shortest prompts are in the last batch
        raise ValueError("no number")
    return 1.0


def answers_of_validation(chats: Path, folder: Path, cache: Path, strategy, world: int) -> tuple[dict, str]:
    """The metrics of a validation within a fit, and the error of one with a metric that fails for one row."""
    strategy = cases.fsdp2(**strategy) if isinstance(strategy, dict) else strategy
    module = cases.module(str(TINY), cases.Sgd, generation={"max_new_tokens": 12}, dtype="float32")
    answers = ValidationAnswers(5, batch_size=2, metrics=[answered])
    trainer = cases.trainer(folder, strategy, world, callbacks=[answers], max_steps=1, limit_train_batches=1)
    trainer.fit(module, data(chats, cache, 8))
    metrics = {
        name: trainer.callback_metrics[f"val/{name}"].item() for name in (*MEASURED, "answered", "answered_rows")
    }
    trainer.callbacks[trainer.callbacks.index(answers)] = ValidationAnswers(
        ROWS, batch_size=2, metrics=[broken_for_one]
    )
    with pytest.raises(ConfigError) as caught:
        trainer.validate(module, data(chats, cache, 8), verbose=False)
    return metrics, str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_of_validation_count_each_row_once_for_any_number_of_ranks(chats, tmp_path, strategy):
    """5 rows in batches of 2: two ranks take a batch each, then one has a batch and the other none."""
    alone, _ = answers_of_validation(chats, tmp_path / "one", tmp_path / "cache", "auto", 1)
    run = (chats, tmp_path / "two", tmp_path / "cache", STRATEGIES[strategy], 2)
    for metrics, error in ranks.run(tmp_path / "two", 2, answers_of_validation, *run):
        assert metrics == pytest.approx(alone, rel=1e-6)  # the same answers, and a mean of float32 over two ranks
        assert metrics["answered_rows"] == 5
        # on the rank that had the row, and on the other one
        assert f"broken_for_one: ValueError: no number ({__file__}:" in error
        assert error.endswith(f"the row is {chats}:1")


def test_negative_control_a_mean_over_padded_ranks_differs(chats, tmp_path, alone):
    """The rows have different losses, so that repeating one changes the mean."""
    twice = chats.with_name("eight.jsonl")
    twice.write_text(chats.read_text() + chats.read_text().splitlines()[-1] + "\n")
    found = evaluate(twice, tmp_path, tmp_path / "cache", "auto", 1, 1)
    assert found["val/loss"] != pytest.approx(alone[0]["val/loss"], rel=1e-3)


def test_only_adapters_and_their_gradients_are_communicated(base, batches, tmp_path):
    """A fit begins by sending the adapter, and each step sends its gradient and a few scalars; no base weight."""

    def run() -> tuple[int, int, int, int]:
        started, stepped, own = [], [], []
        coalesced = torch.distributed._broadcast_coalesced

        def record(group, tensors, *args, **kwargs):
            started.append(sum(tensor.nbytes for tensor in tensors))
            return coalesced(group, tensors, *args, **kwargs)

        torch.distributed._broadcast_coalesced = record

        def hook(state, bucket):
            stepped.append(bucket.buffer().nbytes)
            work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        class Count(cases.pl.Callback):
            def on_train_start(self, trainer, pl_module):
                trainer.strategy.model.register_comm_hook(None, hook)
                own.append(sum(parameter.nbytes for parameter in pl_module.trained_parameters()))

        module = cases.module(base)
        trainer = cases.trainer(tmp_path, "ddp", 2, callbacks=[Count()], use_distributed_sampler=False)
        trainer.fit(module, cases.loader(batches, trainer.global_rank, 2))
        evaluated = len(started)
        trainer.validate(module, synthetic.loader([cases.EMPTY]), verbose=False)
        return own[0], sum(started[:evaluated]), sum(stepped), sum(started[evaluated:])

    for own, started, stepped, evaluated in ranks.run(tmp_path, 2, run):
        assert started == own
        assert stepped == 2 * own  # two steps
        assert evaluated == own


def drift(chats: Path, folder: Path, strategy, world: int) -> dict:
    strategy = cases.fsdp2(**strategy) if isinstance(strategy, dict) else strategy
    general = data(chats, folder / "cache", 2)
    callbacks = [BaseDrift(general), AdapterStatistics(1), Samples(prompts=1, max_new_tokens=4)]
    logger = CSVLogger(folder / "csv", name="", version="")
    module = cases.module(str(TINY), cases.Sgd, generation={"max_new_tokens": 4})
    trainer = cases.trainer(
        folder, strategy, world, callbacks=callbacks, logger=logger, log_every_n_steps=1, max_steps=1
    )
    trainer.fit(module, datamodule=data(chats, folder / "cache", 8))
    return {name: trainer.callback_metrics[name].item() for name in ("base_drift/kl", "base_drift/loss_change")}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_drift_and_adapter_statistics_are_the_same_on_two_ranks(chats, tmp_path, strategy):
    """Ranks have unequal numbers of general chats; adapter statistics gather sharded weights."""

    def statistics(folder: Path) -> dict[str, float]:
        rows = csv.DictReader((folder / "csv/metrics.csv").read_text().splitlines())
        return {n: float(v) for row in rows for n, v in row.items() if v and n.startswith("adapter")}

    expected = drift(chats, tmp_path / "one", "auto", 1)
    found = ranks.run(tmp_path / "two", 2, drift, chats, tmp_path / "two", STRATEGIES[strategy], 2)
    assert found[0] == found[1]
    # rows one by one or in a batch: sums of float32 products in another order
    assert found[0] == pytest.approx(expected, rel=1e-3)
    assert statistics(tmp_path / "two") == pytest.approx(statistics(tmp_path / "one"), rel=1e-3)
