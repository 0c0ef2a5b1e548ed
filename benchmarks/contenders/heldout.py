"""The loss of adapters on rows that none was trained on, by one function for all: PEFT loads them, torch sums up."""

import json
import sys

import torch
from peft import PeftModel
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from contenders.task import IGNORE_INDEX, Row, read_rows


@torch.no_grad()
def loss(model: PeftModel, rows: list[Row], device: str) -> float:
    """Return the mean loss of the supervised tokens, row by row, logits in float32."""
    total, count = 0.0, 0
    phi3 = model.get_base_model()
    for row in rows:
        ids, labels = (torch.tensor([values], device=device) for values in row)
        hidden = phi3.model(input_ids=ids, use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != IGNORE_INDEX
        logits = phi3.lm_head(hidden[:, :-1][wanted]).float()
        total += F.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum").item()
        count += int(wanted.sum())
    return total / count


def losses(base: str, rows: list[Row], adapters: dict[str, str], device: str) -> dict[str, float | None]:
    """Return the loss of each adapter, None of one that PEFT cannot load, and under the name ``""`` that of the base.

    Args:
        base: Folder of the base model.
        rows: What to judge by.
        adapters: A name and a folder in PEFT's format for each.
        device: ``cpu`` or ``cuda``.
    """
    found: dict[str, float | None] = {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device)
    for name, folder in adapters.items():
        try:
            adapted = PeftModel.from_pretrained(model, folder).eval()
        except Exception as error:  # a peer's adapter may have layers that the base lacks
            print(f"{name}: {error}", file=sys.stderr)
            found[name] = None
            continue
        with torch.autocast(device, dtype=torch.bfloat16):
            found[name] = loss(adapted, rows, device)
            if "" not in found:
                with adapted.disable_adapter():
                    found[""] = loss(adapted, rows, device)
        model = adapted.unload()
    return found


if __name__ == "__main__":
    disable_progress_bar()
    order = json.loads(sys.argv[1])
    print(json.dumps(losses(order["base"], read_rows(order["rows"]), order["adapters"], order["device"])))
