"""``Phi3LoRAModule``: a frozen Phi-3 with a LoRA adapter, as a LightningModule."""

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, cast, get_args

import numpy as np
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_lightning import adapters, optim
from phi3_lightning.accumulation import TokenWeightedModule
from phi3_lightning.adapters import eva, targets
from phi3_lightning.adapters.adapter import Adapter
from phi3_lightning.adapters.coverage import Coverage, coverage
from phi3_lightning.adapters.statistics import Statistics
from phi3_lightning.batch import Batch, PromptBatch
from phi3_lightning.checkpoint import averaging
from phi3_lightning.checkpoint.identity import identity
from phi3_lightning.checkpoint.mixin import TrainableStateMixin
from phi3_lightning.config import Generation, LoRA, Optimizer, Schedule
from phi3_lightning.config.checks import Given, require, require_choice, section
from phi3_lightning.distributed.fsdp2 import FSDP2Strategy, check_shardable, check_strategy
from phi3_lightning.distributed.sharding import Sharding, build_placeholder_model, load_sharded_weights, shard
from phi3_lightning.errors import CheckpointError, ModelError, Phi3LightningError
from phi3_lightning.generation.decode import generate
from phi3_lightning.hardware import check_accelerator
from phi3_lightning.metrics import TokenMetrics
from phi3_lightning.model import activation_checkpointing, loss, packed_attention, precision
from phi3_lightning.model import base as base_model
from phi3_lightning.model.compile import Compilation, choose_compilation, uncompile_layers
from phi3_lightning.model.neftune import noisy_embeddings
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.renamed import translated


