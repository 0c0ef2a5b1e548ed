"""Options, metrics and callbacks that were renamed after version 0.0; version 0.2 drops this file and its calls."""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from phi3_lightning.errors import ConfigError

OPTIONS = {
    "data.role": "data.role_column",
    "data.roles": "data.role_map",
    "data.content": "data.content_column",
    "data.order": "data.order_column",
    "data.conversation_id": "data.conversation_column",
    "data.weights": "data.mixture",
    "data.overlong": "data.truncation",
    "model.compile": "model.torch_compile",
    "model.lora.adapter": "model.lora.init_from",
    "monitor.forgetting": "monitor.base_drift",
}
"""The new key path of each old one."""

METRICS = {
    "forgetting/": "base_drift/",
    "speed/peak_share": "speed/mfu",
    "speed/padding_share": "speed/padding_fraction",
    "speed/row_fill": "speed/packing_efficiency",
}
"""The new prefix of metric names for each old one."""

CALLBACKS = {"Forgetting": "BaseDrift"}
"""The new prefix of the keys of callbacks' states for each old one."""


def check_keys(section: str, names: Iterable[str]) -> None:
    """Refuse old keys in a section such as ``model.lora``.

    Raises:
        ConfigError: If an option has another name now.
    """
    for name in names:
        if new := OPTIONS.get(f"{section}.{name}"):
            raise ConfigError(f"{section}.{name}: it is called {new} now; use that name")


def check_metric(option: str, name: str | None) -> None:
    """Refuse the old name of a metric, as the value of an option.

    Raises:
        ConfigError: If the metric has another name now.
    """
    if name is not None and (new := _renamed(name, METRICS)) != name:
        raise ConfigError(f"{option}: {name!r} is called {new} now; use that name")


def translate(checkpoint: dict[str, Any]) -> bool:
    """Rename the old keys of a checkpoint in place; return whether it had any."""
    changed = False
    for key, section in (("hyper_parameters", "model"), ("datamodule_hyper_parameters", "data")):
        if isinstance(options := checkpoint.get(key), Mapping) and (new := _section(options, section)) != options:
            checkpoint[key], changed = new, True
    for key in ("callbacks", "callback_options"):
        states = checkpoint.get(key, {})
        for state_key in [name for name in states if _renamed(name, CALLBACKS) != name]:
            states[_renamed(state_key, CALLBACKS)] = states.pop(state_key)
            changed = True
        for state in states.values():
            if isinstance(state, dict) and isinstance(metric := state.get("monitor"), str):
                state["monitor"] = _renamed(metric, METRICS)
                changed |= state["monitor"] != metric
    return changed


def translated(path: Any) -> Any:
    """Return ``path`` for ``load_from_checkpoint``, or a buffer with new names where its checkpoint has old ones."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not translate(checkpoint):
        return path
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return buffer


def _section(options: Mapping[str, Any], path: str) -> dict[str, Any]:
    result = {}
    for name, value in options.items():
        key = f"{path}.{name}"
        inner = any(old.startswith(f"{key}.") for old in OPTIONS) and isinstance(value, Mapping)
        result[OPTIONS.get(key, key).removeprefix(f"{path}.")] = _section(value, key) if inner else value
    return result


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
