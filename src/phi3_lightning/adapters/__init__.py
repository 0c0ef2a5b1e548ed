"""Trainable low-rank adapters on a frozen model."""

from collections.abc import Callable
from importlib.util import find_spec

from transformers import Phi3ForCausalLM

from phi3_lightning.adapters import init_from, modules_to_save, targets
from phi3_lightning.adapters.adapter import Adapter
from phi3_lightning.adapters.init_from import check_origin as check_origin
from phi3_lightning.adapters.peft_backend import PeftAdapter
from phi3_lightning.config import LoRA
from phi3_lightning.errors import CheckpointError, ModelError

__all__ = ["attach", "check"]


def attach(model: Phi3ForCausalLM, config: LoRA, *, base: str | None = None) -> Adapter:
    """Attach an adapter to a frozen model, whose target layers are changed in place.

    ``base`` is the model's name, on which the adapter of ``config.init_from`` must have been trained.

    Raises:
        ModelError: If a target does not exist, cannot carry an adapter, or the library is missing.
        CheckpointError: If ``config.init_from`` cannot be read, or is another adapter than ``config`` asks for.
    """
    adapter = _backend(config)(model, config)
    if config.init_from is not None:
        try:
            init_from.load_into(adapter, model, config, base)
        except CheckpointError:
            adapter.detach()
            raise
    return adapter


def check(model: Phi3ForCausalLM, config: LoRA, *, base: str | None = None) -> None:
    """Raise what :func:`attach` would raise, as far as a model without weights (or on the meta device) tells."""
    _backend(config)
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ModelError("model.base: the model carries an adapter already; detach it first (detach_adapter)")
    modules_to_save.find_modules(model, config, targets.resolve(model, config))
    init_from.read_config(config, base)


def _backend(config: LoRA) -> Callable[[Phi3ForCausalLM, LoRA], Adapter]:
    if config.backend == "peft":
        return PeftAdapter
    if find_spec("loralib") is None:
        raise ModelError("model.lora.backend: loralib is not installed: pip install 'phi3-lightning[loralib]'")
    from phi3_lightning.adapters.loralib_backend import LoralibAdapter  # an extra

    return LoralibAdapter
