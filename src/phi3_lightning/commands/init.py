"""``init``: writes the shipped configurations into a folder, and one from the literals of a training script."""

import shlex
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from phi3_lightning.commands.parser import Parser
from phi3_lightning.commands.translation.script import Translation, translate
from phi3_lightning.errors import ConfigError
from phi3_lightning.files import local_path, writing
from phi3_lightning.hardware import program

DESCRIPTION = "Write the configurations that come with the package, and translate a training script into one."

PACKAGE = Path(__file__).parent.parent
RECIPES = {
    "supervised": "phi3_mini_4k_lora.yaml",
    "dpo": "phi3_mini_4k_dpo.yaml",
    "orpo": "phi3_mini_4k_orpo.yaml",
    "kto": "phi3_mini_4k_kto.yaml",
}
"""The start of a translation by its objective, of another one that of dpo; what the script leaves open is as in it."""

_ONE_LINE = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")
"""A line break in a key of the script would end the comment."""


def parser() -> LightningArgumentParser:
    """Return the parser of ``init``."""
    result = Parser(prog=f"{program()} init", description=DESCRIPTION)
    result.add_argument("folder", type=str, help="The folder to make.")
    result.add_argument(
        "--from", type=str | None, default=None,
        help="A Python script that trains with TRL. What it passes in literals to TrainingArguments, SFTConfig, "
        "DPOConfig, SFTTrainer, LoraConfig and the like becomes a configuration; it is read and never run.",
    )  # fmt: skip
    result.add_argument(
        "--overwrite", action="store_true", help="Write into a folder in use; files of the same names are replaced."
    )
    return result


def main(args: list[str]) -> None:
    """Run the command with the arguments after ``init``."""
    options = parser().parse_args(args)
    folder, source = local_path("folder", options.folder), options["from"]
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not options.overwrite:
        raise ConfigError(f"{folder} is not empty; give another folder, or --overwrite to write into it")
    if shlex.quote(str(folder)) != str(folder):
        raise ConfigError(f"{folder}: commands in the files name the folder; give one without blanks and signs")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    files = {name: _installed(text, folder) for name, text in shipped().items()}
    translation = None
    if source is not None:
        name = f"{Path(source).stem}.yaml"
        if name in files:
            raise ConfigError(f"--from: {name} is a configuration of the package; give {source} another name")
        translation = translate(local_path("--from", source))
        files[name] = render(translation, Path(source).name)
    with writing(folder):
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    console.print(f"{len(files)} files in {folder}")
    if translation is not None:
        _report(translation, folder / f"{Path(source).stem}.yaml", console)


def shipped() -> dict[str, str]:
    """Return the package's configurations, by their path in ``configs``."""
    inside = PACKAGE / "configs"  # of a wheel; in a checkout they are at its root
    root = inside if inside.is_dir() else PACKAGE.parents[1] / "configs"
    files = sorted(path for path in root.rglob("*") if path.suffix in (".yaml", ".sbatch"))
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in files}


def _installed(text: str, folder: Path) -> str:
    """Replace the paths of a checkout by those of an installed package: command, configurations, tiny model."""
    places = {
        "src/phi3_lightning/assets": (PACKAGE / "assets").as_posix(),
        "python cli.py": "phi3-lightning",
        "  cli.py fit": "  --no-python phi3-lightning fit",  # torchrun
        "configs/": f"{folder.as_posix()}/",
    }
    for checkout, installed in places.items():
        text = text.replace(checkout, installed)
    return text


def render(translation: Translation, source: str) -> str:
    """Return the translation of a script as one whole configuration in YAML, with its notes in comments at the head."""
    objective = translation.settings.get("model.objective.name", "supervised")
    config: dict[str, Any] = yaml.safe_load(shipped()[RECIPES.get(objective, RECIPES["dpo"])])
    config["model"]["lora"].pop("init_from", None)
    trainer = config["trainer"]
    trainer.pop("callbacks", None)  # TrainingArguments stop nothing early
    for path, value in translation.settings.items():
        *parents, leaf = path.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[leaf] = value
    if "val_check_interval" in trainer:  # Lightning counts batches
        trainer["val_check_interval"] *= trainer["accumulate_grad_batches"]
    missing = "".join(f" {path} is to be set here." for path in _missing(translation))
    head = [f"From {source}, by `phi3-lightning init`.{missing}"]
    if translation.notes:
        head += ["Not taken, or not as it stands there:", *(f"  {note}" for note in translation.notes)]
    comments = (f"# {line.translate(_ONE_LINE)}\n" for line in head)
    body: str = yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110)
    return "".join(comments) + body


def _missing(translation: Translation) -> list[str]:
    """The options that every run needs and the script does not have as literals."""
    return [path for path in ("model.base", "data.train") if path not in translation.settings]


def _report(translation: Translation, path: Path, console: Console) -> None:
    console.print(
        f"{path}: {len(translation.settings)} settings translated, {len(translation.notes)} arguments not taken"
    )
    for note in translation.notes:
        console.print(f"  {note}")
    first = "".join(f"set {path} and " for path in _missing(translation))
    console.print(f"{first}run: {program()} fit --config {path}")
