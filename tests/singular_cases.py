"""What the tests of the singular-value adapter share: small models, a naive reference, and another machine's SVD."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from hf_fip import SingularValueConfig
from hf_fip.singular import SingularValueLayer, kinds
from hf_fip.singular import layer as layer_module

REAL_SVD, REAL_EIGH = torch.linalg.svd, torch.linalg.eigh


def adapt(model: nn.Module, adapter: str = "default", **options) -> PeftModel:
    """A copy of the model with an adapter."""
    return get_peft_model(copy.deepcopy(model), SingularValueConfig(**options), adapter_name=adapter)


def layers(model: nn.Module) -> dict[str, SingularValueLayer]:
    """The adapted layers, by their names in the received model."""
    found = model.base_model.model.named_modules()
    return {name: module for name, module in found if isinstance(module, SingularValueLayer)}


def only_layer(model: nn.Module) -> SingularValueLayer:
    (layer,) = layers(model).values()
    return layer


def move_shifts(model: nn.Module, size: float = 0.3, seed: int = 0) -> None:
    """Random shifts, in place, of every adapter."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        for name, delta in layer.singular_delta.items():
            noise = torch.randn(delta.shape, generator=generator).to(delta)
            delta.data.copy_(size * noise if layer.relative[name] else size * layer.basis[name].sigma.mean() * noise)


def shifts(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "singular_delta" in name}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- The naive reference: W' made from torch's own SVD, and put in the place of W ----


def dense(matrix: Tensor, shifted: list[tuple[Tensor, float, bool]]) -> Tensor:
    """W + Σ U diag(ReLU(σ + scale · δ) − σ) Vᵀ over adapters (δ, scale, whether δ is times σ), in float64."""
    u, sigma, vt = REAL_SVD(matrix.detach().double(), full_matrices=False)
    total = matrix.detach().double()
    for delta, scale, relative in shifted:
        rank = delta.shape[-1]
        unit = scale * sigma[..., :rank] if relative else scale
        values = (sigma[..., :rank] + unit * delta.double()).clamp_min(0.0) - sigma[..., :rank]
        total = total + (u[..., :rank] * values.unsqueeze(-2)) @ vt[..., :rank, :]
    return total.to(matrix.dtype)


def dense_weights(received: nn.Module, adapted: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The weights of the received model with these adapters' shifts; differentiable in the shifts."""
    weights = {}
    for name, layer in layers(adapted).items():
        base = received.get_submodule(name)
        shifted = [
            (delta, layer.scale[name], layer.relative[name])
            for name, delta in layer.singular_delta.items()
            if name in names
        ]
        if isinstance(base, nn.MultiheadAttention):
            stack = torch.cat([base.in_proj_weight.view(3, base.embed_dim, -1), base.out_proj.weight[None]])
            weight = dense(stack, shifted)
            weights[f"{name}.in_proj_weight"] = weight[:3].flatten(0, 1)
            weights[f"{name}.out_proj.weight"] = weight[3]
        elif isinstance(base, Conv1D):
            weights[f"{name}.weight"] = dense(base.weight.T, shifted).T
        else:
            weights[f"{name}.weight"] = dense(base.weight.flatten(1), shifted).view(base.weight.shape)
    return weights


def reference(received: nn.Module, adapted: nn.Module, *args, names: tuple[str, ...] = ("default",), **kwargs):
    """What the adapted model has to give."""
    weights = dense_weights(received, adapted, list(names))
    return functional_call(received, weights, args, kwargs, tie_weights=False)


def force_path(monkeypatch, by_activations: bool) -> Counter:
    """Make every layer compute in one of the two ways, where it knows both; counts the ways taken."""
    taken = Counter()
    monkeypatch.setattr(layer_module, "cheaper_by_activations", lambda *args: by_activations)
    plain = kinds.Embedding.is_standard
    monkeypatch.setattr(
        kinds.Embedding,
        "_is_cheaper_by_activations",
        lambda self, x, names: by_activations and plain(self, self.get_base_layer()),
    )
    for kind in (SingularValueLayer, kinds.Embedding):
        count_calls(monkeypatch, kind, "_by_activations", taken, "activations")
    count_calls(monkeypatch, SingularValueLayer, "_weight", taken, "weight")
    return taken


def count_calls(monkeypatch, owner, name: str, counter: Counter, key: str | None = None) -> None:
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        counter[key or name] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


# ---- The linear algebra of another machine: as right as this one's, with other signs and rotations ----


def other_machine(monkeypatch, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def rotation(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q

    def groups(values: Tensor):
        """Slices of values that lie close together, and of those that are zero; values descend."""
        largest = values.abs().max()
        is_null = (values <= 1e-10 * largest).int()
        apart = (values[:-1] - values[1:] > 1e-8 * largest) | (is_null.diff() == 1)
        edges = apart.nonzero().flatten() + 1
        return [slice(a, b) for a, b in zip([0, *edges.tolist()], [*edges.tolist(), len(values)], strict=True)]

    def svd(matrix, full_matrices=True):
        if matrix.ndim > 2:
            return tuple(map(torch.stack, zip(*(svd(m, full_matrices) for m in matrix), strict=True)))
        u, sigma, vt = (part.clone() for part in REAL_SVD(matrix, full_matrices=full_matrices))
        for group in groups(sigma):
            left = rotation(group.stop - group.start).to(u)
            is_null = bool(sigma[group].max() <= 1e-10 * sigma[0])
            right = rotation(group.stop - group.start).to(u) if is_null else left
            u[:, group], vt[group] = u[:, group] @ left, right.T @ vt[group]
        return u, sigma, vt

    def eigh(matrix):
        if matrix.ndim > 2:
            return tuple(map(torch.stack, zip(*map(eigh, matrix), strict=True)))
        values, vectors = REAL_EIGH(matrix)
        values, vectors = values.flip(-1), vectors.flip(-1)
        for group in groups(values):
            vectors[:, group] = vectors[:, group] @ rotation(group.stop - group.start).to(vectors)
        return values.flip(-1), vectors.flip(-1)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)


# ---- Small models ----


class Holder(nn.Module):
    """One layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class Net(nn.Module):
    """Something of every kind; its attention has a part of the same name as its head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)])
        self.normed = weight_norm(nn.Linear(8, 8))
        self.out_proj = nn.Linear(8, 4)
        self.lm_head = nn.Linear(8, 9, bias=False)
        self.lm_head.weight = self.tokens.weight

    def forward(self, x):
        x = self.norm(self.conv(self.tokens(x).mT).mT)
        x = x + self.attn(x, x, x)[0]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.normed(x)).sum(-1, keepdim=True) + self.out_proj(x)


class ConvNet(nn.Module):
    """A convolution, BatchNorm and a linear head."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


TOKENS = torch.tensor([[0, 3, 5, 8], [1, 1, 2, 7]])


def images(rows: int = 4) -> Tensor:
    return torch.randn(rows, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int = 3, lr: float = 0.1) -> None:
    """A few steps of SGD in train mode on `images`."""
    optimizer = torch.optim.SGD(list(trainable(model).values()), lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(images(8)).square().mean().backward()
        optimizer.step()
