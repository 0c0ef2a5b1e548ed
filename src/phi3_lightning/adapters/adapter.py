"""The protocol of the backends."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from peft import LoraConfig
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters.targets import Target

Role = Literal["lora_A", "lora_B", "embedding", "magnitude", "modules_to_save"]
"""What a trained parameter is in an adapter: half of a linear layer's delta, either half of an embedding's, DoRA's
magnitude, or a weight of a module that is trained in full."""


@dataclass(frozen=True)
class PeftForm:
    """An adapter as PEFT's files hold it."""

    config: LoraConfig
    """What ``adapter_config.json`` says, without the name of the base."""
    tensors: dict[str, Tensor]
    """What ``adapter_model.safetensors`` holds, under PEFT's keys; float32 tensors of their own, on the CPU."""


class Adapter(Protocol):
    """Low-rank adapters on a frozen model, attached by the constructor; base weights are never written."""

    targets: list[Target]
    """The adapted layers."""
    modules_to_save: list[str]
    """Paths of the modules that are trained in full beside them."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters of the adapter."""

    def base_name(self, name: str) -> str:
        """Return the name that a frozen parameter has in the base model."""

    def role(self, name: str) -> Role | None:
        """Return what a parameter is in the adapter; None where it is no part of it."""

    def lora_AB(self, target: Target) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the live ``A`` and ``B`` of a layer, shapes (rank, in) and (rows, rank), as the backend keeps them."""

    def disabled(self) -> AbstractContextManager[None]:
        """Switch the adapter off, so that the model computes what its base does, while the context lasts."""

    def to_peft(self) -> PeftForm:
        """Return the adapter in the form of PEFT's files, which servers read as well."""

    def set_lora_A(self, directions: Mapping[str, Tensor]) -> None:
        """Set each ``A`` to the first rows of the directions of its layer's path, shape (at least its rank, in)."""

    def load_peft(self, form: PeftForm, source: str) -> None:
        """Set the adapter to the content of PEFT's files; errors name their ``source``."""

    def detach(self) -> Phi3ForCausalLM:
        """Remove the adapter's layers from the model and return it, every weight as it was."""
