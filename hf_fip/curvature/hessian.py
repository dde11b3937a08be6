"""Products of the loss Hessian with vectors: H v, H = ∇²L(θ), without ever holding H.

    double_backward     H v = ∇⟨∇L(θ), v⟩                                           exact
    finite_difference   H v ≈ (∇L(θ + ε v/‖v‖) − ∇L(θ − ε v/‖v‖)) · ‖v‖ / (2 ε)     first-order passes only

`auto` takes the first and falls back to the second where an operation of the model has no second derivative. Scaled
dot product attention runs on its MATH kernel, which has one. Finite differences also see the kinks of ReLU and max
pooling that a step of ε crosses.

Why own code: hessian-eigenthings and curvlinops sum over neither processes nor unequal batches, end when memory is
short, and fail on SDPA attention; both are what the tests and `benchmarks/curvature_cost.py` compare this with.
Source: Pearlmutter, *Fast Exact Multiplication by the Hessian*, Neural Computation 1994.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..fisher.passes import displaced
from ..fisher.scores import Batch, trainable_parameters
from .loss import MeanLoss, Part

PRODUCTS = ("auto", "double_backward", "finite_difference")
_ZEROS = {"allow_unused": True, "materialize_grads": True}  # where the loss does not depend on a parameter


class Hessian(MeanLoss):
    """The Hessian of the mean loss, as a linear operator on flat vectors of the trainable parameters.

    Frozen parameters are left out, tied ones count once.

    Args:
        model, batches, options: of the loss, see [`MeanLoss`].
        product: `auto`, `double_backward` or `finite_difference`.
        epsilon: length of the finite-difference step in parameter space.
        graph_bytes: the graphs of ∇L are kept from one product to the next as far as they fit in so many bytes, which
            saves a forward and a backward pass a product.

    Attributes:
        product_form: how products are made; None before the first of `auto`.
        products: how many were made.
        after_product: called after each, to show progress.

    Raises:
        ValueError: for an unknown `product`, no trainable parameter, no sample, or finite differences of
            half-precision weights, which would round the step away.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        product: str = "auto",
        epsilon: float = 0.01,
        graph_bytes: int = 2**30,
        **options,
    ):
        if product not in PRODUCTS:
            raise ValueError(f"product={product!r} is not one of {', '.join(PRODUCTS)}.")
        super().__init__(model, batches, **options)
        self.parameters = list(trainable_parameters(model).values())
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.epsilon, self.graph_bytes = epsilon, graph_bytes
        self.product_form = None if product == "auto" else product
        self.products, self.after_product = 0, lambda: None
        if product == "finite_difference":
            self._check_precision()
        self._kept_bytes, self._versions = 0, None
        self._bytes_a_row: int | None = None

    def gradient(self) -> Tensor:
        """∇L(θ), of shape `(size,)`."""
        return self._mean(lambda part: self._flat(torch.autograd.grad(self._loss(part), self.parameters, **_ZEROS)))

    def product(self, vector: Tensor) -> Tensor:
        """H v of a vector of shape `(size,)`; the same on every process."""
        result = self._product(vector)
        self.products += 1
        self.after_product()
        return result

    def _product(self, vector: Tensor) -> Tensor:
        versions = [parameter._version for parameter in self.parameters]
        if versions != self._versions:  # the weights were trained meanwhile
            self._drop_graphs()
            self._versions = versions
        if self.product_form != "finite_difference":
            try:
                product = self._mean(lambda part: self._double_backward(part, vector))
                self.product_form = "double_backward"
                return product
            except RuntimeError as error:
                if not _no_second_derivative(error):
                    raise
                if self.product_form == "double_backward":
                    raise ValueError(
                        "An operation of this model has no second derivative: use product='finite_difference', or "
                        f"load the model with attn_implementation='eager' (autograd: {error})"
                    ) from error
            self._check_precision()
            self.product_form = "finite_difference"
        norm = vector.square().sum().sqrt().item()
        if norm == 0:
            return torch.zeros_like(vector)
        direction = self._like_parameters(vector)
        with displaced(self.parameters, direction, self.epsilon / norm):
            above = self.gradient()
        with displaced(self.parameters, direction, -self.epsilon / norm):
            below = self.gradient()
        return (above - below) * (norm / (2 * self.epsilon))

    def random_signs(self, generator: torch.Generator) -> Tensor:
        """A Rademacher vector: entries of ±1. Drawn on CPU, so that a seed gives the same one on every device."""
        bits = torch.randint(0, 2, (self.size,), generator=generator, dtype=torch.int8)
        return (bits * 2 - 1).to(self.device, self.dtype)

    # Products with the Hessian of a part

    def _double_backward(self, part: Part, vector: Tensor) -> Tensor:
        """H v of the part, times its terms."""
        gradient, keep = part.gradient, True
        if gradient is None:
            keep = self._kept_bytes + self._graph_size(part) <= self.graph_bytes
            gradient = torch.autograd.grad(self._loss(part), self.parameters, create_graph=True, **_ZEROS)
            if not self.products and _ends_early(gradient):
                raise RuntimeError("derivative for a function marked with @once_differentiable is not implemented")
            if keep:
                part.gradient = gradient
                self._kept_bytes += self._graph_size(part)
        pairs = [pair for pair in zip(gradient, self._like_parameters(vector), strict=True) if pair[0].requires_grad]
        if not pairs:  # the loss is linear in θ
            return torch.zeros_like(vector)
        outputs, vectors = zip(*pairs, strict=True)
        return self._flat(torch.autograd.grad(outputs, self.parameters, vectors, retain_graph=keep, **_ZEROS))

    def _graph_size(self, part: Part) -> int:
        """Bytes that the graph of a part's gradient holds on to: the gradient, and what one row saves for each row."""
        if self._bytes_a_row is None:
            saved, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in self.parameters}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                saved[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = self._loss(part.select(slice(1)))
                graph = torch.autograd.grad(loss, self.parameters, create_graph=True, **_ZEROS)
            del graph
            self._bytes_a_row = sum(size for place, size in saved.items() if place not in weights)
        return part.rows * self._bytes_a_row + self.size * self.dtype.itemsize

    def _release(self) -> bool:
        held = self._kept_bytes > 0
        self._drop_graphs()
        self.graph_bytes = 0
        return held

    def _drop_graphs(self) -> None:
        self._kept_bytes = 0
        for part in self._parts:
            part.gradient = None

    # Flat vectors

    def _flat(self, tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1).to(self.dtype) for tensor in tensors])

    def _like_parameters(self, vector: Tensor) -> list[Tensor]:
        pieces = vector.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(p).to(p.dtype) for piece, p in zip(pieces, self.parameters, strict=True)]

    def _check_precision(self) -> None:
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self.parameters):
            raise ValueError(
                f"A finite-difference step of {self.epsilon} is rounded away in half-precision weights: load the "
                "model in float32, or use product='double_backward'."
            )


def _ends_early(gradient: Iterable[Tensor]) -> bool:
    """Whether the graph of a gradient has an end where autograd would raise, if it did not silently leave it out."""
    waiting, seen = [tensor.grad_fn for tensor in gradient], {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [earlier for earlier, _ in node.next_functions]
    return any(node is not None and node.name() == "torch::autograd::Error" for node in seen)


def _no_second_derivative(error: RuntimeError) -> bool:
    return any(text in str(error) for text in ("derivative for", "double backward"))
