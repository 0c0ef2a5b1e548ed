"""ChatDataModule under a Trainer: every row once per epoch, resumed where it stopped, consistent on all ranks."""

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner

from phi3_lightning.batch import Batch, PromptBatch
from phi3_lightning.config.data import DataConfig
from phi3_lightning.contracts import Origin
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.errors import CheckpointError, ConfigError, DataError, DivergenceError

from .conftest import chat

Write = Callable[..., str]
SIZES = {"many": 30, "few": 12}


class Recorder(LightningModule):
    """Records which rows it gets."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.trained: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        rows = [document_id for row in batch["document_ids"] for document_id in row]
        if self.global_step == self.fail_at:
            raise DivergenceError("The loss is not finite.", rows[:1])
        self.trained.append((self.current_epoch, rows))
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += [document_id for row in batch["document_ids"] for document_id in row]

    test_step = validation_step

    def predict_step(self, batch: PromptBatch) -> list[int]:
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        return batch["document_ids"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "enable_checkpointing": False} | options
    return Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options)


@pytest.fixture
def data(write: Write, tmp_path: Path, tokenizer_folder: str) -> Callable[..., ChatDataModule]:
    path = write([chat(f"question {index}", "word " * (3 * index)) for index in range(23)])

    def data(**options: Any) -> ChatDataModule:
        small = {"train": path, "tokenizer": tokenizer_folder, "max_length": 400, "batch_size": 2, "num_workers": 0}
        return ChatDataModule(**(small | {"cache_dir": str(tmp_path / "cache")} | options))

    return data


pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_row_comes_once_per_epoch_in_another_order(
    data: Callable[..., ChatDataModule], tmp_path: Path, packing: bool, num_workers: int
) -> None:
    datamodule, module = data(packing=packing, num_workers=num_workers), Recorder()
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=datamodule)
    epochs = [[row for epoch, rows in module.trained if epoch == number for row in rows] for number in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert sorted({*epochs[0], *module.validated}) == list(range(23))
    assert len(epochs[0]) == datamodule.train_documents == 22
    assert (datamodule.train_rows < 22) == packing


def test_workers_change_nothing(data: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    modules = [Recorder(), Recorder()]
    for module, num_workers in zip(modules, (0, 2), strict=True):
        trainer(tmp_path, max_epochs=2).fit(module, datamodule=data(num_workers=num_workers))
    assert modules[0].trained == modules[1].trained


def test_statistics_count_exactly_the_labels(data: Callable[..., ChatDataModule]) -> None:
    for packing in (True, False):
        datamodule = data(packing=packing, val_fraction=0.0)
        datamodule.prepare_data()
        datamodule.setup()
        labels = sum(int((batch["labels"] != -100).sum()) for batch in datamodule.train_dataloader())
        assert labels == datamodule.statistics["train"].supervised_tokens


def test_iterating_draws_nothing_from_the_global_generator(data: Callable[..., ChatDataModule]) -> None:
    datamodule = data()
    datamodule.prepare_data()
    datamodule.setup()
    before = torch.get_rng_state()
    list(datamodule.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(
    data: Callable[..., ChatDataModule], tmp_path: Path, num_workers: int, every: int
) -> None:
    whole = Recorder()
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"enable_checkpointing": True, "accumulate_grad_batches": every, "limit_val_batches": 0}
    trainer(tmp_path, max_epochs=3, callbacks=[keep], **options).fit(whole, datamodule=data(packing=False))
    checkpoints = sorted((tmp_path / "kept").glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    assert len(checkpoints) == len(whole.trained) // 11 * -(-11 // every)
    for step, path in list(enumerate(checkpoints, start=1))[:: 1 + 2 * num_workers]:
        module = Recorder()
        options = {"accumulate_grad_batches": every, "limit_val_batches": 0}
        trainer(tmp_path, max_epochs=3, **options).fit(
            module, datamodule=data(packing=False, num_workers=num_workers), ckpt_path=path
        )
        windows, within = divmod(step, -(-11 // every))
        assert module.trained == whole.trained[windows * 11 + within * every :]


def test_another_order_within_an_epoch_is_refused(data: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    options = {"limit_val_batches": 0, "enable_checkpointing": True}
    trainer(tmp_path, max_steps=4, max_epochs=-1, callbacks=[keep], **options).fit(
        Recorder(), datamodule=data(packing=False)
    )
    checkpoint = tmp_path / "kept" / "step=4.ckpt"
    for change in ({"seed": 7}, {"batch_size": 3}, {"val_fraction": 0.5}):
        with pytest.raises(CheckpointError, match="within an epoch"):
            trainer(tmp_path, limit_val_batches=0).fit(
                Recorder(), datamodule=data(packing=False, **change), ckpt_path=checkpoint
            )
    changed = data(packing=False, seed=7)
    trainer(tmp_path).validate(
        Recorder(), datamodule=changed, ckpt_path=checkpoint
    )  # validation does not depend on the order


def test_another_order_from_the_next_epoch_on_is_allowed(data: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="end", save_on_train_epoch_end=True)
    options = {"limit_val_batches": 0, "enable_checkpointing": True}
    trainer(tmp_path, callbacks=[keep], **options).fit(Recorder(), datamodule=data())
    module = Recorder()
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(
        module, datamodule=data(seed=7), ckpt_path=tmp_path / "kept" / "end.ckpt"
    )
    assert {epoch for epoch, _ in module.trained} == {1}
    assert sum(len(rows) for _, rows in module.trained) == 22


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_see_every_row_once_and_agree_on_the_split(
    data: Callable[..., ChatDataModule], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: int
) -> None:
    seen: dict[str, list[int]] = {"train": [], "val": []}
    lengths = set()
    for rank in range(ranks):
        datamodule = data(packing=False, val_fraction=0.2)
        datamodule.trainer = trainer(tmp_path)
        monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": ranks, "rank": rank})
        datamodule.prepare_data()
        datamodule.setup("fit")
        for split, loader in (("train", datamodule.train_dataloader()), ("val", datamodule.val_dataloader())):
            batches = list(loader)
            assert len(batches) == len(loader)
            lengths.add((split, len(batches)))
            seen[split] += [document_id for batch in batches for row in batch["document_ids"] for document_id in row]
    assert len(lengths) == 2
    assert sorted(seen["train"] + seen["val"]) == list(range(23))
    assert len(seen["val"]) == 5


def test_fit_validate_test_and_predict_in_one_process(data: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    path = data().options.train
    datamodule, module, run = data(test=path, predict=path, val_fraction=0.2), Recorder(), trainer(tmp_path)
    run.fit(module, datamodule=datamodule)
    val = sorted(module.validated[-5:])
    module.validated = []
    run.validate(module, datamodule=datamodule, verbose=False)
    assert sorted(module.validated) == val
    module.validated = []
    run.test(module, datamodule=datamodule, verbose=False)
    assert sorted(module.validated) == list(range(23))
    predicted = run.predict(module, datamodule=datamodule)
    assert predicted is not None
    assert sorted(row for batch in predicted for row in batch) == list(range(23))


def test_without_test_data_the_validation_data_are_tested(
    data: Callable[..., ChatDataModule], write: Write, tmp_path: Path
) -> None:
    path = write([chat("held out"), chat("and another")], "val.jsonl")
    for options, expected in (({"val": path}, [0, 1]), ({"val_fraction": 0.2}, None)):
        datamodule, module = data(**options), Recorder()
        trainer(tmp_path).validate(module, datamodule=datamodule, verbose=False)
        validated, module.validated = module.validated, []
        trainer(tmp_path).test(module, datamodule=datamodule, verbose=False)
        assert module.validated == validated
        assert expected is None or sorted(validated) == expected
        assert "the validation data, since data.test is not given" in datamodule.test_facts()["source"]
    with pytest.raises(ConfigError, match=r"data\.test: not given"):
        trainer(tmp_path).test(Recorder(), datamodule=data(val_fraction=0.0))
    with pytest.raises(ConfigError, match=r"data\.test: not given"):
        trainer(tmp_path).test(Recorder(), datamodule=data(train=write([chat("alone")], "one.jsonl"), val_fraction=0.5))


def test_test_facts_have_source_and_counts(data: Callable[..., ChatDataModule], write: Write, tmp_path: Path) -> None:
    path = write([chat("held out"), chat("and another")], "own.jsonl")
    datamodule = data(test=path)
    trainer(tmp_path).test(Recorder(), datamodule=datamodule, verbose=False)
    assert datamodule.test_facts()["source"] == f"data.test: {path}"
    assert datamodule.test_facts()["statistics"]["test"]["kept"] == 2
    assert datamodule.origins("test", [1, 0]) == [Origin(f"{path}:2"), Origin(f"{path}:1")]


def test_prompts_come_in_batches_of_their_own_size_by_length(
    data: Callable[..., ChatDataModule], write: Write, tmp_path: Path
) -> None:
    path = write([chat("a question " * (1 + 7 * index % 10)) for index in range(11)], "prompts.jsonl")
    datamodule = data(predict=path, predict_batch_size=4, batch_size=1, max_tokens_per_batch=400)
    trainer(tmp_path).predict(Recorder(), datamodule=datamodule)
    lengths = [batch["attention_mask"].sum(-1).tolist() for batch in datamodule.predict_dataloader()]
    assert [len(part) for part in lengths] == [4, 4, 3]
    flat = [length for part in lengths for length in part]
    assert flat == sorted(flat, reverse=True)
    assert len(set(flat)) > 5


@pytest.mark.parametrize("limits", [{"fast_dev_run": True}, {"limit_train_batches": 2}, {"overfit_batches": 2}])
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_lightnings_limits_work(data: Callable[..., ChatDataModule], tmp_path: Path, limits: dict[str, Any]) -> None:
    module = Recorder()
    trainer(tmp_path, max_epochs=2, **limits).fit(module, datamodule=data(packing=False))
    epochs = [[rows for epoch, rows in module.trained if epoch == number] for number in (0, 1)]
    assert [len(epoch) for epoch in epochs] == ([1, 0] if "fast_dev_run" in limits else [2, 2])
    if "overfit_batches" in limits:
        assert epochs[0] == epochs[1]


def test_mixtures_have_the_given_shares_and_no_row_twice(data: Callable[..., ChatDataModule], write: Write) -> None:
    files = [
        write([chat(f"{name} {index}") for index in range(count)], f"{name}.jsonl") for name, count in SIZES.items()
    ]
    datamodule = data(train=files, mixture=[3, 1], val_fraction=0.0)
    datamodule.prepare_data()
    datamodule.setup()
    seen = [row for batch in datamodule.train_dataloader() for rows in batch["document_ids"] for row in rows]
    assert len(set(seen)) == len(seen) == datamodule.train_documents
    places = datamodule.describe_rows(seen)
    assert [sum(f"{name}.jsonl" in place for place in places) for name in SIZES] == [30, 10]


def test_batches_can_be_limited_by_tokens(data: Callable[..., ChatDataModule]) -> None:
    for packing in (True, False):
        datamodule = data(max_tokens_per_batch=800, packing=packing)
        datamodule.prepare_data()
        datamodule.setup()
        shapes = [batch["input_ids"].numel() for batch in datamodule.train_dataloader()]
        assert max(shapes) <= 800
        assert sum(shapes) / len(shapes) > 400


def test_a_support_export_is_trained_on(data: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    table = tmp_path / "export.csv"
    table.write_text("ticket,who,text,at\n1,agent,the answer,2\n2,customer,hi,1\n1,customer,help,1\n2,agent,ho,2\n")
    datamodule = data(
        train=str(table),
        conversation_column="ticket",
        role_column="who",
        content_column="text",
        order_column="at",
        role_map={"customer": "user", "agent": "assistant"},
        val_fraction=0.0,
    )
    datamodule.prepare_data()
    datamodule.setup()
    documents = datamodule.prepared["train"].documents([0, 1])
    texts = [datamodule.tokenizer.decode(document.input_ids) for document in documents]
    assert texts == [
        "<|user|> help<|end|><|assistant|> the answer<|end|><|endoftext|>",
        "<|user|> hi<|end|><|assistant|> ho<|end|><|endoftext|>",
    ]


def test_a_custom_template_without_system_messages_works(
    data: Callable[..., ChatDataModule], write: Write, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    path = write([{"messages": [{"role": "system", "content": "be kind"}, *chat()["messages"]]}], "system.jsonl")
    with pytest.raises(DataError, match=r"system\.jsonl:1: the chat template loses text: messages\[0\]"):
        data(train=path, chat_template=str(template)).prepare_data()
    datamodule = data(train=path, chat_template=str(template), system="merge_into_user")
    datamodule.prepare_data()
    datamodule.setup()
    [document] = datamodule.prepared["train"].documents([0])
    expected = "<|user|> be kind\n\na question<|end|><|assistant|> the answer<|end|>"
    assert datamodule.tokenizer.decode(document.input_ids) == expected
    with pytest.raises(ConfigError, match=r"data\.chat_template: cannot read"):
        data(chat_template=str(tmp_path / "missing.jinja")).prepare_data()


def test_validation_data_are_optional(data: Callable[..., ChatDataModule], tmp_path: Path, write: Write) -> None:
    for options in ({"val_fraction": 0.0}, {"train": write([chat()], "one.jsonl")}):
        module = Recorder()
        trainer(tmp_path).fit(module, datamodule=data(**options))
        assert module.validated == []
        assert module.trained
    with pytest.raises(ConfigError, match=r"data\.val"):
        trainer(tmp_path).validate(Recorder(), datamodule=data(val_fraction=0.0))


def test_the_seed_of_seed_everything_is_used_unless_one_is_given(data: Callable[..., ChatDataModule]) -> None:
    def plan(**options: Any) -> Any:
        datamodule = data(**options)
        datamodule.prepare_data()
        datamodule.setup()
        return datamodule.state_dict()

    seed_everything(3, verbose=False)
    assert plan() == plan(seed=3) != plan(seed=4)


def test_a_row_that_diverged_is_named(data: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    with pytest.raises(DivergenceError) as caught:
        trainer(tmp_path).fit(Recorder(fail_at=2), datamodule=data(packing=False))
    assert f"chats.jsonl:{caught.value.document_ids[0] + 1}" in caught.value.__notes__[0]


def test_longrope_models_never_mix_long_and_short(
    data: Callable[..., ChatDataModule], tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "longrope"
    tokenizer.save_pretrained(folder)
    for rope in ('"rope_scaling": {"type": "su"}', '"rope_parameters": {"rope_type": "longrope"}'):
        (folder / "config.json").write_text(
            f'{{"max_position_embeddings": 512, "original_max_position_embeddings": 50, {rope}}}'
        )
        datamodule = data(tokenizer=str(folder))
        datamodule.prepare_data()
        datamodule.setup()
        kinds = [
            {length > 50 for row in batch["document_lengths"] for length in row}
            for batch in datamodule.train_dataloader()
        ]
        assert all(len(kind) == 1 for kind in kinds)
        assert len({kind.pop() for kind in kinds}) == 2


def test_nothing_is_loaded_on_construction_and_faults_are_named_early(
    data: Callable[..., ChatDataModule], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no such file"):
        data(train=str(tmp_path / "missing.jsonl")).validate_sources()
    with pytest.raises(ConfigError, match=r"data\.max_length: 513 .* 512"):
        data(max_length=513).validate_sources()
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        data(tokenizer=None).prepare_data()
    with pytest.raises(ConfigError, match=r"data\.train"):
        trainer(tmp_path).fit(Recorder(), datamodule=data(train=None))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_length": 1},
        {"batch_size": 0},
        {"predict_batch_size": 0},
        {"num_workers": -1},
        {"on_bad_row": "ignore"},
        {"truncation": "truncate"},
        {"num_proc": 0},
        {"val_fraction": 1.0},
        {"mixture": [1.0, 2.0]},
        {"mixture": [0.0]},
        {"max_tokens_per_batch": 399},
    ],
)
def test_ranges_are_checked_on_construction(data: Callable[..., ChatDataModule], wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))}"):
        data(**wrong)


def test_a_prompt_that_is_too_long_is_named(data: Callable[..., ChatDataModule], write: Write, tmp_path: Path) -> None:
    fits = write([chat("a question " * 20)], "fits.jsonl")  # longer than max_length, shorter than the context length
    trainer(tmp_path).predict(Recorder(), datamodule=data(predict=fits, max_length=16))
    with pytest.raises(DataError, match=r"long\.jsonl:1: prompt too long"):
        trainer(tmp_path).predict(Recorder(), datamodule=data(predict=write([chat("x" * 600)], "long.jsonl")))


def test_hyper_parameters_are_complete_and_plain(data: Callable[..., ChatDataModule]) -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float, bool)

    datamodule = data(train=["a.jsonl", "b.jsonl"], mixture=[3, 1])
    assert all(plain(value) for value in datamodule.hparams.values())
    assert datamodule.hparams == asdict(datamodule.options)
    assert set(datamodule.hparams) == {field.name for field in fields(DataConfig)}


def test_from_config_equals_keyword_options(data: Callable[..., ChatDataModule]) -> None:
    options = data(packing=False).options
    datamodule = ChatDataModule.from_config(options)
    assert datamodule.options == options
    assert datamodule.hparams == data(packing=False).hparams


class WithOwnOption(ChatDataModule):
    def __init__(self, greeting: str = "hello", **kwargs: Any) -> None:
        """Has an option of its own.

        Args:
            greeting: What is said first.
            **kwargs: The options of ChatDataModule.
        """
        super().__init__(**kwargs)
        self.greeting = greeting


@pytest.mark.parametrize("kind", [ChatDataModule, WithOwnOption])
def test_a_plain_lightning_cli_has_flat_options(kind: type[ChatDataModule], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    own = ["--data.greeting=ahoy"] if kind is WithOwnOption else []
    given = ["--data.train=[a.jsonl, b.jsonl]", "--data.max_length=64", "--data.max_tokens_per_batch=auto", *own]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    cli = LightningCLI(
        Recorder, kind, run=False, save_config_callback=None, seed_everything_default=False, args=[*given, *quiet]
    )
    assert cli.datamodule.options == DataConfig(
        train=["a.jsonl", "b.jsonl"], max_length=64, max_tokens_per_batch="auto"
    )
    assert getattr(cli.datamodule, "greeting", "ahoy") == "ahoy"
    text = " ".join(cli.parser.format_help().split())
    assert all(f"--data.{field.name} " in text for field in fields(DataConfig))
    assert ("What is said first" in text) == (kind is WithOwnOption)


class Sizes(Recorder):
    """Records the number of rows of its batches, and has memory for a few."""

    def __init__(self, most: int = 10**9) -> None:
        super().__init__()
        self.most = most
        self.sizes: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.sizes.append(len(batch["document_ids"]))
        if self.sizes[-1] > self.most:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(batch, batch_idx)

    def predict_step(self, batch: PromptBatch) -> list[int]:
        self.sizes.append(len(batch["document_ids"]))
        return batch["document_ids"]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_batches_have_the_size_that_the_tuner_tries(
    data: Callable[..., ChatDataModule], write: Write, tmp_path: Path, packing: bool, mode: Any
) -> None:
    path = write([chat(f"question {index}", "word " * 20) for index in range(128)])
    options = {"packing": packing, "max_length": 150, "val_fraction": 0.0, "seed": 0}  # a fixed first batch
    datamodule, module = data(train=path, **options), Sizes(most=20)
    tuned = trainer(tmp_path, max_steps=3)
    found = Tuner(tuned).scale_batch_size(module, datamodule=datamodule, mode=mode, steps_per_trial=1, margin=0.0)
    assert module.sizes[:5] == [2, 4, 8, 16, 32]
    assert found == max(size for size in module.sizes if size <= 20)
    assert found == (16 if mode == "power" else 20)
    assert datamodule.batch_size == datamodule.hparams["batch_size"] == found
    module.sizes.clear()
    tuned.fit(module, datamodule=datamodule)
    assert module.sizes[0] == found
    assert sorted(datamodule.plans["train"].documents.tolist()) == list(range(128))


def test_the_tuner_stops_at_the_number_of_rows(data: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    module = Sizes()
    datamodule = data(packing=False, val_fraction=0.0)  # 23 rows; the last batch has the remainder
    Tuner(trainer(tmp_path, max_steps=1)).scale_batch_size(module, datamodule=datamodule, steps_per_trial=3)
    assert max(module.sizes) == module.sizes[-1] == 23
    assert {2, 4, 8, 16} < set(module.sizes)


def test_the_tuner_scales_the_batch_size_of_prompts_separately(
    data: Callable[..., ChatDataModule], write: Write, tmp_path: Path
) -> None:
    prompts = write([{"prompt": "a"}] * 9, "prompts.jsonl")
    with pytest.raises(ConfigError, match="give batch_arg_name that name"):
        Tuner(trainer(tmp_path)).scale_batch_size(Sizes(), datamodule=data(predict=prompts), method="predict")
    module, datamodule = Sizes(), data(predict=prompts, predict_batch_size=1)
    Tuner(trainer(tmp_path)).scale_batch_size(
        module, datamodule=datamodule, method="predict", batch_arg_name="predict_batch_size", steps_per_trial=1
    )
    assert sorted(set(module.sizes)) == [1, 2, 4, 8, 9]


def test_setting_batch_size_under_max_tokens_is_refused(data: Callable[..., ChatDataModule], tmp_path: Path) -> None:
    for tokens in (400, "auto"):
        datamodule = data(max_tokens_per_batch=tokens)
        with pytest.raises(ConfigError, match=r"data\.max_tokens_per_batch replaces it.*auto"):
            datamodule.batch_size = 8
    with pytest.raises(ConfigError, match=r"data\.batch_size: 0 cannot be used: give 1 or more"):
        data().batch_size = 0
