"""The layers of Fast FIP: a frozen weight whose singular values are shifted, W' = U diag(ReLU(σ + s ∘ δ)) Vᵀ.

Written as W' = W + U diag(d) Vᵀ with d = ReLU(σ + s ∘ δ) − σ, which is W itself, bit for bit, while δ is zero. Two
ways to compute y = x W'ᵀ, whichever takes fewer multiplications for the rows at hand:

    by the weight       W' is made once (m·n·r, kept until a shift changes) and used as the layer uses any weight
    by the activations  y = x Wᵀ + ((x V) ∘ d) Uᵀ, or, with all singular values at hand, y = ((x V) ∘ ReLU(…)) Uᵀ
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .config import SingularValueConfig


class Basis(nn.Module):
    """The frozen factors of one weight: U `(…, m, r)`, σ `(…, r)`, Vᵀ `(…, r, n)`; adapters may share it."""

    def __init__(self, u: Tensor, sigma: Tensor, vt: Tensor):
        super().__init__()
        # Not by `setattr`: in PEFT's low_cpu_mem_usage that would throw the numbers away.
        for name, tensor in (("u", u), ("sigma", sigma), ("vt", vt)):
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    @property
    def rank(self) -> int:
        return self.sigma.shape[-1]

    @property
    def is_complete(self) -> bool:
        """Whether these are all the singular values there are."""
        return self.rank == min(self.u.shape[-2], self.vt.shape[-1])


class _ShiftedWeight(torch.autograd.Function):
    """W + U diag(d) Vᵀ, or the same number for number when it was made before (`made`)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, shift: Tensor, u: Tensor, vt: Tensor, made: Tensor | None) -> Tensor:
        return _shifted(weight, shift, u, vt) if made is None else made.view_as(made)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, u, vt, _ = inputs
        ctx.save_for_backward(u, vt)

    @staticmethod
    def backward(ctx, gradient):
        u, vt = ctx.saved_tensors
        if gradient.is_sparse:  # an embedding with `sparse=True`
            gradient = gradient.to_dense()
        shift = None
        if ctx.needs_input_grad[1]:
            with torch.autocast(gradient.device.type, enabled=False):
                shift = ((u.mT @ gradient.to(u.dtype)) * vt).sum(-1)
        return gradient if ctx.needs_input_grad[0] else None, shift, None, None, None


def _shifted(weight: Tensor, shift: Tensor, u: Tensor, vt: Tensor) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):  # small shifts would be rounded away
        return (weight.to(u.dtype) + (u * shift.unsqueeze(-2)) @ vt).to(weight.dtype)


