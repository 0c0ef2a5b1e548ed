"""``Phi3LoRAModule``: a frozen Phi-3 with a LoRA adapter, as a LightningModule."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self, cast

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning import hub, optim
from phi3_lightning.accumulation import TokenWeightedModule
from phi3_lightning.adapters import eva
from phi3_lightning.adapters.adapter import Adapter
from phi3_lightning.adapters.coverage import Coverage, coverage
from phi3_lightning.adapters.statistics import Statistics
from phi3_lightning.adapters.targets import describe_adapter
from phi3_lightning.batch import Batch, PromptBatch
from phi3_lightning.build import Base, build, check_trainer, describe_training, detach, sharding_of
from phi3_lightning.checkpoint import resume
from phi3_lightning.checkpoint.identity import identity
from phi3_lightning.config import Generation, LoRA, Objective, Optimizer, Schedule
from phi3_lightning.config.checks import Given, plain, require, require_choice, section
from phi3_lightning.errors import CheckpointError, ModelError
from phi3_lightning.generation.decode import generate
from phi3_lightning.model import activation_checkpointing, packed_attention, precision
from phi3_lightning.model import base as base_model
from phi3_lightning.model.compile import Compilation
from phi3_lightning.model.neftune import noisy_embeddings
from phi3_lightning.objective_mixin import ObjectiveMixin
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.renamed import translated


class Phi3LoRAModule(ObjectiveMixin, TokenWeightedModule):
    """Fine-tunes any ``Phi3ForCausalLM`` with a LoRA adapter on batches of :class:`~phi3_lightning.batch.Batch`.

    Nothing is loaded before :meth:`configure_model`. Base weights stay as they are, to the bit; adapters and their
    optimiser state are float32 under every precision of the Trainer; checkpoints hold only what can change.

    Args:
        base: Folder or hub id of the base model, or owner/name@revision; in a script also a loaded one, used as it is.
        base_id: Name of the base that adapters record; null: the hub id, never a local path.
        revision: Branch, tag or commit of the base on the hub, where base names none.
        init: 'pretrained', or 'random' weights from config.json alone, for smoke tests and benchmarks.
        dtype: Type of the base weights, and of the matrix products where the Trainer's precision names none.
        attn_implementation: Attention kernel; 'auto' is 'documents', attention within documents that needs no mask:
            torch's flash attention on a GPU, products by blocks on a CPU. A loaded model keeps its own.
        quantization: Keep the base in 4 bits ('nf4', QLoRA) or 8 bits ('int8'), with the extra qlora; 'int8_dynamic'
            computes in 8 bits too, faster than in bfloat16 on a CPU with AVX-512 VNNI. null: in dtype.
        neftune_noise_alpha: Strength of NEFTune's noise on the embeddings in training, often 5; null: none.
        gradient_checkpointing: What the backward pass computes again: 'none', nothing (fastest); a number n, every n-th
            layer; 'selective', all but products and attention; 'full', each layer; 'offload', the same with what is
            kept in the host's memory (least of a GPU's). 'auto' takes the fastest with which the largest batch fits; a
            script needs callbacks.AutoCheckpointing in its Trainer for that, and has 'full' without it.
        torch_compile: 'layers' trains with compiled decoder layers, a third faster on a GPU after half a minute;
            'none' with plain ones. 'auto' compiles on a GPU in a long run without DoRA and quantisation.
        lora: The adapter.
        optimizer: How the adapter is updated.
        schedule: How the learning rate moves.
        generation: How 'predict' writes answers.
        objective: What a batch teaches.
    """

    def __init__(
        self,
        base: str | Phi3ForCausalLM,
        base_id: str | None = None,
        revision: str | None = None,
        init: base_model.Initialisation = "pretrained",
        dtype: base_model.DType = "bfloat16",
        attn_implementation: base_model.Attention = "auto",
        quantization: base_model.Quantization | None = None,
        neftune_noise_alpha: float | None = None,
        gradient_checkpointing: activation_checkpointing.Checkpointing = "auto",
        torch_compile: Compilation = "auto",
        lora: Given[LoRA] = LoRA(),
        optimizer: Given[Optimizer] = Optimizer(),
        schedule: Given[Schedule] = Schedule(),
        generation: Given[Generation] = Generation(),
        objective: Given[Objective] = Objective(),
    ) -> None:
        super().__init__()
        if (alpha := neftune_noise_alpha) is not None:
            require(alpha > 0, "model.neftune_noise_alpha", alpha, "above 0, or null for none")
        activation_checkpointing.check(gradient_checkpointing)
        require_choice("model.torch_compile", torch_compile, Compilation)
        name = base if isinstance(base, str) else str(base.name_or_path)
        self.base, self.revision = hub.split_revision("model.base", name, revision, "model.revision")
        self.base_id = base_id or (None if Path(self.base).exists() else self.base or None)
        self.init = init
        self.dtype_name = dtype
        self.quantization = quantization
        self.neftune_noise_alpha = neftune_noise_alpha
        self.gradient_checkpointing = gradient_checkpointing
        self.compilation = torch_compile
        self.lora = section(LoRA, lora)
        self.optimizer_config = section(Optimizer, optimizer)
        self.schedule = section(Schedule, schedule)
        self.generation = section(Generation, generation)
        self.set_objective(section(Objective, objective))
        model = None if isinstance(base, str) else base
        self._base = Base(self.base, self.base_id, self.revision, init, dtype, attn_implementation, quantization, model)
        options = {
            "neftune_noise_alpha": neftune_noise_alpha,
            "gradient_checkpointing": gradient_checkpointing,
            "torch_compile": torch_compile,
            "lora": {**plain(self.lora), "init_from": None},  # a checkpoint holds what it started from already
            "optimizer": plain(self.optimizer_config),
            "schedule": plain(self.schedule),
            "generation": plain(self.generation),
            "objective": plain(self.objective),
        }
        self.save_hyperparameters(self._base.hyper_parameters() | options)
        self.model: Phi3ForCausalLM | None = None
        self.adapter: Adapter | None = None
        self._fingerprint = ""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's, also for checkpoints whose options had other names."""
        return super().load_from_checkpoint(translated(checkpoint_path), *args, **kwargs)

    def check_base(self, *, restored: bool = False) -> None:
        """Raise what :meth:`configure_model` would raise, without loading a weight or reading a restored adapter."""
        self._base.check(replace(self.lora, init_from=None) if restored else self.lora)

    def spec(self) -> RunSpec:
        """Return what decides how much memory and time training takes, under the Trainer if there is one."""
        spec = self._base.spec(self.lora, self.optimizer_config, self.gradient_checkpointing, self.objective)
        return spec if self._trainer is None else spec.under(self._trainer)

    def configure_model(self) -> None:
        """Load the frozen base and attach the adapter; does nothing the second time.

        Raises:
            CheckpointError: If ``lora.init_from`` cannot be read, or is another adapter than the section describes.
            ModelError: If the base is no ``Phi3ForCausalLM``, or a target names no layer of it.
        """
        if self.model is None:
            sharding = sharding_of(self._trainer, self._base, self.lora, self.optimizer_config, self.objective)
            options = self.gradient_checkpointing, self.device, sharding
            built = self.start_from(self.lora, lambda lora: build(self._base, lora, *options))
            self.model, self.adapter, self._fingerprint = built
            self.keep_reference(self.lora)

    def detach_adapter(self) -> Phi3ForCausalLM:
        """Return the base model, without the adapter and bit-identical to what was loaded; the module loses both.

        Raises:
            ModelError: If the base is sharded, so that no rank holds all of it.
        """
        model = detach(*self._configured())
        self.model = self.adapter = None
        return model

    def _configured(self) -> tuple[Phi3ForCausalLM, Adapter]:
        if self.model is None or self.adapter is None:
            raise ModelError("the base model is not loaded yet: call configure_model() first")
        if self.start_error is not None:
            raise CheckpointError(self.start_error)
        return self.model, self.adapter

    @property
    def loaded_model(self) -> Phi3ForCausalLM:
        """The model with its adapter, once :meth:`configure_model` has run."""
        return self._configured()[0]

    @property
    def head(self) -> nn.Module:
        """Maps hidden states to logits over the vocabulary."""
        return cast("nn.Module", self._configured()[0].lm_head)

    def base_answers(self) -> AbstractContextManager[None]:
        """Return a context in which the adapter is off, so that the model answers as its base does."""
        return self._configured()[1].disabled()

    def adapter_statistics(self) -> Statistics:
        """Return what measures the adapter's LoRA deltas and gradients, slice by slice."""
        return Statistics(*self._configured())

    @property
    def learning_rate(self) -> float:
        """The highest learning rate of the schedule, which Lightning's learning-rate finder reads and sets."""
        return self.optimizer_config.lr

    @learning_rate.setter
    def learning_rate(self, lr: float) -> None:
        self.optimizer_config = replace(self.optimizer_config, lr=lr)
        self.hparams["optimizer"]["lr"] = lr

    def coverage(self) -> list[Coverage]:
        """Return what is adapted, by kind of layer or slice."""
        return coverage(*self._configured())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Phi3LoRAModule":
        convert = precision.converting_frozen_alone(self, fn)
        return cast("Phi3LoRAModule", super()._apply(convert, recurse))  # type: ignore[no-untyped-call]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of matrix products: the Trainer's precision, or else the type of the base weights."""
        return precision.autocast(self._configured()[0], self.device.type)

    def setup(self, stage: str) -> None:
        """Refuse a device, a strategy, a precision or an optimiser that cannot train the adapter."""
        super().setup(stage)
        check_trainer(self.trainer, self.gradient_checkpointing, self._base, self.optimizer_config, stage)

    def on_fit_start(self) -> None:
        """Put the model into training mode, which loading and predicting may have left, and compile its layers."""
        super().on_fit_start()
        model = self.loaded_model.train()
        with self.trainer.precision_plugin.train_step_context(), self.autocast():
            rank_zero_info(describe_training(model, self.trainer, self.compilation, dora=self.lora.use_dora))

    def on_train_start(self) -> None:
        """Apply the present configuration to what a checkpoint has restored: learning rate, decay, betas."""
        super().on_train_start()
        if type(self).configure_optimizers is Phi3LoRAModule.configure_optimizers:  # a subclass may bring its own
            scheduler = self.trainer.lr_scheduler_configs[0].scheduler
            optim.apply_config_to_restored_optimizer(self.trainer.optimizers[0], scheduler, self.optimizer_config)
        if self.lora.init_lora_weights == "eva" and self.trainer.ckpt_path is None:
            with self.autocast():
                eva.initialize(*self._configured(), self.trainer, packed_attention.in_one_row, self)

    def forward(self, batch: Batch) -> Tensor:
        """Return the last hidden states, shape (rows, length, hidden size), of documents that do not see each other."""
        model, _ = self._configured()
        packed_attention.check_lengths(batch["document_lengths"], model.config, self.base)
        alpha = self.neftune_noise_alpha if model.training else None
        shared = packed_attention.shared_lengths(model, batch)
        with noisy_embeddings(model.get_input_embeddings(), batch["document_lengths"], alpha, shared):
            return packed_attention.last_hidden_state(model, batch)

    def compute_loss(self, hidden: Tensor, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses, a float32 scalar with a graph, and the weight of the batch, a scalar.

        Override it to train another loss. Sum and weight, not a mean, make the gradient independent of how a window is
        split into batches. ``hidden`` has the shape (rows, length, hidden size); full logits are ``head(hidden)``;
        labels are unshifted, and position t predicts token t + 1. The weight is the number of supervised tokens, or of
        pairs with a preference objective, or of answers with KTO.
        """
        return self.objective_loss(self._configured()[1], hidden, head, batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the micro-batch; :meth:`backward` weights it by its tokens."""
        resume.seed_by_position(self.current_epoch, batch_idx, self.global_rank)
        with self.autocast():
            loss_sum, count = self.compute_loss(self(batch), self.head, batch)
        self.measure_training(loss_sum, count)
        return self.weighted_mean(loss_sum, count, list(dict.fromkeys(chain.from_iterable(batch["document_ids"]))))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics of ``val/``: of tokens, or with a preference objective of preferences."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to the metrics of ``test/``; return the hidden states, from which a report measures documents."""
        return self._evaluate("test", batch)

    def _evaluate(self, stage: Literal["val", "test"], batch: Batch) -> Tensor:
        with self.autocast():
            hidden: Tensor = self(batch)
            loss_sum, count = self.compute_loss(hidden, self.head, batch)
            metrics = self.val_metrics if stage == "val" else self.test_metrics
            self.measure_evaluation(metrics, loss_sum, count, hidden, self.head, batch)
        metrics.log(self.log, stage)
        return hidden

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[list[int]]:
        """Return the token ids of each prompt's answer, up to and including the token that ended it."""
        with self.autocast():
            return generate(self._configured()[0], batch, self.generation)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimiser and the learning-rate schedule of the run."""
        role = self._configured()[1].role
        trained = [(role(name), parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        optimizer = optim.make_optimizer(trained, self.optimizer_config, fused=optim.may_fuse(self.trainer))
        scheduler = optim.make_schedule(optimizer, self.schedule, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> set[str]:
        """Besides the frozen parameters, buffers: rotary angles follow from the configuration and the batch."""
        return super()._ddp_params_and_buffers_to_ignore | {name for name, _ in self.named_buffers()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, adapter or optimiser before anything of it is used."""
        super().on_load_checkpoint(checkpoint)
        optim.prepare_states(checkpoint.get("optimizer_states", []), self.optimizer_config, self._trainer)

    def checkpoint_identity(self) -> dict[str, Any]:
        """Return what ties a checkpoint to its base model and its adapter."""
        adapter = describe_adapter(self.lora, self._configured()[1].targets)
        return identity(self.base_id, self._fingerprint, **adapter, revision=self.revision)
