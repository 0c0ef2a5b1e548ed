"""Public faults of similar software, each through the command line: the right result, or a refusal."""

import json
import re
import signal
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.conftest import QUICK, TINY, Run, start
from phi3_lightning.checkpoint.io import read_checkpoint

CASES = Path(__file__).parent.parent / "cases"
TABLE = (
    "--data.conversation_column=id",
    "--data.role_column=who",
    "--data.content_column=text",
    "--data.order_column=when",
)
CUSTOMER = "--data.role_map={customer: user, agent: assistant}"
SYSTEM = {"role": "system", "content": "Answer only in French."}
SALUT = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Salut"}]
LEFT = [{"role": "user", "content": "Left?"}, {"role": "assistant", "content": "Right."}]
INK = [{"role": "user", "content": "Do you sell ink?"}, {"role": "assistant", "content": "Yes we do."}]
OPEN = [{"role": "user", "content": "When do you open?"}, {"role": "assistant", "content": "At nine."}]
LINES = {"prompt": "Two lines?", "completion": "First line.\nSecond line."}


def write_rows(folder: Path, *rows: dict) -> Path:
    """Write the plain rows to compare with."""
    path = folder / "reference.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def preview(cli, *options: str, code: int = 0) -> str:
    """Preview data as the tiny model reads them."""
    common = (f"--data.tokenizer={TINY}", "--data.max_length=512", "--data.val_fraction=0", "--data.cache_dir=cache")
    return cli("preview", *common, *options, code=code).text


def token_counts(text: str) -> tuple[str, str]:
    """The numbers of all tokens and of trained tokens that ``preview`` reports."""
    tokens = re.search(r"^tokens +([\d,]+)", text, re.MULTILINE)
    trained = re.search(r"^trained tokens +([\d,]+)", text, re.MULTILINE)
    assert tokens, text
    assert trained, text
    return tokens[1], trained[1]


def refusal(run: Run | str) -> str:
    """The one line of a refusal."""
    text = run if isinstance(run, str) else run.text
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, text
    assert "Traceback" not in text
    return text[text.index("error:") :]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        pytest.param(["f02.a_messages.jsonl"], [{"messages": SALUT}], id="system beside messages"),
        pytest.param(["f02.b_prompt.jsonl"], [{"messages": SALUT}], id="system beside a prompt"),
        pytest.param(["f16.a_from_value.jsonl"], [{"messages": LEFT}], id="from and value in messages"),
        pytest.param(
            [
                "f16.b_dialogue.jsonl", "--data.columns={messages: dialogue}",
                "--data.role_map={client: user, agent: assistant}",
                "--data.message_keys={role: speaker, content: text}",
            ],
            [{"messages": LEFT}],
            id="own keys of a turn",
        ),
        pytest.param(
            ["f18.c_float_ids.parquet", *TABLE, CUSTOMER, "--data.on_bad_row=skip"],
            [{"messages": INK}, {"messages": OPEN}],
            id="ids that are whole floats",
        ),
        pytest.param(["f22.e_crlf_cell.csv"], [LINES], id="line ends in a cell"),
    ],
)  # fmt: skip
def test_a_row_has_the_tokens_of_its_plain_form(cli, tmp_path, options, rows):
    file, *rest = options
    expected = token_counts(preview(cli, f"--data.train={write_rows(tmp_path, *rows)}"))
    assert token_counts(preview(cli, f"--data.train={CASES / file}", *rest)) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(["f06.a.parquet"], ["f06.a.jsonl"], id="nulls of Parquet"),
        pytest.param(["f17.left_padded.jsonl"], ["f17.plain.jsonl"], id="masked padding"),
        pytest.param(["f20.a_loss_false.jsonl"], ["f20.b_weight0.jsonl"], id="other names for weight"),
        pytest.param(
            ["f21.chat.jsonl", f"--data.chat_template={CASES}/f21.bom.jinja"],
            ["f21.chat.jsonl", f"--data.chat_template={CASES}/f21.clean.jinja"],
            id="byte order mark of a template",
        ),
    ],
)
def test_files_of_the_same_rows_have_the_same_tokens(cli, one, other):
    first, second = (token_counts(preview(cli, f"--data.train={CASES / file}", *rest)) for file, *rest in (one, other))
    assert first == second


@pytest.mark.parametrize(
    ("folder", "rows"),
    [pytest.param("f03.d", 5, id="splits by name"), pytest.param("f04.e", 3, id="hidden copies")],
)
def test_a_folder_gives_the_rows_of_its_training_split_alone(cli, folder, rows):
    text = preview(cli, f"--data.train={CASES / folder}")
    assert re.search(rf"^rows read +{rows} *$", text, re.MULTILINE), text