class SingularValueLayer(nn.Module, BaseTunerLayer):
    """What the adapted layers have in common. Subclasses say what the weight matrix is and how it acts.

    Attributes:
        base_layer: the layer as received.
        singular_delta: δ of each adapter, `(r,)`.
        basis: U, σ, Vᵀ of each adapter.
        scale: factor of δ of each adapter.
        relative: whether the δ of each adapter are shares of σ.
        floor: share of σ that `lift` leaves each adapter.
    """

    adapter_layer_names = ("singular_delta",)
    other_param_names = ("basis", "scale", "relative", "floor")
    sizes = ("in_features", "out_features")  # what the layer calls them
    by_activations = True  # whether this kind of layer knows that way

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.singular_delta = nn.ParameterDict({})
        self.basis = nn.ModuleDict({})
        self.scale: dict[str, float] = {}
        self.relative: dict[str, bool] = {}
        self.floor: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._received: Tensor | None = None  # the weight, while another is merged into its place
        self._made: tuple[tuple, Tensor] | None = None  # what W' was made of, and W'
        self.in_features, self.out_features = (getattr(self.get_base_layer(), name) for name in self.sizes)

    # ---- What kinds of layer differ in ----

    @staticmethod
    def matrix_of(base_layer: nn.Module) -> Tensor:
        """The weight as `(…, m, n)`: m outputs, n inputs."""
        raise NotImplementedError

    @staticmethod
    def replace_matrix(base_layer: nn.Module, matrix: Tensor) -> None:
        """Put another matrix in the weight's place, in new memory."""
        raise NotImplementedError

    @staticmethod
    def weights_of(base_layer: nn.Module) -> tuple[Tensor, ...]:
        """The parameters that the matrix is made of."""
        return (base_layer.weight,)

    def by_weight(self, matrix: Tensor, *args, **kwargs) -> Any:
        """The layer's output with `matrix` for its weight."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> int:
        """How many rows the weight is applied to."""
        raise NotImplementedError

    def project(self, x: Tensor, vt: Tensor) -> Tensor:
        """x V: the input by singular direction, before any bias."""
        raise NotImplementedError

    def expand(self, h: Tensor, values: Tensor, u: Tensor, bias: Tensor | None) -> Tensor:
        """(h ∘ values) Uᵀ + bias."""
        raise NotImplementedError

    def is_standard(self, base_layer: nn.Module) -> bool:
        """Whether calling the layer does what its kind does: no forward of its own, no hooks."""
        raise NotImplementedError

    # ---- Adapters ----

    def update_layer(self, adapter_name: str, basis: Basis, config: SingularValueConfig) -> None:
        """Add an adapter, or replace the one of that name."""
        delta = torch.zeros_like(basis.sigma)
        if not config.init_weights:
            delta = 0.1 * torch.randn_like(basis.sigma)
            if not config.relative:
                delta *= basis.sigma.detach().mean()
        self.basis[adapter_name] = basis
        self.scale[adapter_name] = config.scale
        self.relative[adapter_name] = config.relative
        self.floor[adapter_name] = config.floor
        # In the weight's type, as PEFT expects it: it makes float32 of it unless `autocast_adapter_dtype=False`.
        self.singular_delta[adapter_name] = nn.Parameter(delta.to(self.weights_of(self.get_base_layer())[0].dtype))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # To its device; not, as PEFT's own, to its type: U and V rounded to half precision are no basis of W.
        device = device or self.matrix_of(self.get_base_layer()).device
        if self.singular_delta[adapter_name].device.type != "meta":
            self.singular_delta[adapter_name] = self.singular_delta[adapter_name].to(device)
        if self.basis[adapter_name].sigma.device.type != "meta":
            self.basis[adapter_name].to(device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._made = None

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._made = None

    def shift(self, adapter_name: str) -> Tensor:
        """d = ReLU(σ + s ∘ δ) − σ, `(…, r)`."""
        return self.singular_values(adapter_name) - self.basis[adapter_name].sigma

    def singular_values(self, adapter_name: str) -> Tensor:
        """Those of W': ReLU(σ + s ∘ δ), `(…, r)`; s is `scale`, or `scale` · σ when δ is `relative`."""
        sigma = self.basis[adapter_name].sigma
        step = self.scale[adapter_name] * self.singular_delta[adapter_name]
        return F.relu(sigma + (sigma * step if self.relative[adapter_name] else step))

    @torch.no_grad()
    def lift(self) -> None:
        """Take shifts that went below the floor back to it, after a training step: σ + s ∘ δ ≥ floor · σ."""
        for name, delta in self.singular_delta.items():
            if delta.requires_grad and self.floor[name] > 0:
                sigma = self.basis[name].sigma
                whole = torch.ones_like(sigma) if self.relative[name] else sigma
                lowest = (self.floor[name] - 1) * whole / self.scale[name]
                torch.maximum(delta, lowest.to(delta.dtype), out=delta)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """W' − W, in the shape of the matrix."""
        basis = self.basis[adapter_name]
        return (basis.u * self.shift(adapter_name).unsqueeze(-2)) @ basis.vt

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W' in the place of W, which is kept for `unmerge`.

        Raises:
            ValueError: with `safe_merge`, when W' is not finite; nothing is then changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.singular_delta]
        if not names:
            return
        matrix = self.matrix_of(self.get_base_layer()).detach()
        merged = self._merged(matrix, names)
        if safe_merge and not torch.isfinite(merged).all():
            broken = ", ".join(names)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken.")
        if self._received is None:
            self._received = matrix
        self.replace_matrix(self.get_base_layer(), merged)
        self.merged_adapters.extend(names)
        self._made = None

    def _merged(self, matrix: Tensor, names: list[str]) -> Tensor:
        """The matrix with the shifts of these adapters."""
        for name in names:
            matrix = _shifted(matrix, self.shift(name).detach(), self.basis[name].u, self.basis[name].vt)
        return matrix

    def merges_to_finite(self, adapter_names: list[str] | None = None) -> bool:
        """Whether `merge` would give finite weights."""
        names = [name for name in adapter_names or self.active_adapters if name in self.singular_delta]
        return bool(torch.isfinite(self._merged(self.matrix_of(self.get_base_layer()).detach(), names)).all())

    def unmerge(self) -> None:
        """Put the received weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        now = self.matrix_of(self.get_base_layer())
        self.replace_matrix(self.get_base_layer(), self._received.to(now.device, now.dtype))
        self._received = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    # ---- Forward ----

    def forward(self, *args, **kwargs) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        names = [name for name in self.active_adapters if name in self.singular_delta]
        if self.merged or not names:
            return self.base_layer(*args, **kwargs)
        if self.by_activations and len(args) == 1 and not kwargs and self._is_cheaper_by_activations(args[0], names):
            return self._by_activations(args[0], names)
        return self.by_weight(self._weight(names), *args, **kwargs)

    def _is_cheaper_by_activations(self, x: Tensor, names: list[str]) -> bool:
        """Multiplications of a forward and backward pass, or of a forward pass alone, counted both ways."""
        base_layer = self.get_base_layer()
        if not self.is_standard(base_layer):
            return False
        learning = torch.is_grad_enabled() and any(self.singular_delta[name].requires_grad for name in names)
        if not learning and self._made_of(names):
            return False
        return self._has_fewer_multiplications(x, names, learning)

    def _has_fewer_multiplications(self, x: Tensor, names: list[str], learning: bool) -> bool:
        """Whether the way by the activations has, when W' has to be made for the other."""
        m, n = self.matrix_of(self.get_base_layer()).shape[-2:]
        rank = sum(self.basis[name].rank for name in names)
        return cheaper_by_activations(self.rows(x), m, n, rank, self._is_factored(names), learning)

    def _is_factored(self, names: list[str]) -> bool:
        """Whether U, σ and V stand for the weight by themselves, which then takes no part in the forward pass."""
        weight, basis = self.matrix_of(self.get_base_layer()), self.basis[names[0]]
        # In half precision they do not give the weight back.
        exact = basis.is_complete and basis.u.dtype == weight.dtype and weight.dtype.itemsize >= 4
        return len(names) == 1 and exact and not weight.requires_grad

    def _by_activations(self, x: Tensor, names: list[str]) -> Tensor:
        base_layer = self.get_base_layer()
        if self._is_factored(names):
            basis = self.basis[names[0]]
            values = self.singular_values(names[0])
            return self.expand(self.project(x, basis.vt), values, basis.u, getattr(base_layer, "bias", None))
        y = self.base_layer(x)
        for name in names:
            basis = self.basis[name]
            h = self.project(x.to(basis.vt.dtype) if x.is_floating_point() else x, basis.vt)
            y = y + self.expand(h, self.shift(name), basis.u, None).to(y.dtype)
        return y

    def _weight(self, names: list[str]) -> Tensor:
        """W' as a function of δ; made anew only when something it is made of has changed."""
        made = self._made[1] if self._made_of(names) else None
        shifted = self.matrix_of(self.get_base_layer())
        for place, name in enumerate(names):
            basis = self.basis[name]
            last = made if place == len(names) - 1 else None
            shifted = _ShiftedWeight.apply(shifted, self.shift(name), basis.u, basis.vt, last)
        if made is None and not _is_traced(shifted):
            deltas = [self.singular_delta[name].detach().clone() for name in names]
            self._made = (self._weight_state(names), deltas, self._origins(names)), shifted.detach()
        return shifted

    def _made_of(self, names: list[str]) -> bool:
        """Whether the W' that is kept was made of these adapters as they are now.

        Told by the numbers: whoever writes to `.data` leaves no other trace.
        """
        deltas = [self.singular_delta[name].detach() for name in names]
        if self._made is None or any(map(_is_traced, deltas)):
            return False
        if self._made[1].is_inference() and not torch.is_inference_mode_enabled():
            return False  # autograd does not take what `torch.inference_mode` made
        state, made_of, _ = self._made[0]
        return state == self._weight_state(names) and all(map(torch.equal, made_of, deltas))

    def _weight_state(self, names: list[str]) -> tuple:
        """What tells one base weight, and one set of adapters but for their δ, from another."""
        scales = tuple((name, self.scale[name], self.relative[name]) for name in names)
        return scales, tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in self._origins(names))

    def _origins(self, names: list[str]) -> list[Tensor]:
        """What W' is made of but for δ. Kept with it, so that no other tensor gets the same address meanwhile."""
        weights = self.weights_of(self.get_base_layer())
        return [tensor.detach() for tensor in (*weights, *(self.basis[name].u for name in names))]

    def _apply(self, fn, recurse=True):
        self._made = None  # `.to(…)` would leave the memory it holds behind
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_made": None}  # not worth its place in a file or a copy

    def __repr__(self) -> str:
        return "singular." + super().__repr__()


def cheaper_by_activations(rows: int, m: int, n: int, rank: int, factored: bool, learning: bool) -> bool:
    """Whether y = x W'ᵀ takes clearly fewer multiplications on the activations than by making W' `(m, n)`.

    Within a tenth of each other, making W' is preferred: the other way keeps x V for the backward pass.

    Args:
        rows: of x.
        factored: whether U, σ and V replace the weight altogether (or are added to what it gives).
        learning: whether a backward pass follows, which doubles most of it and needs the gradient of δ.
    """
    passes = 2 if learning else 1
    activations = passes * rows * (rank * (m + n) + (0 if factored else m * n))
    weight = rows * m * n * (3 if learning else 1) + passes * m * n * rank
    return activations < 0.9 * weight


def _is_traced(tensor: Tensor) -> bool:
    """Whether a tensor stands for others (`torch.func`, `torch.compile`), so that its numbers cannot be looked at."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
