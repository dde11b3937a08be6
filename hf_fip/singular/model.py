"""The tuner: which layers of a model are adapted, what is trained with them, what is saved and how it is loaded."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from contextlib import contextmanager

import torch
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, NoMatchingPeftModuleError
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key
from torch import nn
from tqdm.auto import tqdm

from .config import ALL, SingularValueConfig, SingularValueType
from .decomposition import decompose
from .kinds import has_derived_weight, layer_class_of, why_not
from .layer import Basis, SingularValueLayer

_BATCH_NUMBERS = 2**21  # of the weights that are decomposed in one call, in float64 and with as much again beside
_SLOW_NUMBERS = 2**22  # weights beyond it are worth a progress bar
_OTHER_WEIGHTS = {torch.float16: 3e-2, torch.bfloat16: 3e-2}  # how far σ may be off, of the largest
RUNNING_NORMS = (nn.modules.batchnorm._NormBase,)  # BatchNorm and InstanceNorm


class SingularValueModel(BaseTuner):
    """
    A model whose singular values are shifted: Fast FIP's adapter, made by `get_peft_model` or `FIPTrainer`.

    BatchNorm layers that are not trained (`train_norms`, `modules_to_save`) run on their received statistics in train
    mode too: an adapter could neither save nor take back statistics that moved. The fast path of
    `nn.TransformerEncoder`, which reads weights past their layers, is switched off.

    Source: Karim et al., *Fisher Information guided Purification against Backdoor Attacks*, CCS 2024, Fast FIP.
    """

    prefix = "singular_delta"
    tuner_layer_cls = SingularValueLayer
    target_module_mapping: dict = {}

    # ---- Making ----

    def inject_adapter(self, model, adapter_name, *args, state_dict=None, **kwargs) -> None:
        # A state dict, when there is one, says which layers are adapted in place of the config.
        ends = "." + self.prefix
        self._named_by_state_dict = state_dict and {key.rsplit(ends, 1)[0] for key in state_dict if ends in key}
        # PEFT's low_cpu_mem_usage: by this argument, or by a context in which new parameters have no memory.
        new = nn.ParameterList([nn.Parameter(torch.empty(0))])
        self._is_filled_later = kwargs.get("low_cpu_mem_usage", False) or new[0].is_meta
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        self._hold_batch_norms()
        _leave_fast_paths(model)

    def _prepare_adapter_config(self, peft_config: SingularValueConfig, model_config: dict) -> SingularValueConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = ALL
        return peft_config

    def _prepare_model(self, peft_config: SingularValueConfig, model: nn.Module) -> None:
        """Settle the names in the config, refuse what cannot be adapted, and decompose the weights."""
        if peft_config.train_norms:
            norms = [name for name, module in _own_modules(model) if is_norm(module)]
            peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), *norms})
        means_all = peft_config.target_modules == ALL
        if means_all:
            peft_config.target_modules = _exactly(_supported(model), model)
        targets = self._targets(peft_config, model)
        if not targets and not peft_config.exclude_modules and peft_config.target_modules != DUMMY_TARGET_MODULES:
            known = ", ".join(_supported(model)[:3]) or "none that can be adapted"
            raise NoMatchingPeftModuleError(
                f"Target modules {peft_config.target_modules} not found in the base model (its layers: {known}, …): "
                "set target_modules to 'all', names, ends of names, or a regular expression."
            )
        if means_all and targets and peft_config.rank is not None:
            _give_small_layers_their_own_rank(peft_config, targets)
        ranks = {name: _rank_of(peft_config, name, layer) for name, layer in targets.items()}
        self._bases = self._make_bases(peft_config, model, targets, ranks)

    def _targets(self, peft_config: SingularValueConfig, model: nn.Module) -> dict[str, nn.Module]:
        """The layers to adapt, by name, each unwrapped from the adapters it has."""
        targets, inside = {}, []
        for name, module in model.named_modules():
            if not name or any(name.startswith(outer) for outer in inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside.append(name + ".")
            if self._named_by_state_dict is None:
                wanted = self._check_target_module_exists(peft_config, name)
            else:
                wanted = name in self._named_by_state_dict
            if wanted:
                targets[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
                reason = why_not(targets[name])
                if reason:
                    raise ValueError(f"{name} cannot get a singular-value adapter: {reason}.")
        return targets

    def _make_bases(self, peft_config, model, targets, ranks) -> dict[str, Basis]:
        """The factors of each target: an earlier adapter's where they are the same, else decomposed by shape."""
        bases, groups = {}, defaultdict(list)
        for name, layer in targets.items():
            rank, there = ranks[name], model.get_submodule(name)
            if self._is_filled_later and peft_config.save_basis:
                bases[name] = _empty_basis(layer_class_of(layer).matrix_of(layer), rank)
                continue
            if isinstance(there, SingularValueLayer) and not peft_config.save_basis:
                same = (basis for basis in there.basis.values() if basis.rank == rank)
                bases[name] = next(same, None)
            if bases.get(name) is None:
                matrix = layer_class_of(layer).matrix_of(layer)
                groups[matrix.shape, matrix.dtype, matrix.device, rank].append(name)
        numbers = sum(torch.Size(key[0]).numel() * len(names) for key, names in groups.items())
        bar = tqdm(
            total=sum(map(len, groups.values())),
            desc="Decomposing weights",
            unit="layer",
            leave=False,
            disable=None if numbers > _SLOW_NUMBERS else True,
        )
        with bar:
            for (shape, _, _, rank), names in groups.items():
                at_once = max(1, _BATCH_NUMBERS // shape.numel())
                for start in range(0, len(names), at_once):
                    part = names[start : start + at_once]
                    bases.update(zip(part, _decompose_all(targets, part, rank), strict=True))
                    bar.update(len(part))
        return bases

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **_) -> None:
        basis = self._bases.pop(current_key)
        if isinstance(target, SingularValueLayer):
            target.update_layer(adapter_name, basis, peft_config)
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer = layer_class_of(base_layer)(target)
        layer.set_adapter(self.active_adapters if isinstance(self.active_adapter, list) else [self.active_adapter])
        layer.update_layer(adapter_name, basis, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        if isinstance(child, SingularValueLayer):  # unloaded: the layer as received, which may have no `weight`
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # ---- Use ----

    def train(self, mode: bool = True) -> SingularValueModel:
        super().train(mode)
        self._hold_batch_norms()
        return self

    def _hold_batch_norms(self) -> None:
        for module in _frozen_batch_norms(self.model):
            module.eval()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        if safe_merge:
            self._check_finite(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge and safe_merge:
            self._check_finite(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        """Before the first layer is merged, so that no model is left half merged."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, SingularValueLayer) and not layer.merges_to_finite(adapter_names):
                raise ValueError(f"NaNs detected in the merged weights of {name}: nothing was merged.")

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        shared = _shared_weights(self.model)
        for name in self.targeted_module_names:
            layer = self.model.get_submodule(name)
            if isinstance(layer, SingularValueLayer) and any(id(p) in shared for p in layer.base_layer.parameters()):
                raise ValueError(
                    f"{name} cannot be merged: another layer has the same weight and would change with it. "
                    "Exclude it (`exclude_modules`), or load the model with its embeddings untied."
                )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        # PEFT would leave `adapter_names` out in silence, and give every row the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names`, an adapter for each row, is not supported by singular-value adapters: call "
                "`set_adapter`, and the model once for each adapter."
            )
        yield

    # ---- Files ----

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.save_basis:
            # Adapters that share a basis would share its memory, which safetensors refuses to write.
            return {key: tensor.clone() for key, tensor in entries.items()}
        return {key: tensor for key, tensor in entries.items() if not key.endswith((".u", ".vt"))}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_fit(model, remapped, adapter_name)
        return remapped


def register() -> None:
    """Make the method known to PEFT: `get_peft_model`, `PeftModel.from_pretrained`, `PeftConfig.from_pretrained`."""
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[SingularValueType.SINGULAR_VALUE] = SingularValueConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[SingularValueType.SINGULAR_VALUE] = SingularValueModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[SingularValueType.SINGULAR_VALUE] = SingularValueModel.prefix


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer with weights of its own; transformers' own are told by their name."""
    kinds = (*RUNNING_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    named = type(module).__name__.lower().endswith(("layernorm", "rmsnorm", "layernorm2d"))
    return (isinstance(module, kinds) or named) and any(True for _ in module.parameters(recurse=False))


def _own_modules(model: nn.Module):
    """The model's modules as received, with their names: none of those that adapters brought."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        yield name, module
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            inside += (name + ".",)


def _supported(model: nn.Module) -> list[str]:
    """The layers that `"all"` means: those that can be adapted and have a weight of their own."""
    shared, found, inside = _shared_weights(model), [], ()
    for name, module in _own_modules(model):
        if not name or isinstance(module, ModulesToSaveWrapper) or (inside and name.startswith(inside)):
            continue
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if layer_class_of(layer) is None or has_derived_weight(layer) or _is_fixed_table(layer):
            continue
        if not any(id(p) in shared for p in layer.parameters()):
            found.append(name)
            inside += (name + ".",)  # an attention layer's own projections
    return found


def _is_fixed_table(layer: nn.Module) -> bool:
    """Whether these are sines of positions: transformers' own, told by their name, run without gradients."""
    return isinstance(layer, nn.Embedding) and "sinusoidal" in type(layer).__name__.lower()


def _exactly(found: list[str], model: nn.Module) -> set[str] | str:
    """These layers as `target_modules`: names, which PEFT takes for ends of names too, or a regular expression."""
    names, ends = {*found}, tuple("." + name for name in found)
    if any(name.endswith(ends) for name, _ in model.named_modules() if name not in names):
        return "|".join(map(re.escape, found))
    return names


def _shared_weights(model: nn.Module) -> set[int]:
    """The ids of the parameters that stand in more than one place, such as tied embeddings."""
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    places = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
    adapters = {id(p) for m in model.modules() if isinstance(m, Basis) for p in m.parameters()}
    return {key for key, count in places.items() if count > 1} - adapters


def _full_rank(layer: nn.Module) -> int:
    return min(layer_class_of(layer).matrix_of(layer).shape[-2:])


def _rank_of(peft_config: SingularValueConfig, name: str, layer: nn.Module) -> int:
    own = _full_rank(layer)
    pattern = _rank_pattern_of(peft_config, name)
    rank = peft_config.rank if pattern is None else peft_config.rank_pattern[pattern]
    if rank is not None and rank > own:
        raise ValueError(
            f"{name} has {own} singular values, and rank={rank} of them were asked for: lower `rank`, or give this "
            f"layer its own by rank_pattern={{{name!r}: {own}}}."
        )
    return own if rank is None else rank


def _give_small_layers_their_own_rank(peft_config: SingularValueConfig, targets: dict[str, nn.Module]) -> None:
    """Under `"all"` a layer that has fewer singular values than `rank` shifts all of its own."""
    own = {name: _full_rank(layer) for name, layer in targets.items()}
    if peft_config.rank > max(own.values()):
        raise ValueError(f"rank={peft_config.rank} is larger than that of every layer: lower it.")
    small = {name: rank for name, rank in own.items() if rank < peft_config.rank}
    unnamed = {name: rank for name, rank in small.items() if _rank_pattern_of(peft_config, name) is None}
    new = {"^" + re.escape(name): rank for name, rank in unnamed.items()}
    peft_config.rank_pattern = {**peft_config.rank_pattern, **new}


def _rank_pattern_of(peft_config: SingularValueConfig, name: str) -> str | None:
    """The key of `rank_pattern` that a layer matches."""
    key = get_pattern_key(peft_config.rank_pattern, name)
    return key if key in peft_config.rank_pattern else None


def _empty_basis(matrix: torch.Tensor, rank: int) -> Basis:
    """Factors on the meta device, whose place those of a file take."""
    *stack, m, n = matrix.shape
    kind = {"dtype": torch.promote_types(matrix.dtype, torch.float32), "device": "meta"}
    return Basis(*(torch.empty(*stack, *shape, **kind) for shape in ((m, rank), (rank,), (rank, n))))


def _decompose_all(targets: dict[str, nn.Module], names: list[str], rank: int) -> list[Basis]:
    matrices = torch.stack([layer_class_of(targets[name]).matrix_of(targets[name]).detach() for name in names])
    try:
        u, sigma, vt = decompose(matrices, rank)
    except ValueError as error:
        raise ValueError(f"{', '.join(names)} cannot be decomposed: {error}") from error
    return [Basis(*(part.clone() for part in parts)) for parts in zip(u, sigma, vt, strict=True)]


def _frozen_batch_norms(model: nn.Module):
    """BatchNorm layers whose statistics must stand still: all but the copies that an adapter trains."""
    trained = set()
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            trained.update(id(module) for copy in wrapper.modules_to_save.values() for module in copy.modules())
    return [m for m in model.modules() if isinstance(m, RUNNING_NORMS) and id(m) not in trained]


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep torch's encoder layers that hold an adapted layer from reading the weights past it."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        if any(isinstance(inner, SingularValueLayer) for inner in module.modules()):
            module.use_nested_tensor = False  # of the encoder
            module.activation_relu_or_gelu = 0  # of its layers


def _check_fit(model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Raise ValueError when an adapter's file was made for another model."""
    way_out = "Load it on the model it was made for (`base_model_name_or_path` in adapter_config.json)."
    own = model.state_dict()
    ours = {key: tensor for key, tensor in state_dict.items() if ".singular_delta" in key or ".basis." in key}
    foreign = sorted(key for key in ours if key not in own)
    if foreign:
        raise ValueError(
            f"The adapter {adapter_name!r} was made for another model: {len(foreign)} of its tensors have no place in "
            f"this one, among them {foreign[0]}. {way_out}"
        )
    for key, tensor in ours.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"The adapter {adapter_name!r} was made for another model: {key} has the shape {tuple(tensor.shape)}, "
                f"and this model's {tuple(own[key].shape)}. {way_out}"
            )
        if key.endswith(".sigma"):
            name = key[: key.index(".basis.")]
            layer = model.get_submodule(name)
            matrix = layer.matrix_of(layer.get_base_layer()).detach()
            now, then = own[key], tensor.to(matrix.device).float()
            u, vt = (ours.get(key.removesuffix("sigma") + side) for side in ("u", "vt"))
            if u is not None and vt is not None:  # σ along the directions of the file
                now = ((u.to(matrix.device).float().mT @ matrix.float()) * vt.to(matrix.device).float()).sum(-1)
            elif now.device.type == "meta":
                raise ValueError(
                    f"The file of the adapter {adapter_name!r} lacks U and V of {name}: load it without "
                    "low_cpu_mem_usage=True."
                )
            allowed = _OTHER_WEIGHTS.get(matrix.dtype, 1e-3) * then.max()
            if not ((now.float() - then).abs() <= allowed).all():
                raise ValueError(
                    f"The adapter {adapter_name!r} was made for other weights: the singular values of {name} are not "
                    f"those it shifts. {way_out}"
                )
