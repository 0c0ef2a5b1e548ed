"""``export``: from a checkpoint to a folder for PEFT, transformers and servers."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table

from phi3_lightning.checkpoint.io import read_checkpoint
from phi3_lightning.commands.loading import prompt_options
from phi3_lightning.commands.parser import Parser, add_run, command_parser, model_defaults
from phi3_lightning.data.conversation import BadRowError, Conversation
from phi3_lightning.data.template import ChatTemplate, load_tokenizer
from phi3_lightning.errors import CheckpointError, ConfigError
from phi3_lightning.export.card import Provenance
from phi3_lightning.export.chat_files import Chat
from phi3_lightning.export.export import Exported, export
from phi3_lightning.export.options import Export, Format, GgufType
from phi3_lightning.export.push import Destination, check_destination, push
from phi3_lightning.files import local_path, writing
from phi3_lightning.hub import is_repository
from phi3_lightning.model.base import DType
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.run_folder import RunFolder

DESCRIPTION = "Write a checkpoint's adapter, or the model with the adapter merged in, and prove that it answers alike."

QUESTIONS = (
    "What can you do for me?",
    "Name three colours, and say where each of them is found in nature.",
    "Write one sentence about the sea.",
    "How long do I boil an egg? Answer in one line.",
)
"""The prompts of live and exported model; fixed, so that certificates of one base can be compared."""


def parser() -> Parser:
    """Return the parser of ``export``; a checkpoint alone is enough of a configuration."""
    sections = {"data": "tokenizer, revision and chat_template", "trainer": "default_root_dir"}
    result = command_parser("export", DESCRIPTION, {"model": Phi3LoRAModule}, sections)
    add_run(result, "last, best, or a path; null: the best of --run, or its newest.")
    result.add_argument("--output_dir", type=str, required=True, help="The folder to make.")
    result.add_argument(
        "--format",
        type=Format,
        default="peft",
        help="Adapter for PEFT, whole model, loralib file, or GGUF for llama.cpp.",
    )
    result.add_argument(
        "--merge", action="store_true", help="The same as --format merged; with --format gguf, a whole model as GGUF."
    )
    result.add_argument(
        "--llama_cpp",
        type=str | None,
        default=None,
        help="Folder of llama.cpp, or of llama-cpp-python's source package, for --format gguf --merge.",
    )
    result.add_argument(
        "--ollama_from",
        type=str | None,
        default=None,
        help="The base of an adapter in Ollama: one of its models, or a relative path; null: a GGUF file beside it.",
    )
    result.add_argument(
        "--dtype",
        type=DType | GgufType | None,
        default=None,
        help="Of a merged model, null: as the base's files; f32 or f16 of a GGUF file, null: f32 for an adapter.",
    )
    result.add_argument("--max_shard_size", type=str, default="1GB", help="Largest file of a merged model.")
    result.add_argument(
        "--overwrite", action="store_true", help="Replace what the folder, and the repository of --push, holds."
    )
    result.add_argument("--push", type=str | None, default=None, help="owner/name on the hub, to upload the folder to.")
    result.add_argument(
        "--private", type=bool | None, default=None, help="Visibility of that repository; null: the hub's default."
    )
    result.accept_rest_of_run()
    return result


def main(args: list[str]) -> None:
    """Run the command with the arguments after ``export``."""
    options = parser()
    path = _checkpoint_path(options, args)
    checkpoint = read_checkpoint(path)
    if "hyper_parameters" not in checkpoint:
        raise CheckpointError(f"{path}: no checkpoint of a Phi3LoRAModule; it has no hyper_parameters")
    # the checkpoint's options are defaults: options of this call win
    options.set_defaults(model_defaults(checkpoint["hyper_parameters"]))
    config = options.parse_args(args)
    config.model.lora.init_from = None  # the checkpoint has what it held
    request = _request(config)
    target = local_path("--output_dir", config.output_dir).resolve()
    _check_target(target, overwrite=config.overwrite)
    destination = _destination(config)

    module: Phi3LoRAModule = options.instantiate_classes(config).model
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    module.eval()
    chat = _chat(config, checkpoint)
    if destination is not None and request.format != "merged" and not is_repository(str(module.base_id)):
        raise ConfigError(
            "--push: an adapter on the hub has to name its base there; give it with --model.base_id owner/name"
        )
    provenance = Provenance(_base_name(module), checkpoint, path.resolve().parent.parent, module.revision)
    with writing(target):
        exported = export(module, chat, provenance, request, target)
    _report(exported, target)
    if destination is not None:
        print(f"pushed: {push(target, destination)}")


def _checkpoint_path(options: LightningArgumentParser, args: list[str]) -> Path:
    """Find the checkpoint, which decides about the model's options, before these are known."""
    config = options.parse_args([*args, "--model.base=unknown"])
    run = RunFolder.of(config)
    path = run.checkpoint(config.ckpt_path)
    if path is None:
        raise CheckpointError(f"{run.path}: there is no checkpoint; give one with --ckpt_path")
    return path


def _request(config: Namespace) -> Export:
    kind: Format = "merged" if config.merge and config.format == "peft" else config.format
    options = {key: config[key] for key in ("merge", "llama_cpp", "ollama_from")}
    return Export(kind, config.dtype, config.max_shard_size, config.push, **options)


def _destination(config: Namespace) -> Destination | None:
    if config.push is not None:
        return check_destination(config.push, config.private, overwrite=config.overwrite)
    if config.private is not None:
        raise ConfigError("--private: nothing is uploaded without --push; give --push owner/name, or leave it out")
    return None


def _check_target(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--output_dir: {target} is a file; give a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(f"--output_dir: {target} is not empty; give another folder, or --overwrite to replace it")


def _base_name(module: Phi3LoRAModule) -> str:
    if module.base_id is not None:
        return module.base_id
    name = Path(module.base).resolve().name
    rank_zero_warn(
        f"the export names its base {name!r}, after the folder: nobody else will find it; "
        "give the hub id with --model.base_id"
    )
    return name


def _chat(config: Namespace, checkpoint: dict[str, Any]) -> Chat:
    data = prompt_options(config, checkpoint)
    tokenizer = load_tokenizer(data["tokenizer"], data["revision"], data["chat_template"])
    template = ChatTemplate(tokenizer)
    chats = [Conversation([{"role": "user", "content": question}], [False]) for question in QUESTIONS]
    encoded = template.encode(chats, add_generation_prompt=True)
    prompts = [prompt.input_ids for prompt in encoded if not isinstance(prompt, BadRowError)]
    own = None if data["chat_template"] is None else str(tokenizer.chat_template)
    return Chat(data["tokenizer"], data["revision"], own, template.stop_ids, prompts)


def _report(exported: Exported, target: Path) -> None:
    certificate = exported.certificate
    table = Table(title="certificate")
    for column in (f"over {certificate.positions} positions", "largest logit difference", "KL", "same argmax"):
        table.add_column(column, justify="left" if "positions" in column else "right")
    for pair, divergence in (
        (certificate.compared, certificate.export),
        ("one rounding a layer", certificate.rounding),
        ("the adapter's own effect", certificate.adapter),
    ):
        table.add_row(pair, f"{divergence.max_logit:.3g}", f"{divergence.kl:.2g}", f"{divergence.greedy:.1%}")
    console = Console()
    console.print(table)
    console.print(f"written: {target}", highlight=False, soft_wrap=True)
    if exported.serving is not None:
        console.print(exported.serving.replace(f"={target.name} ", f"={target} "), highlight=False, soft_wrap=True)