def test_a_prompt_needs_no_answer_and_keeps_its_input(cli):
    text = preview(cli, f"--data.predict={CASES}/f19.a.jsonl", "--split=predict")
    assert "Translate" in text
    assert "Hallo" in text


def test_preview_shows_the_text_as_it_is(cli):
    text = preview(cli, f"--data.train={CASES}/f30.text_blank.jsonl")
    assert "Do you sell ink?" in text.translate({ord(bracket): None for bracket in "«»"})  # brackets of trained text


TOOLS = (f"--data.train={CASES}/f26.row.jsonl", f"--data.chat_template={CASES}/f26.tok.jinja")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        pytest.param(["f02.c_both.jsonl"], ["f02.c_both.jsonl:1", "system"], id="two system prompts"),
        pytest.param(["f18.a_blank_ids.csv", *TABLE, CUSTOMER], ["f18.a_blank_ids.csv", "id"], id="empty ids"),
        pytest.param(
            ["f18.b_us_dates.csv", *TABLE, CUSTOMER], ["9/2/2024 9:05 AM", "data.order_column"], id="dates as text"
        ),
        pytest.param(["f18.d_null_ids.jsonl", *TABLE, CUSTOMER], ["f18.d_null_ids.jsonl:1", "id"], id="null ids"),
        pytest.param(["f22.a_semicolon.csv"], ["f22.a_semicolon.csv", "';'"], id="semicolons"),
        pytest.param(["f22.b_utf16.csv"], ["f22.b_utf16.csv", "UTF-16"], id="UTF-16"),
        pytest.param(["f22.c_cp1252.csv"], ["f22.c_cp1252.csv", "cp1252"], id="cp1252"),
        pytest.param(["f22.d_repr.csv"], ["f22.d_repr.csv", "Python"], id="Python's repr"),
    ],
)
def test_an_ambiguous_row_is_refused(cli, tmp_path, options, parts):
    file, *rest = options
    text = refusal(preview(cli, f"--data.train={CASES / file}", *rest, code=1))
    assert all(part in text for part in parts), text
    assert not list(tmp_path.rglob("*.arrow"))


