"""What ties a checkpoint to its base and its adapter, and how it is checked; pure functions on dictionaries."""

from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from phi3_lightning.config.lora import STRUCTURAL_LORA_KEYS
from phi3_lightning.errors import CheckpointError

FORMAT_VERSION = 2
"""Version 1 has no revision, tokenizer, template, layers and packages; :func:`read_identity` migrates it."""

IDENTITY = "phi3_lightning"
"""Key of the identity block."""

PACKAGES = ("phi3-lightning", "torch", "lightning", "transformers", "peft")

FIXED = (*STRUCTURAL_LORA_KEYS, "slices")
"""Keys of the LoRA section that decide which weights exist and how they are scaled; others may change."""

NEW_RUN = "start a new run, from these weights with model.lora.init_from, or configure the module as it was"

Mismatch = Literal["refuse", "warn"]


def identity(
    base: str | None,
    fingerprint: str,
    lora: Mapping[str, Any],
    layers: Mapping[str, int],
    revision: str | None = None,
) -> dict[str, Any]:
    """Return the block that ties a checkpoint to its base, by a name that is never a local path, and its adapter."""
    return {
        "format_version": FORMAT_VERSION,
        "base": base,
        "revision": revision,
        "fingerprint": fingerprint,
        "lora": dict(lora),
        "layers": dict(layers),
        "tokenizer": None,
        "template": None,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a folder of sources
        return "unknown"


def read_identity(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity block of a checkpoint, migrated where an older version wrote it.

    Raises:
        CheckpointError: If the checkpoint is of another origin, or of a version that this package does not know.
    """
    block = checkpoint.get(IDENTITY)
    if block is None:
        raise CheckpointError(
            "the checkpoint was not written by phi3_lightning: it has no identity block. Adapters of other origin "
            "start a new run: give them as model.lora.init_from"
        )
    if block["format_version"] == 1:
        unknown = dict.fromkeys(("revision", "layers", "tokenizer", "template"))
        return {**block, **unknown, "format_version": FORMAT_VERSION, "packages": {}}
    if block["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {block['format_version']}, and this package reads 1 to "
            f"{FORMAT_VERSION}: it was written by phi3-lightning {block.get('packages', {}).get('phi3-lightning')}, "
            "use that one or a newer one"
        )
    return dict(block)


def check_identity(checkpoint: Mapping[str, Any], present: Mapping[str, Any], on_mismatch: Mismatch = "refuse") -> None:
    """Refuse a checkpoint that was written for another base, tokenizer or adapter than the module has, or warn of it.

    What either block lacks is not compared, as in a checkpoint of an older version or without a datamodule.
    """
    problems = _differences(read_identity(checkpoint), present)
    if problems and on_mismatch == "refuse":
        raise CheckpointError("; ".join(problems))
    for problem in problems:
        rank_zero_warn(f"{problem}. It is loaded all the same, as checkpoint.on_mismatch: warn asks for")


def _differences(former: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    problems = [problem] if (problem := changed_base(former, present)) else []
    for key, where in (("tokenizer", "data.tokenizer"), ("template", "data.chat_template")):
        if None not in (former[key], present[key]) and former[key] != present[key]:
            problems.append(
                f"the checkpoint was trained with another {key} ({former[key][:12]}) than this one "
                f"({present[key][:12]}), which makes other tokens of the same chat; set {where} as it was"
            )
    if changes := changed_adapter(former, present):
        problems.append(f"the checkpoint holds another adapter: {changes}; {NEW_RUN}")
    return problems


def changed_base(former: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Describe how two bases differ; empty where their weights are the same."""
    if former["fingerprint"] == present["fingerprint"]:
        return ""
    return (
        f"the checkpoint belongs to another base model: it was trained on {_base(former)}, and model.base is "
        f"{_base(present)}; set model.base, revision, dtype and quantization as they were"
    )


def changed_adapter(former: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Describe how two adapters differ; empty where the same weights have the same effect in both."""
    changed = [key for key in FIXED if (former["lora"].get(key) or None) != (present["lora"].get(key) or None)]
    changes = [f"{key} is {present['lora'].get(key)} and was {former['lora'].get(key)}" for key in changed]
    if former["layers"] is not None and former["layers"] != present["layers"]:
        changes.append(f"target_modules adapts {_layers(present)} and adapted {_layers(former)}")
    return f"model.lora.{', '.join(changes)}" if changes else ""


def _base(block: Mapping[str, Any]) -> str:
    revision = "" if block["revision"] is None else f" at {block['revision']}"
    return f"{block['base'] or 'a local folder'}{revision} ({block['fingerprint'][:12]})"


def _layers(block: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} in {count} layers" for name, count in block["layers"].items()) or "nothing"


def plain_name(name: str) -> str:
    """Return the name of a tensor without what :func:`torch.compile` inserts where it wraps a module."""
    return name.replace("_orig_mod.", "")


def without_frozen(state: Mapping[str, Tensor], frozen: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors that training can change: neither frozen parameters nor scales of quantised ones."""
    return {name: tensor for name, tensor in state.items() if _of_parameter(name) not in frozen}


def _of_parameter(name: str) -> str:
    """The parameter that a tensor belongs to: bitsandbytes saves weight.absmax and the like, SCB and weight_format."""
    owner, _, last = name.rpartition(".")
    if last in ("SCB", "weight_format"):
        return f"{owner}.weight"
    layer, inside, _ = name.partition(".weight.")
    return f"{layer}.weight" if inside else name


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a state dictionary with a tensor that is missing, unexpected, of another shape, or not finite."""
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems += [f"{name} is not finite" for name in state if name in expected and not state[name].isfinite().all()]
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"the checkpoint does not fit the adapter: {listed}. Hint: {NEW_RUN}")


def check_moments(optimizer_states: list[dict[str, Any]]) -> None:
    """Refuse optimiser states with NaN or infinity, which would destroy the weights at the first step."""
    broken = [
        f"{name} of parameter {index}"
        for states in optimizer_states
        for index, moments in states["state"].items()
        for name, value in moments.items()
        if isinstance(value, Tensor) and not value.isfinite().all()
    ]
    if broken:
        raise CheckpointError(
            f"the checkpoint's optimiser state is not finite ({', '.join(broken[:5])}); give another one, such as "
            "best.ckpt beside it"
        )
