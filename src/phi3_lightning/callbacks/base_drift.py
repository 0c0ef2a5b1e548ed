"""How far the tuned model has moved from its base on what it was not trained on."""

from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from phi3_lightning.batch import Batch
from phi3_lightning.model.loss import CHUNK, supervised_positions
from phi3_lightning.module import Phi3LoRAModule


class BaseDrift(pl.Callback):
    """Logs, at each validation, the divergence of the tuned model from its base on general chats.

    ``base_drift/kl`` is KL(tuned || base), the mean over the supervised tokens of ``data`` of the sum over the
    vocabulary of p_tuned * (log p_tuned - log p_base), in nats; ``base_drift/loss`` is the tuned model's loss on them
    and ``base_drift/loss_change`` that minus the base's. The base answers through the same weights with the adapter
    switched off. Its predictions are computed anew each time, so that memory does not grow with ``data``.

    Args:
        data: Its validation data are the general chats; as ChatDataModule is, but not the run's own.
    """

    def __init__(self, data: pl.LightningDataModule) -> None:
        self.data = data

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        rank_zero_info("Drift from the base is measured on general chats:")
        if trainer.local_rank == 0:
            self.data.prepare_data()
        trainer.strategy.barrier()
        self.data.trainer = trainer  # by which it knows the ranks
        self.data.setup("validate")

    @override
    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking:
            return
        sums = torch.zeros(4, dtype=torch.float64, device=pl_module.device)
        for batch in self.data.val_dataloader():
            with trainer.precision_plugin.val_step_context(), pl_module.autocast():
                sums += compare(pl_module, trainer.strategy.batch_to_device(batch))
        sums = cast("Tensor", trainer.strategy.reduce(sums, reduce_op="sum"))
        divergence, tuned, base = (sums[:3] / sums[3]).float()
        for name, value in (("kl", divergence), ("loss", tuned), ("loss_change", tuned - base)):
            pl_module.log(f"base_drift/{name}", value, sync_dist=True)  # each rank has it; Lightning asks for it


def compare(module: Phi3LoRAModule, batch: Batch) -> Tensor:
    """Compare tuned and base model on a batch.

    Args:
        module: The module, in evaluation mode.
        batch: General chats.

    Returns:
        KL(tuned || base), the tuned and the base model's loss, each summed over the supervised tokens, and the number
        of these, shape (4,), float64.
    """
    tuned, labels = supervised_positions(module(batch), batch)
    with module.base_answers():
        base, _ = supervised_positions(module(batch), batch)
    sums = tuned.new_zeros(4, dtype=torch.float64)
    for tuned_part, base_part, part in zip(tuned.split(CHUNK), base.split(CHUNK), labels.split(CHUNK), strict=True):
        log_tuned = F.log_softmax(module.head(tuned_part).float(), dim=-1)
        with module.base_answers():  # the head may be adapted too
            log_base = F.log_softmax(module.head(base_part).float(), dim=-1)
        divergence = F.kl_div(log_base, log_tuned, log_target=True, reduction="sum")
        losses = [F.nll_loss(log, part, reduction="sum") for log in (log_tuned, log_base)]
        sums += torch.stack([divergence, *losses, divergence.new_tensor(len(part))])
    return sums