def test_a_template_that_strips_reasoning_names_the_remedy(cli, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_sep|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    thoughts = (
        f"--data.train={CASES}/f27.think.jsonl", f"--data.chat_template={CASES}/f27.think.jinja",
        f"--data.tokenizer={tmp_path}/tokenizer",
    )  # fmt: skip
    assert "data.train_on: last" in refusal(preview(cli, *thoughts, code=1))
    assert "<think>greet</think>Hey." in preview(cli, *thoughts, "--data.train_on=last")


def test_a_template_that_renders_tools_itself_is_used_or_refused(cli, tmp_path):
    assert "data.tools: render" in refusal(preview(cli, *TOOLS, code=1))
    assert "weather" in preview(cli, *TOOLS, "--data.tools=render")
    row = json.loads((CASES / "f26.row.jsonl").read_text())
    row["messages"][2] = {"role": "assistant", "content": "It rains."}  # that template writes tools, but no calls
    (tmp_path / "row.jsonl").write_text(json.dumps(row))
    assert '<|tool|>[{"type": "function"' in preview(cli, *TOOLS, f"--data.train={tmp_path}/row.jsonl")


@pytest.mark.parametrize("name", ["owner/name/config:train", "owner/name@revision:train"])
def test_a_configuration_or_revision_that_cannot_be_read_is_refused_by_name(cli, monkeypatch, name):
    for module in (huggingface_hub.constants, datasets.config):  # without a network, each attempt takes its time
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    assert name in refusal(preview(cli, f"--data.train={name}", code=1))


def config_of(folder: Path, run: str = "phi3-lora") -> str:
    return f"--config={folder}/runs/{run}/config.yaml"


def held_out_loss(run: Run) -> str:
    found = re.search(r"val/loss\D+([\d.]+)", run.text)
    assert found, run.text
    return found[1]


@pytest.mark.slow
def test_a_requested_checkpoint_is_used_or_the_command_fails(cli, tmp_path):
    base = held_out_loss(cli("validate", *QUICK))
    cli("fit", *QUICK, "--trainer.max_steps=20", "--trainer.val_check_interval=10")
    config = config_of(tmp_path)
    tuned = held_out_loss(cli("validate", config))
    assert tuned != base
    assert held_out_loss(cli("validate", config, "--ckpt_path=last")) != base
    assert held_out_loss(cli("validate", config, "--ckpt_path=best")) == tuned
    for command in (
        ["validate"],
        ["test"],
        ["predict", f"--data.predict={CASES}/f07.p.jsonl"],
        ["chat", "--prompt=Hi"],
    ):
        assert "nothing.ckpt" in refusal(cli(*command, config, "--ckpt_path=nothing.ckpt", code=1))
    assert "nothing.ckpt" in refusal(cli("export", config, "--ckpt_path=nothing.ckpt", "--output_dir=out", code=1))
    assert not (tmp_path / "out").exists()


def test_answers_name_their_rows(cli, tmp_path):
    prompts = CASES / "f07.p.jsonl"
    cli("predict", *QUICK, f"--data.predict={prompts}", "--data.on_bad_row=skip")
    lines = [json.loads(line) for line in (tmp_path / "runs/phi3-lora/predictions.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [f"{prompts}:1", f"{prompts}:3"]
    assert [line["id"] for line in lines] == ["When are you open on Monday?", "Do you sell songs?"]
    assert all(line["id"] in line["prompt"] for line in lines)
    assert all({"answer", "finished"} <= line.keys() for line in lines)


def test_a_run_folder_has_one_writer(cli, tmp_path):
    first = start(tmp_path, "fit", *QUICK, "--trainer.max_steps=100000", "--checkpoint.every_n_steps=1")
    first.wait_for((tmp_path / "runs/phi3-lora/checkpoints/last.ckpt").exists)
    assert str(first.pid) in refusal(cli("fit", *QUICK, "--trainer.max_steps=100000", code=1))
    assert first.poll() is None
    first.kill(signal.SIGKILL)
    first.wait_for(lambda: first.poll() is not None)
    cli("fit", *QUICK, "--trainer.max_steps=1")  # a dead process holds no lock


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("fit", "--trainer.default_root_dir=s3://bucket/runs"),
        ("fit", "--trainer.default_root_dir=file:///somewhere/runs"),
        ("fit", "--data.cache_dir=s3://bucket/cache"),
        ("fit", "--checkpoint.dirpath=gs://bucket/checkpoints"),
        ("validate", "--ckpt_path=s3://bucket/last.ckpt"),
    ],
)
def test_a_url_is_refused_as_a_folder(cli, tmp_path, command, option):
    address = option.partition("=")[2]
    assert address in refusal(cli(command, *QUICK, option, code=1))
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("output")]


@pytest.mark.parametrize("option", ["--data.cache_dir=taken/cache", "--trainer.default_root_dir=taken"])
def test_a_file_where_a_folder_should_be_is_named(cli, tmp_path, option):
    (tmp_path / "taken").write_text("a file")
    assert "taken" in refusal(cli("fit", *QUICK, "--trainer.max_steps=1", option, code=1))


def callback(name: str, **options: object) -> str:
    entry = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": options}
    return f"--trainer.callbacks={json.dumps([entry])}"


@pytest.mark.slow
def test_early_stopping_follows_the_options_of_this_start(cli):
    # a model that does not change: no validation improves on the first
    still = (*QUICK, "--model.optimizer.lr=0.0000000001", "--trainer.max_epochs=9", "--trainer.limit_train_batches=2")

    def fit(option: str) -> tuple[int, bool]:
        text = cli("fit", *still, option).text
        return len(re.findall(r"trained|epoch", text)), "nothing left" in text

    def patience(validations: int) -> str:
        return callback("EarlyStopping", monitor="val/loss", patience=validations)

    assert not fit(patience(1))[1]
    assert fit(patience(1))[1]
    assert not fit(patience(3))[1]
    assert fit(patience(3))[1]
    assert not fit("--trainer.callbacks=[]")[1]


@pytest.mark.slow
def test_each_start_has_its_own_time(cli, tmp_path):
    steps = [0]
    for _ in range(2):
        cli("fit", *QUICK, "--trainer.max_steps=100000", "--trainer.max_time=00:00:00:02")
        steps.append(read_checkpoint(tmp_path / "runs/phi3-lora/checkpoints/last.ckpt")["global_step"])
    assert 0 < steps[1] < steps[2]


def test_averaging_saves_only_adapters_and_resumes(cli, tmp_path):
    average = callback("EMAWeightAveraging", decay=0.9)
    path = tmp_path / "runs/phi3-lora/checkpoints/last.ckpt"
    cli("fit", *QUICK, "--trainer.max_steps=4", average)
    checkpoint = read_checkpoint(path)
    assert checkpoint["current_model_state"].keys() == checkpoint["state_dict"].keys()
    cli("fit", *QUICK, "--trainer.max_steps=8", average)
    assert read_checkpoint(path)["global_step"] == 8


