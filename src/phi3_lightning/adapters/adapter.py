"""What every backend of adapters can do."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from peft import LoraConfig
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters.targets import Target


@dataclass(frozen=True)
class PeftForm:
    """An adapter as PEFT's files hold it.

    Args:
        config: What ``adapter_config.json`` says, without the name of the base.
        tensors: What ``adapter_model.safetensors`` holds, under PEFT's keys; float32 tensors of their own, on the CPU.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]


class Adapter(Protocol):
    """Low-rank adapters on a frozen model, attached by the constructor; base weights are never written."""

    targets: list[Target]
    """The adapted layers."""
    trained_whole: list[str]
    """Paths of the modules that are trained whole beside them."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters of the adapter."""

    def lora_AB(self, target: Target) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the live ``A`` and ``B`` of a layer, shapes (rank, in) and (rows, rank), as the backend keeps them."""

    def disabled(self) -> AbstractContextManager[None]:
        """Let the model answer as its base does, while the context lasts."""

    def to_peft(self) -> PeftForm:
        """Return the adapter in the form in which PEFT, and every server that reads its files, takes it."""

    def set_lora_A(self, directions: Mapping[str, Tensor]) -> None:
        """Set each ``A`` to the first rows of what is given for its layer's path, shape (at least its rank, in)."""

    def load_peft(self, form: PeftForm, source: str) -> None:
        """Set the adapter to what PEFT's files hold; ``source`` is where they come from, for errors."""

    def detach(self) -> Phi3ForCausalLM:
        """Take the adapter's layers out of the model again, and return it, every weight as it was."""
