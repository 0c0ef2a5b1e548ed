"""Helpers that the tests of both backends share."""

import torch
from transformers import Phi3ForCausalLM

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def frozen_base(folder: str, dtype: torch.dtype = torch.float32) -> Phi3ForCausalLM:
    return Phi3ForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)


def randomise(parameters) -> None:
    """Give weights values: with the zeros that LoRA's B starts from, half of an error is hidden."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def logits_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)  # dropout
    answers = logits(model.train())
    weights = trained(model)
    gradients = torch.autograd.grad(answers.square().mean(), list(weights.values()))
    return answers.detach(), dict(zip(weights, gradients, strict=True))