@pytest.mark.slow
def test_forked_ranks_train_and_write_a_checkpoint(cli, tmp_path):
    cli("fit", *QUICK, "--trainer.max_steps=2", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    assert read_checkpoint(tmp_path / "runs/phi3-lora/checkpoints/last.ckpt")["global_step"] == 2


def test_an_adapter_that_rewrote_the_base_is_refused(cli, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(TINY)
    config = LoraConfig(r=4, target_modules=["qkv_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "pissa")
    lora = (f"--model.lora.init_from={tmp_path}/pissa", "--model.lora.r=4", "--model.lora.target_modules=[qkv_proj]")
    assert "pissa" in refusal(cli("fit", *QUICK, "--trainer.max_steps=1", *lora, code=1))
    assert "pissa" in refusal(
        cli("chat", f"--ckpt_path={tmp_path}/pissa", f"--model.base={TINY}", "--prompt=Hi", code=1)
    )


def test_repeated_steps_of_a_killed_run_are_shown_once(cli, tmp_path):
    options = (*QUICK, "--checkpoint.every_n_steps=5", "--data.val=null", "--data.val_fraction=0")
    first = start(tmp_path, "fit", *options, "--trainer.max_steps=100000")
    first.wait_for(lambda: len(steps_of(tmp_path)) > 12)
    first.kill(signal.SIGKILL)
    first.wait_for(lambda: first.poll() is not None)
    going_on = read_checkpoint(tmp_path / "runs/phi3-lora/checkpoints/last.ckpt")["global_step"]
    cli("fit", *options, f"--trainer.max_steps={going_on + 4}")
    assert steps_of(tmp_path) == sorted(set(steps_of(tmp_path)))
    assert max(steps_of(tmp_path)) <= going_on + 4


def steps_of(folder: Path) -> list[int]:
    """Steps of the training loss, as TensorBoard shows them."""
    tensorboard = folder / "runs/phi3-lora/tensorboard"
    if not tensorboard.exists():
        return []
    events = EventAccumulator(str(tensorboard))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")] if "train/loss" in events.Tags()["scalars"] else []


def test_batches_have_the_size_that_the_tuner_tries(cli):
    finder = callback("BatchSizeFinder", mode="power", steps_per_trial=1, init_val=2, max_trials=2)
    text = cli("fit", *QUICK, "--data.packing=false", "--trainer.max_steps=1", finder).text
    size = re.search(r"continue with full run using batch size (\d+)", text)
    assert size, text
    assert f"{320 // int(size[1])} batches an epoch" in text
    assert int(size[1]) > 2


@pytest.mark.slow
def test_equal_answers_have_the_best_score_in_every_script(cli, tmp_path):
    rows = [
        [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "我们九点开门"}],
        [{"role": "user", "content": "B?"}, {"role": "assistant", "content": "Мы открываемся в девять"}],
    ]
    file = write_rows(tmp_path, *({"messages": row} for row in rows))
    data = (f"--data.train={file}", f"--data.val={file}", f"--data.test={file}", "--model.generation.max_new_tokens=64")
    cli("fit", *QUICK, *data, "--trainer.max_steps=160", "--trainer.check_val_every_n_epoch=1000")
    cli("test", *QUICK, *data)
    report = json.loads((tmp_path / "runs/phi3-lora/test.json").read_text(encoding="utf-8"))
    assert [answer["tuned"]["answer"] for answer in report["answers"]] == [row[1]["content"] for row in rows]
    assert report["metrics"]["rougeL"]["tuned"]["value"] == 1.0


@pytest.mark.parametrize(
    "option", ["--trainer.enable_checkpointing=false", "--trainer.barebones=true", "--trainer.logger=false"]
)
def test_a_run_without_a_checkpoint_or_a_logger_trains(cli, tmp_path, option):
    cli("fit", *QUICK, "--trainer.max_steps=2", option)
    assert bool(list(tmp_path.rglob("*.ckpt"))) == (option == "--trainer.logger=false")


@pytest.mark.parametrize(
    "option", ["--trainer.strategy=dpp", "--trainer.devices=0", "--trainer.accumulate_grad_batches=0"]
)
def test_options_that_the_trainer_refuses_are_one_error(cli, option):
    assert option.partition("=")[0].removeprefix("--") in refusal(
        cli("fit", *QUICK, "--trainer.max_steps=2", option, code=1)
    )
