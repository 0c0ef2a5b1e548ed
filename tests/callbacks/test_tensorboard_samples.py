"""TensorBoard's text and hyper-parameter pages, read back from event files."""

import html
import warnings

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import synthetic
from callbacks.test_samples import chats, tiny
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.batch.segments import Segment
from phi3_lightning.callbacks import TensorBoardSamples
from phi3_lightning.callbacks.tensorboard import literal
from phi3_lightning.callbacks.tensorboard_samples import as_markdown, row_segments

with warnings.catch_warnings():  # from TensorBoard's own dependencies
    warnings.simplefilter("ignore", DeprecationWarning)
    from tensorboard.plugin_util import markdown_to_safe_html

ROWS = [
    [
        Segment("Who knows?\n", [1], False, False),
        Segment("<|end|>", [2], True, True),
        Segment("I *do* & <b>\n\nyou_too_", [3], True, False),
    ]
]


def fit(tmp_path, logger, **options):
    options = {"max_steps": 4, "max_epochs": -1, "accumulate_grad_batches": 2, "val_check_interval": 4} | options
    trainer = synthetic.trainer(
        tmp_path, callbacks=[TensorBoardSamples(2)], logger=logger, log_every_n_steps=1, **options
    )
    module, data = tiny(), chats(tmp_path, packing=False, batch_size=4)
    trainer.fit(module, data)
    return module, data


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    loggers = [TensorBoardLogger(folder, name="", version="tb", default_hp_metric=False), CSVLogger(folder / "csv")]
    module, data = fit(folder, loggers)
    return read(folder / "tb"), module, data


def test_the_rows_shown_are_the_first_that_are_trained(run):
    events, _, data = run
    (text,) = events.Tensors("data/first_rows/text_summary")
    shown = markdown_to_safe_html(text.tensor_proto.string_val[0])
    data.trainer = None
    batch = next(iter(data.train_dataloader()))
    for row in range(2):
        labels = batch["labels"][row]
        words = data.tokenizer.decode(labels[labels != IGNORE_INDEX][:4])
        assert f"<strong>{words}" in shown
    assert shown.count("<pre>") == 2


def test_hyper_parameters_have_one_point_with_the_last_numbers(run):
    events, module, _ = run
    assert events.Scalars("result/train_loss")[0].value == pytest.approx(
        events.Scalars("train/loss")[-1].value, rel=1e-6
    )
    assert len(events.Scalars("result/val_loss")) == 1
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert given["optimizer/lr"].number_value == module.learning_rate
    assert given["lora/r"].number_value == 16
    assert given["accumulate_grad_batches"].number_value == 2


@pytest.mark.parametrize("logger", [False, "csv"])
def test_a_logger_without_text_pages_is_ignored(tmp_path, logger):
    fit(tmp_path, CSVLogger(tmp_path) if logger == "csv" else logger, max_steps=1)


def test_markdown_in_text_is_escaped():
    text = "a *b* _c_ `d` <e> | # f & [g](h) \u00e9 \u4f60"
    shown = markdown_to_safe_html(literal(text))
    assert html.unescape(shown) == f"<p>{text}</p>"
    assert html.unescape(markdown_to_safe_html(text)) != f"<p>{text}</p>"


def test_what_is_trained_is_bold_across_empty_lines():
    shown = markdown_to_safe_html(as_markdown(ROWS))
    assert shown.count("<strong>") == 2
    shown = html.unescape(shown)
    assert "<strong>I *do* & <b>\n\nyou_too_</strong>" in shown
    assert "<strong><|end|></strong>" in shown
    assert "<strong>Who" not in shown


def test_segments_hold_every_token(run):
    *_, data = run
    batch = next(iter(data.train_dataloader()))
    shown = "".join(part.text for part in row_segments(batch, 0, data.tokenizer))
    whole = data.tokenizer.decode(batch["input_ids"][0, : sum(batch["document_lengths"][0])])
    assert "".join(shown.split()) == "".join(
        whole.split()
    )  # the tokenizer drops the blank that a decoded text begins with
