"""What a FIP trainer needs beyond its base class to train a model that FSDP2 shards over processes."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType, fully_shard

from .compatibility import fsdp_version
from .fisher.sharded import reshard, whole


class ShardedTraining:
    """A mixin for a `Trainer`. What is not sharded, or by FSDP1, is left to it."""

    @property
    def _shards(self) -> bool:
        return self.is_fsdp_enabled and fsdp_version(self.args) == 2

    def create_accelerator_and_postprocess(self) -> None:
        """As the `Trainer`'s; processes on CPU shard too, when they are told to (Accelerate would start DDP)."""
        if fsdp_version(self.args) == 2:
            # Gradients that wait for the last micro-batch would mix with those of Tr F: each is reduced at once.
            config = self.args.accelerator_config
            kept = config.gradient_accumulation_kwargs or {}
            config.gradient_accumulation_kwargs = {**kept, "sync_each_batch": True}
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if fsdp_version(self.args) == 2 and state.distributed_type == DistributedType.MULTI_CPU:
            plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            if state.mixed_precision != "no":
                plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as Accelerate does
            self.is_fsdp_enabled = True

    @property
    def _named_layers(self) -> list[str]:
        """The classes of layers that the user or the launcher named."""
        given = (self.args.fsdp_config or {}).get("transformer_layer_cls_to_wrap") or []
        return given or [n for n in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if n]

    def _shard(self) -> None:
        """Shard the model, for training or for an evaluation before it: its layers one by one, and all else together.

        Accelerate's own would put the embeddings in a group of their own, where ViT's are in one already and where
        encoder-decoder models tie them to others.
        """
        plugin, config = self.accelerator.state.fsdp_plugin, self.accelerator.parallelism_config
        layers = repeated_blocks(self.model)
        if self._named_layers:
            layers = [module for module in self.model.modules() if type(module).__name__ in self._named_layers]
        if plugin.activation_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        policy = MixedPrecisionPolicy()
        if self.accelerator.mixed_precision != "no":
            # Weights are kept in float32 and cast for the passes. Gradients are summed in float32: differences of two
            # are taken.
            policy = dataclasses.replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
            for parameter in filter(lambda parameter: parameter.requires_grad, self.model.parameters()):
                parameter.data = parameter.data.float()
        mesh = getattr(self.accelerator, "torch_device_mesh", None)
        how = {
            "mesh": None if mesh is None else mesh[tuple(config.fsdp_dim_names)],
            "mp_policy": policy,
            "offload_policy": plugin.cpu_offload,
        }
        for layer in reversed(layers):  # inner ones first
            fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **how)
        self.model_wrapped = fully_shard(self.model, **how)

    def evaluation_loop(self, *positional, **kwargs):
        if not self._shards:
            return super().evaluation_loop(*positional, **kwargs)
        if not self.accelerator._models:
            if not isinstance(self.model, FSDPModule):
                self._shard()
            self.accelerator._models.append(self.model)  # or it would be prepared, which needs an optimizer
        try:
            return super().evaluation_loop(*positional, **kwargs)
        finally:
            reshard(self.model)

    def _prepare_for_training(self, *positional, **kwargs):
        if not self._shards:
            return super()._prepare_for_training(*positional, **kwargs)
        if not isinstance(self.model, FSDPModule):
            self._shard()
        # Accelerate tells the optimizer's parameters by the address of each shard, and an empty shard has none: the
        # optimizer is made of the shards, and only it is prepared.
        self.accelerator.prepare = lambda model, optimizer: (model, self.accelerator.prepare_optimizer(optimizer))
        try:
            return super()._prepare_for_training(*positional, **kwargs)
        finally:
            del self.accelerator.prepare

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        for buffer in model.buffers() if self._shards else ():  # running statistics are the first process's, as in DDP
            dist.broadcast(buffer, src=0)
        return loss

    def create_optimizer(self, *positional, **kwargs):
        optimizer = super().create_optimizer(*positional, **kwargs)
        if self._shards:  # a model whose checkpoints lose the settings of a group without parameters
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the `Trainer`'s; of a sharded model the whole is written, but for checkpoints that are to be sharded."""
        if not self._shards:
            super().save_model(output_dir, _internal_call)
            return
        in_checkpoint = _internal_call and output_dir is not None
        if not in_checkpoint or self.accelerator.state.fsdp_plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
            state = {}
            for name, tensor in self.model.state_dict().items():  # one at a time, gathered by all processes
                tensor = whole(tensor)
                if self.args.should_save:
                    state[name] = tensor.to("cpu", copy=True)
            self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """What follows each other in the outermost lists of a model: its layers, or stages of layers."""
    found, inside = [], ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (inside and name.startswith(inside)):
            found += [block for block in module if not type(block).__module__.startswith("torch.nn.")]
            inside += (name + ".",)
    return found
