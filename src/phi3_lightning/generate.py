"""From prompts to answers, in batches."""

from typing import Any

import torch
from transformers import GenerationConfig, Phi3ForCausalLM

from phi3_lightning.batch import PromptBatch
from phi3_lightning.config import Generation


@torch.inference_mode()
def answers(model: Phi3ForCausalLM, batch: PromptBatch, config: Generation) -> list[list[int]]:
    """Generate one answer a prompt.

    Args:
        model: The model, with or without adapters.
        batch: Left-padded prompts; ``stop_ids`` end an answer.
        config: Length and sampling.

    Returns:
        The token ids of each answer, up to and including the stop token; without one where the answer was cut at
        ``config.max_new_tokens``, or at the model's window.
    """
    training = model.training
    model.eval()
    sampling: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p} if config.do_sample else {}
    prompt_length = batch["input_ids"].shape[1]
    room = model.config.max_position_embeddings - prompt_length
    try:
        sequences = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=GenerationConfig(
                max_new_tokens=max(1, min(config.max_new_tokens, room)),
                do_sample=config.do_sample,
                eos_token_id=batch["stop_ids"],
                pad_token_id=batch["stop_ids"][0],  # what follows a stop token is cut off below
                use_cache=True,
                **sampling,
            ),
        )
    finally:
        model.train(training)
    return [_until_stop(sequence, batch["stop_ids"]) for sequence in sequences[:, prompt_length:].tolist()]


def _until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    end = next((position + 1 for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