class Phi3LoRAModule(TokenWeightedModule, TrainableStateMixin):
    """Fine-tunes any ``Phi3ForCausalLM`` with a LoRA adapter on batches of :class:`~phi3_lightning.batch.Batch`.

    Nothing is loaded before :meth:`configure_model`. Base weights stay as they are, to the bit; adapters and their
    optimiser state are float32 under every precision of the Trainer; checkpoints hold what can change and nothing else.

    Args:
        base: Folder or hub id of the base model; in a script also a loaded model, which is used as it is.
        base_id: Name of the base that adapters record; null: the hub id, never a local path.
        revision: Branch, tag or commit of the base on the hub.
        init: 'pretrained', or 'random' weights from config.json alone, for smoke tests and benchmarks.
        dtype: Type of the base weights, and of the matrix products where the Trainer's precision names none.
        attn_implementation: Attention kernel; 'auto' is 'documents', attention within documents that needs no mask:
            torch's flash attention for all of them on a GPU, else sdpa for one at a time. A loaded model keeps its own.
        quantization: Keep the base in 4 bits ('nf4', QLoRA) or 8 bits ('int8'); needs the extra qlora. null: in dtype.
        neftune_noise_alpha: Strength of NEFTune's noise on the embeddings in training, often 5; null: none.
        gradient_checkpointing: What the backward pass computes again: 'none', nothing (fastest); a number n, every n-th
            layer; 'selective', all but products and attention; 'full', each layer; 'offload', the same with what is
            kept in the host's memory (least of a GPU's). 'auto' takes the fastest with which the largest batch fits; a
            script needs callbacks.AutoCheckpointing in its Trainer for that, and has 'full' without it.
        torch_compile: 'layers' trains with compiled decoder layers, a third faster on a GPU after half a minute;
            'none' with plain ones. 'auto' compiles on a GPU where the run is long enough, without DoRA and
            quantisation.
        lora: The adapter.
        optimizer: How the adapter is updated.
        schedule: How the learning rate moves.
        generation: How 'predict' writes answers.
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
    ) -> None:
        super().__init__()
        require_choice("model.init", init, base_model.Initialisation)
        require_choice("model.dtype", dtype, base_model.DType)
        require_choice("model.attn_implementation", attn_implementation, base_model.Attention)
        if quantization is not None:
            require_choice("model.quantization", quantization, base_model.Quantization)
        activation_checkpointing.check(gradient_checkpointing)
        require_choice("model.torch_compile", torch_compile, Compilation)
        self.base = base if isinstance(base, str) else str(base.name_or_path)
        self.base_id = base_id or (None if Path(self.base).exists() else self.base or None)
        self.revision = revision
        self.init = init
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.quantization = quantization
        if neftune_noise_alpha is not None:
            require(
                neftune_noise_alpha > 0, "model.neftune_noise_alpha", neftune_noise_alpha, "above 0, or null for none"
            )
        self.neftune_noise_alpha = neftune_noise_alpha
        self.gradient_checkpointing = gradient_checkpointing
        self.compilation = torch_compile
        self.lora = section(LoRA, lora)
        self.optimizer_config = section(Optimizer, optimizer)
        self.schedule = section(Schedule, schedule)
        self.generation = section(Generation, generation)
        self.save_hyperparameters(self._plain_hyper_parameters())

        self.model: Phi3ForCausalLM | None = None
        self.adapter: Adapter | None = None
        self._loaded_base = None if isinstance(base, str) else [base]  # in a list: not a submodule yet
        self._fingerprint: str | None = None
        self.val_metrics = TokenMetrics()
        self.test_metrics = TokenMetrics()

    def _plain_hyper_parameters(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "base_id": self.base_id,
            "revision": self.revision,
            "init": self.init,
            "dtype": self.dtype_name,
            "attn_implementation": self.attn_implementation,
            "quantization": self.quantization,
            "neftune_noise_alpha": self.neftune_noise_alpha,
            "gradient_checkpointing": self.gradient_checkpointing,
            "torch_compile": self.compilation,
            "lora": {**asdict(self.lora), "init_from": None},  # a checkpoint holds what it started from already
            "optimizer": {**asdict(self.optimizer_config), "betas": list(self.optimizer_config.betas)},
            "schedule": asdict(self.schedule),
            "generation": asdict(self.generation),
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's, also for checkpoints whose options had other names.

        Args:
            checkpoint_path: The file.
            *args: As in Lightning.
            **kwargs: As in Lightning.

        Returns:
            A module with the options and the adapter of the checkpoint.
        """
        return super().load_from_checkpoint(translated(checkpoint_path), *args, **kwargs)

    # ------------------------------------------------------------------ the model

    def check_base(self) -> None:
        """Find what would stop :meth:`configure_model`, without loading a weight.

        Raises:
            CheckpointError: If ``lora.init_from`` describes no adapter that can be used.
            ModelError: If the base is no ``Phi3ForCausalLM``, or a target names no layer of it.
        """
        model = base_model.skeleton(self.base_config()) if self._loaded_base is None else self._loaded_base[0]
        adapters.check(model, self.lora, base=self.base_id)

    def base_config(self) -> Phi3Config:
        """Return a configuration of the base that is the caller's own.

        Raises:
            ModelError: If the base is no ``Phi3ForCausalLM``.
        """
        if self._loaded_base is None:
            return base_model.read_config(self.base, self.revision)
        return copy.deepcopy(self._loaded_base[0].config)

    def spec(self) -> RunSpec:
        """Return what decides how much memory and time training takes, under the Trainer if there is one.

        Raises:
            ModelError: If the base is no ``Phi3ForCausalLM``.
        """
        config = self.base_config()
        own = config._attn_implementation if self._loaded_base else self.attn_implementation
        spec = RunSpec(
            base=self.base,
            config=config,
            dtype=self.dtype_name,
            attn_implementation=own if own in get_args(base_model.Attention) else "auto",
            quantization=self.quantization,
            lora=self.lora,
            optimizer=self.optimizer_config,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return spec if self._trainer is None else spec.under(self._trainer)

    def configure_model(self) -> None:
        """Load the frozen base and attach the adapter; does nothing the second time.

        Raises:
            CheckpointError: If ``lora.init_from`` cannot be read, or is another adapter than the section describes.
            ModelError: If the base is no ``Phi3ForCausalLM``, or a target names no layer of it.
        """
        if self.model is not None:
            return
        if any(hasattr(module, "lora_A") for loaded in self._loaded_base or [] for module in loaded.modules()):
            raise ModelError("model.base: the model carries an adapter already; detach it first (detach_adapter)")
        self.check_base()
        sharding = self._sharding()
        model = self._load_base() if sharding is None else self._hollow_base(sharding)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            adapter = adapters.attach(model.requires_grad_(False), self.lora, base=self.base_id)
            self._settle(model, adapter, sharding)
        except Phi3LightningError:
            for parameter in trainable:  # a model that a script has loaded stays as it was
                parameter.requires_grad_(True)
            raise
        self.adapter = adapter
        self.model = model.train()

    def _settle(self, model: Phi3ForCausalLM, adapter: Adapter, sharding: Sharding | None) -> None:
        """Prepare a model with its adapter for training; the adapter is off it again where it is of another base."""
        base_model.keep_as_quantized(model)
        mode = self.gradient_checkpointing  # 'auto' is decided by a callback, when the batches are known
        activation_checkpointing.checkpoint_activations(model, "full" if mode == "auto" else mode)
        if sharding is not None:
            shard(model, sharding)
            load_sharded_weights(model, sharding, self.init, self.base, self.revision)
        self._fingerprint = base_model.fingerprint(model)
        try:
            adapters.check_origin(self.lora, self._fingerprint)
        except CheckpointError:
            if sharding is None:
                activation_checkpointing.checkpoint_activations(model, "none")
                adapter.detach()
            raise

    def _load_base(self) -> Phi3ForCausalLM:
        if self._loaded_base is not None:
            return self._loaded_base[0]
        return base_model.load(
            self.base,
            revision=self.revision,
            init=self.init,
            dtype=self.dtype_name,
            attn_implementation=self.attn_implementation,
            quantization=self.quantization,
            device=self.device,
        )

    def _sharding(self) -> Sharding | None:
        strategy = None if self._trainer is None else self._trainer.strategy
        if not isinstance(strategy, FSDP2Strategy):
            return None
        check_shardable(self._loaded_base is not None, self.quantization, self.lora, self.optimizer_config)
        averaging.check_averaging(self.trainer)  # which asks for the model before setup
        return strategy.sharding()

    def _hollow_base(self, sharding: Sharding) -> Phi3ForCausalLM:
        attention = base_model.choose_attention(self.attn_implementation, sharding.device)
        return build_placeholder_model(
            self.base, self.revision, getattr(torch, self.dtype_name), attention, sharding.device
        )

    def detach_adapter(self) -> Phi3ForCausalLM:
        """Give the base model back, without the adapter and bit-identical to what was loaded.

        Returns:
            The base model. The module holds none afterwards.

        Raises:
            ModelError: If the base is sharded over ranks, and none has it whole.
        """
        model, adapter = self._ready()
        if any(isinstance(parameter, DTensor) for parameter in adapter.parameters()):
            raise ModelError("detach_adapter: FSDP2 has sharded the base; load the checkpoint on one process for it")
        activation_checkpointing.checkpoint_activations(model, "none")
        uncompile_layers(model)
        self.model = self.adapter = None
        return adapter.detach()

    def _ready(self) -> tuple[Phi3ForCausalLM, Adapter]:
        if self.model is None or self.adapter is None:
            raise ModelError("the base model is not loaded yet: call configure_model() first")
        return self.model, self.adapter

    @property
    def loaded_model(self) -> Phi3ForCausalLM:
        """The model with its adapter; a ModelError before :meth:`configure_model`."""
        return self._ready()[0]

    @property
    def head(self) -> nn.Module:
        """Maps hidden states to logits over the vocabulary."""
        return cast("nn.Module", self._ready()[0].lm_head)

    def base_answers(self) -> AbstractContextManager[None]:
        """Return a context in which the model answers as its base does, the adapter switched off."""
        return self._ready()[1].disabled()

    def adapter_statistics(self) -> Statistics:
        """Return what measures the adapter's updates and gradients, slice by slice."""
        return Statistics(*self._ready())

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
        return coverage(*self._ready())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Phi3LoRAModule":
        frozen = {id(parameter) for parameter in self.parameters() if not parameter.requires_grad}

        def keep_dtype(tensor: Tensor) -> Tensor:
            # 'bf16-true' converts the whole module: bfloat16 would lose LoRA's updates, rotary angles and token counts
            moved = fn(tensor)
            return moved if id(tensor) in frozen or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return cast("Phi3LoRAModule", super()._apply(keep_dtype, recurse))  # type: ignore[no-untyped-call]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of matrix products: the Trainer's precision, or else the type of the base weights."""
        return precision.autocast(self._ready()[0], self.device.type)

    # ------------------------------------------------------------------ steps

    def setup(self, stage: str) -> None:
        """Refuse a device, a strategy or a precision that cannot train the adapter.

        Raises:
            ConfigError: If the Trainer's device, strategy or precision does not fit.
        """
        super().setup(stage)
        check_accelerator(self.trainer.strategy.root_device.type)
        check_strategy(self.trainer.strategy)
        require(
            self.gradient_checkpointing != "offload" or self.trainer.strategy.root_device.type == "cuda",
            "model.gradient_checkpointing",
            self.gradient_checkpointing,
            "a CPU keeps everything in the host's memory anyway; use full",
        )
        precision = self.trainer.precision
        require(
            precision not in ("16-true", "transformer-engine-float16"),
            "trainer.precision",
            precision,
            "float16 without loss scaling loses gradients; use bf16-mixed, or 16-mixed on a GPU without bfloat16",
        )
        require(
            self.dtype_name != "float16" or precision == "16-mixed" or stage != "fit",
            "model.dtype",
            self.dtype_name,
            f"it needs trainer.precision: 16-mixed, which scales the loss, and not {precision}; or use bfloat16",
        )

    def on_fit_start(self) -> None:
        """Put the model into training mode, in which loading and predicting do not leave it, and compile its layers."""
        super().on_fit_start()
        model, _ = self._ready()
        model.train()
        with self.trainer.precision_plugin.train_step_context(), self.autocast():
            micro_batches = self.trainer.estimated_stepping_batches * self.trainer.accumulate_grad_batches
            layers = choose_compilation(model, self.compilation, micro_batches, dora=self.lora.use_dora)
            attention = packed_attention.describe(model)
        mode = activation_checkpointing.mode_of(model)
        rank_zero_info(f"attention: {attention}; layers: {layers}; gradient checkpointing: {mode}")

    def on_train_start(self) -> None:
        """Let the configuration decide over what a checkpoint has restored: learning rate, decay, betas."""
        super().on_train_start()
        if type(self).configure_optimizers is Phi3LoRAModule.configure_optimizers:  # a subclass may bring its own
            scheduler = self.trainer.lr_scheduler_configs[0].scheduler
            if isinstance(scheduler, LambdaLR):  # and not that of Lightning's learning-rate finder
                optim.apply_config_to_restored_optimizer(self.trainer.optimizers[0], scheduler, self.optimizer_config)
        if self.lora.init_lora_weights == "eva" and self.trainer.ckpt_path is None:
            self._initialize_from_data()

    def _initialize_from_data(self) -> None:
        model, adapter = self._ready()
        strategy, loader = self.trainer.strategy, cast("DataLoader[Batch]", self.trainer.train_dataloader)

        def batches() -> Iterator[Batch]:
            return (packed_attention.in_one_row(strategy.batch_to_device(batch)) for batch in loader)

        with self.autocast():
            found = eva.eva_directions(model, adapter, batches, len(loader), self)
        adapter.set_lora_A(strategy.broadcast(found))  # all ranks alike, whatever rows each has seen

    def forward(self, batch: Batch) -> Tensor:
        """Run the model up to its head.

        Args:
            batch: Rows of one or more documents, which do not see each other.

        Returns:
            Last hidden states, shape (rows, length, hidden size).
        """
        model, _ = self._ready()
        packed_attention.check_lengths(batch["document_lengths"], model.config, self.base)
        if self.neftune_noise_alpha is None or not model.training:
            return packed_attention.last_hidden_state(model, batch)
        with noisy_embeddings(model.get_input_embeddings(), batch["document_lengths"], self.neftune_noise_alpha):
            return packed_attention.last_hidden_state(model, batch)

    def compute_loss(self, hidden: Tensor, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the token losses and the number of tokens; override it to train another loss.

        Sum and count, not a mean, make the gradient independent of how a window is split into batches. Full logits
        are ``head(hidden)``; labels are unshifted, and position t predicts token t + 1.

        Args:
            hidden: Last hidden states, shape (rows, length, hidden size).
            head: Maps hidden states to logits.
            batch: The batch.

        Returns:
            The sum of the losses, a float32 scalar with a graph, and the weight of the batch, a scalar.
        """
        return loss.cross_entropy(hidden, head, batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the micro-batch; :meth:`backward` weights it by its tokens."""
        self._seed(batch_idx)
        with self.autocast():
            loss_sum, count = self.compute_loss(self(batch), self.head, batch)
        return self.weighted_mean(
            loss_sum, count, [document_id for row in batch["document_ids"] for document_id in row]
        )

    def _seed(self, batch_idx: int) -> None:
        """Seed dropout by position in the run, so that a restart needs no random state."""
        run_seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        position = [run_seed, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0]))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to ``val/loss``, ``val/perplexity`` and ``val/token_accuracy``."""
        self._evaluate("val", self.val_metrics, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to ``test/loss``, ``test/perplexity`` and ``test/token_accuracy``.

        Returns:
            Last hidden states, shape (rows, length, hidden size), from which a report measures each document.
        """
        return self._evaluate("test", self.test_metrics, batch)

    def _evaluate(self, stage: str, metrics: TokenMetrics, batch: Batch) -> Tensor:
        with self.autocast():
            hidden: Tensor = self(batch)
            loss_sum, count = self.compute_loss(hidden, self.head, batch)
            correct, supervised = loss.correct_tokens(hidden, self.head, batch)
        metrics.update(loss_sum, torch.as_tensor(count), correct, supervised)
        self.log(f"{stage}/loss", metrics.loss, prog_bar=True)
        self.log(f"{stage}/perplexity", metrics.perplexity)
        self.log(f"{stage}/token_accuracy", metrics.token_accuracy)
        return hidden

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[list[int]]:
        """Answer a batch of prompts.

        Returns:
            The token ids of each answer, up to and including the token that ended it.
        """
        with self.autocast():
            return generate(self._ready()[0], batch, self.generation)

    # ------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimiser and the learning-rate schedule of the run."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        # Lightning refuses to clip under AMP where the optimiser might unscale by itself, as fused ones can
        clipped_amp = isinstance(self.trainer.precision_plugin, MixedPrecision) and bool(self.trainer.gradient_clip_val)
        optimizer = optim.make_optimizer(named, self.optimizer_config, fused=not (clipped_amp or self.scales_loss()))
        scheduler = optim.make_schedule(optimizer, self.schedule, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> set[str]:
        """Nor the model's buffers: rotary angles, which follow from the configuration and the batch."""
        return super()._ddp_params_and_buffers_to_ignore | {name for name, _ in self.named_buffers()}

    # ------------------------------------------------------------------ checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or adapter before anything of it is used.

        Raises:
            CheckpointError: If the checkpoint does not belong to this module.
        """
        super().on_load_checkpoint(checkpoint)
        optim.name_groups(checkpoint.get("optimizer_states", []))

    def checkpoint_identity(self) -> dict[str, Any]:
        """Return what ties a checkpoint to its base model and its adapter."""
        adapted = self._ready()[1].targets
        lora = {**asdict(self.lora), "slices": targets.partial(adapted)}
        layers = Counter(target.name for target in adapted)
        return identity(self.base_id, cast("str", self._fingerprint), lora, layers, self.revision)
