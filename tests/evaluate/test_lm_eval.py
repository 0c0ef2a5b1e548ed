"""The tasks for lm-evaluation-harness score exports as this package does, by the commands of the guide."""

import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import synthetic
from cli.conftest import REPOSITORY, TINY
from docs.blocks import all_blocks
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.checkpoint.identity import IDENTITY
from phi3_lightning.data.conversation import Conversation
from phi3_lightning.data.template import ChatTemplate, load_tokenizer
from phi3_lightning.export.card import Provenance
from phi3_lightning.export.chat_files import Chat
from phi3_lightning.export.export import export
from phi3_lightning.export.options import Export
from phi3_lightning.metrics import AnswerMetrics
from phi3_lightning.metrics.answers import Answer

CHATS = TINY / "chats_val.jsonl"
ROWS = [json.loads(line)["messages"] for line in CHATS.read_text().splitlines()]
LIMIT = 8
COMMANDS = [
    shlex.split(command)
    for block in all_blocks("bash")
    if block.page == "docs/evaluation.md"
    for command in block.text.replace("\\\n", " ").splitlines()
    if command.startswith("lm_eval")
]


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


# ---------------------------------------------------------------------- the documents


def test_documents_are_the_prompts_and_answers_of_training():
    load = runpy.run_path(str(REPOSITORY / "examples/lm_eval/chats.py"))["load"]
    documents = load(chats=str(CHATS), pretrained=str(TINY), tokenizer=None, dtype="float32")["test"]
    assert len(documents) == len(ROWS) == 40
    template = ChatTemplate(load_tokenizer(str(TINY)))
    for document, messages in zip(documents, ROWS, strict=True):
        prompt, whole = (
            template.encode([Conversation(chat, [False] * len(chat))], add_generation_prompt=generation)[0].input_ids
            for chat, generation in ((messages[:-1], True), (messages, False))
        )
        assert template.tokenizer(document["prompt"]).input_ids == prompt
        assert document["answer"] == messages[-1]["content"]
        end = whole.index(template.stop_ids[0], len(prompt))
        assert document["tokens"] == end - len(prompt)


def test_the_file_that_the_tasks_read_without_metadata_is_there():
    script = runpy.run_path(str(REPOSITORY / "examples/lm_eval/chats.py"))
    assert (REPOSITORY / script["QUICKSTART"]).is_file()


def test_the_guide_has_a_command_for_each_kind_of_export():
    assert [option(command, "--model_args").count("peft=") for command in COMMANDS] == [1, 0]
    for command in COMMANDS:
        assert (REPOSITORY / option(command, "--include_path")).is_dir()
        assert "--apply_chat_template" not in command  # the documents are rendered already


# ---------------------------------------------------------------------- the harness


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two exports that the guide names, of one adapter with random values."""
    pytest.importorskip("lm_eval", reason="no lm_eval: pip install lm_eval")
    folder = tmp_path_factory.mktemp("exports")
    stop_ids = ChatTemplate(load_tokenizer(str(TINY))).stop_ids
    for name, what in (("my-bot", Export()), ("my-bot-full", Export("merged", "float32"))):
        torch.manual_seed(1)
        module = synthetic.randomised(Phi3LoRAModule(str(TINY), dtype="float32", lora={"r": 4}), std=0.02).eval()
        checkpoint = {"global_step": 1, "hyper_parameters": dict(module.hparams)}
        checkpoint[IDENTITY] = module.checkpoint_identity()
        chat = Chat(str(TINY), None, None, stop_ids, [[5, 6, 7, 8]])
        export(module, chat, Provenance("owner/name", checkpoint, None), what, folder / name)
    return folder


def harness(arguments: dict[str, Any]) -> dict[str, Any]:
    """Scores and samples of both tasks."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = option(COMMANDS[0], "--tasks").split(",")
    manager = TaskManager(
        include_path=str(REPOSITORY / "examples/lm_eval"),
        include_defaults=False,
        metadata=arguments | {"chats": str(CHATS)},
    )
    return lm_eval.simple_evaluate(
        "hf", arguments, tasks, task_manager=manager, device="cpu", batch_size=4, limit=LIMIT, bootstrap_iters=0
    )


@pytest.fixture(scope="module")
def results(exports: Path) -> dict[str, Any]:
    """The results of the base and of the guide's commands, on the tiny model."""
    names = {"microsoft/Phi-3-mini-4k-instruct": str(TINY), "my-bot": str(exports / "my-bot")}
    names["my-bot-full"] = str(exports / "my-bot-full")
    found = {"base": harness({"pretrained": str(TINY), "dtype": "float32"})}
    for kind, command in zip(("adapter", "merged"), COMMANDS, strict=True):
        pairs = (pair.split("=") for pair in option(command, "--model_args").split(","))
        found[kind] = harness({key: names.get(value, value) for key, value in pairs} | {"dtype": "float32"})
    return found


def scores(result: dict[str, Any]) -> dict[str, float]:
    return {
        name.partition(",")[0]: value
        for task in result["results"].values()
        for name, value in task.items()
        if isinstance(value, float)
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_adapter_and_merged_model_have_the_same_scores_and_the_base_has_others(results):
    base, adapter, merged = (scores(results[kind]) for kind in ("base", "adapter", "merged"))
    assert adapter == pytest.approx(merged, rel=1e-4)  # float32 in another order
    assert {"exact_match", "bleu", "chrf", "token_perplexity", "acc"} <= adapter.keys()
    assert abs(adapter["token_perplexity"] - base["token_perplexity"]) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_perplexity_is_that_of_the_answers_tokens(results, exports):
    model = AutoModelForCausalLM.from_pretrained(exports / "my-bot-full", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exports / "my-bot-full")
    losses = []
    for messages in ROWS[:LIMIT]:
        prompt, whole = (
            tokenizer.apply_chat_template(chat, add_generation_prompt=generation, return_dict=False)
            for chat, generation in ((messages[:-1], True), (messages, False))
        )
        end = whole.index(tokenizer.convert_tokens_to_ids("<|end|>"), len(prompt))
        with torch.inference_mode():
            log_probabilities = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        losses += [-log_probabilities[index - 1, whole[index]].item() for index in range(len(prompt), end)]
    expected = torch.tensor(losses).mean().exp().item()
    assert scores(results["merged"])["token_perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_scores_of_answers_are_those_of_this_package(results):
    samples = results["adapter"]["samples"]["chat_answers"]
    metrics = AnswerMetrics()
    metrics.update([Answer(sample["resps"][0][0], sample["target"], 1, True) for sample in samples])
    ours, theirs = metrics.compute(), scores(results["adapter"])
    assert len(samples) == LIMIT
    assert ours["chrf"] > 1
    assert ours["bleu"] == pytest.approx(theirs["bleu"], abs=1e-6)
    assert ours["chrf"] == pytest.approx(theirs["chrf"], abs=1e-6)
