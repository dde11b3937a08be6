"""The curvature is that of the loss: by a dense Hessian, and by an independent library."""

import functools
import math

import numpy as np
import pytest
import torch
from hessian_eigenthings.algorithms import lanczos as their_lanczos
from hessian_eigenthings.algorithms import spectral_density as their_density
from hessian_eigenthings.operators import HessianOperator
from peft import LoraConfig, get_peft_model
from test_fisher_models import MODELS, linear, make_batch, select, t5, vit
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainer_cases import Images
from trainer_cases import resnet as wider_resnet
from trainer_cases import vit as wider_vit

from hf_fip import SingularValueConfig
from hf_fip.curvature import Hessian, hessian_trace, measure_curvature, spectral_density, top_eigenvalues
from hf_fip.curvature.lanczos import lanczos
from hf_fip.fisher import infer_likelihood
from hf_fip.fisher.likelihood import get_logits
from hf_fip.fisher.scores import split_batch

every_model = pytest.mark.parametrize("name", MODELS)


def loss_of(model, batch):
    """The model's own loss or, where it has none, the cross-entropy."""
    if hasattr(model, "config"):
        return model(**batch).loss
    inputs, labels = split_batch(model, batch)
    return torch.nn.functional.cross_entropy(get_logits(model(**inputs)), labels)


def dense(model, batch) -> torch.Tensor:
    """The Hessian by the trainable parameters, in full, without any of the library's code."""
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sizes = [value.numel() for value in values.values()]

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self):
            return loss_of(self.inner, batch)

    def loss(flat):
        pieces = zip(values.items(), flat.split(sizes), strict=True)
        return functional_call(Loss(), {f"inner.{name}": piece.view_as(p) for (name, p), piece in pieces}, ())

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, torch.cat([value.flatten() for value in values.values()]))


@functools.cache
def dense_of(name: str) -> torch.Tensor:
    """The Hessian of one of the shared models, in float64."""
    return dense(*doubled(name))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubled(name: str):
    model, batch = MODELS[name]().double(), make_batch(name)
    return model, {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


@every_model
def test_products_are_those_of_the_dense_hessian(name):
    model, batch = doubled(name)
    hessian, full = Hessian(model, [batch]), dense_of(name)
    for seed in range(3):
        vector = torch.randn(hessian.size, generator=generator(seed), dtype=torch.float64)
        # eager attention takes its softmax in float32
        torch.testing.assert_close(hessian.product(vector), full @ vector, rtol=1e-5, atol=1e-6 * full.norm().item())
    assert hessian.product_form == "double_backward" and hessian.products == 3
    assert hessian.value() == pytest.approx(loss_of(model, batch).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["linear", "vit", "resnet", "t5"])
def test_eigenvalues_and_trace_equal_those_of_the_dense_hessian(name):
    model, batch = MODELS[name](), make_batch(name)
    eigenvalues = torch.linalg.eigvalsh(dense_of(name))
    found = measure_curvature(model, [batch], top=3, tolerance=1e-5, max_steps=200, probes=40)
    assert found.converged and found.samples == 4 and found.parameters == len(eigenvalues)
    assert found.eigenvalues == pytest.approx(eigenvalues.flip(0)[:3].tolist(), rel=1e-3)
    assert abs(found.trace - eigenvalues.sum().item()) <= 4 * found.trace_error + 1e-3 * abs(found.trace)


def test_the_trace_is_exact_within_the_krylov_space():
    model, batch = doubled("linear")
    hessian = Hessian(model, [batch])
    whole = top_eigenvalues(hessian, tolerance=0.0).krylov
    assert whole.beta == 0.0  # the start vector has a part in every direction that has curvature
    found = hessian_trace(hessian, probes=3, krylov=whole, seed=1)
    assert found.value == pytest.approx(dense_of("linear").trace().item(), rel=1e-9)
    assert found.error < 1e-9


def test_the_density_has_the_moments_of_the_dense_hessian():
    model, batch = doubled("vit")
    hessian, full = Hessian(model, [batch]), dense_of("vit")
    start = hessian.random_signs(generator())
    krylov = lanczos(hessian, start, 8)
    for power in range(1, 6):  # exact up to 2 · 8 − 1
        expected = (start @ torch.linalg.matrix_power(full, power) @ start / hessian.size).item()
        assert (krylov.first**2 * krylov.ritz_values**power).sum() == pytest.approx(expected, rel=1e-3)
    density = spectral_density(hessian, runs=40, steps=8)
    for power in (1, 2, 3):
        mean, error = density.moment(power)
        expected = torch.linalg.matrix_power(full, power).trace().item() / hessian.size
        assert abs(mean - expected) < 4 * error and error > 0


def test_the_density_integrates_to_one_and_is_smooth_at_the_given_width():
    density = spectral_density(Hessian(linear(), [make_batch("linear")]), runs=2, steps=6)
    points = np.linspace(-2, 4, 4001)
    values = density.at(points, width=0.05)
    assert np.trapezoid(values, points) == pytest.approx(1, rel=1e-3)
    assert values.max() > density.at(points, width=0.2).max()
    assert math.isnan(spectral_density(Hessian(linear(), [make_batch("linear")]), runs=1).moment(1)[1])


@pytest.mark.parametrize("make", [wider_resnet, wider_vit])
def test_curvature_agrees_with_hessian_eigenthings(make):
    model = make(attn_implementation="eager") if make is wider_vit else make()
    model.eval()
    data = Images()
    batch = {"pixel_values": data.pixels, "labels": data.labels}
    theirs = HessianOperator(model, [batch], lambda model, batch: model(**batch).loss)
    ours = Hessian(model, [select(batch, slice(5)), select(batch, slice(5, None))])
    vector = ours.random_signs(generator())
    torch.testing.assert_close(ours.product(vector), theirs.matvec(vector), rtol=1e-3, atol=1e-4)
    expected = their_lanczos(theirs, k=3, max_iter=45, which="LA", seed=3).eigenvalues.tolist()
    assert top_eigenvalues(ours, 3).values == pytest.approx(expected, rel=1e-3)
    density = their_density(theirs, num_runs=4, lanczos_steps=10, seed=5)
    moments = (density.raw_weights * density.raw_eigenvalues).sum(1)
    mean, error = spectral_density(ours, runs=4, steps=10).moment(1)
    assert abs(mean - moments.mean().item()) < 4 * math.hypot(error, moments.std().item() / 2)


@pytest.mark.parametrize("name", ["resnet", "bert", "marian", "gpt2"])
def test_the_hessian_does_not_depend_on_how_the_samples_are_split(name):
    """Tokens count alike, whatever the batch that they are in: the second row has masked ones."""
    model, batch = doubled(name)
    whole = Hessian(model, [batch])
    split = Hessian(model, [select(batch, slice(1)), select(batch, slice(1, 4))])
    vector = whole.random_signs(generator()).double()
    torch.testing.assert_close(split.product(vector), whole.product(vector), rtol=1e-9, atol=1e-10)
    assert split.value() == pytest.approx(whole.value(), rel=1e-6) and split.samples == 4


@pytest.mark.parametrize("name", ["linear", "bert", "t5"])
def test_a_likelihood_makes_the_loss_the_mean_over_samples_of_its_negative_logarithm(name):
    model, batch = doubled(name)
    likelihood = infer_likelihood(model)
    inputs, labels = split_batch(model, batch)
    expected = -likelihood.log_prob(get_logits(model(**inputs)), labels).mean().item()
    assert Hessian(model, [batch], likelihood=likelihood).value() == pytest.approx(expected, rel=1e-9)
    assert name == "linear" or Hessian(model, [batch]).value() != pytest.approx(expected, rel=1e-3)


ADAPTERS = {
    "LoRA": LoraConfig(target_modules=["q_proj", "v_proj"], r=1, init_lora_weights=False),
    "singular values": SingularValueConfig(),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_of_an_adapter_the_hessian_is_by_what_it_trains(adapter):
    model, batch = vit(num_hidden_layers=1), make_batch("vit")
    model = get_peft_model(model, ADAPTERS[adapter]).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:  # a shift of zero is a kink of the singular values' ReLU for none of them
            parameter.data += 0.01
    hessian = Hessian(model, [batch])
    assert hessian.size == sum(p.numel() for p in model.parameters() if p.requires_grad) < 200
    full = dense(model, batch)
    vector = hessian.random_signs(generator())
    torch.testing.assert_close(hessian.product(vector), full @ vector, rtol=1e-3, atol=1e-4)


def test_parameters_that_the_loss_does_not_see_or_is_linear_in_have_no_curvature():
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))

        def forward(self, x, labels):
            return {"loss": (x @ self.used).mean(), "logits": x}

    found = measure_curvature(Sum(), [{"x": torch.ones(2, 3), "labels": torch.zeros(2)}], density_runs=1)
    assert found.eigenvalues == [0.0] and found.trace == 0.0 and found.converged


def test_the_same_seed_gives_the_same_figures_and_another_one_others():
    model, batch = vit(), make_batch("vit")
    first, second, other = (measure_curvature(model, [batch], density_runs=1, seed=s).to_dict() for s in (3, 3, 4))
    assert first == second
    assert first["trace"] != other["trace"] and first["density"] != other["density"]
    assert first["lambda_max"] == pytest.approx(other["lambda_max"], rel=2e-3)
    assert first["batch_norm"] == "eval" and first["product_form"] == "double_backward"


def test_twice_the_probes_halve_the_variance_and_the_error_says_so():
    model, batch = linear(), make_batch("linear")
    hessian = Hessian(model, [batch])
    runs = {
        probes: [hessian_trace(hessian, probes=probes, seed=1000 * probes + seed) for seed in range(200)]
        for probes in (4, 8)
    }
    variance = {probes: np.var([run.value for run in found], ddof=1) for probes, found in runs.items()}
    assert 1.5 < variance[4] / variance[8] < 2.7  # the standard error of the ratio is 0.28
    for probes, found in runs.items():
        assert np.mean([run.error**2 for run in found]) == pytest.approx(variance[probes], rel=0.3)
    assert np.mean([run.value for run in runs[8]]) == pytest.approx(dense_of("linear").trace().item(), rel=0.05)


def test_the_krylov_space_takes_variance_away_and_no_bias_in():
    model, batch = t5(), make_batch("t5")
    hessian = Hessian(model, [batch])
    krylov = lanczos(hessian, hessian.random_signs(generator(9)), 20)
    plain, within = (hessian_trace(hessian, probes=40, krylov=space) for space in (None, krylov))
    assert within.error < 0.5 * plain.error
    assert abs(within.value - dense_of("t5").trace().item()) < 4 * within.error


def test_eigenvalues_that_have_not_converged_are_said_to_have_not():
    found = top_eigenvalues(Hessian(vit(), [make_batch("vit")]), 2, max_steps=3)
    assert not found.converged and len(found.values) == 2 and max(found.errors) > 0


def test_a_model_with_broken_weights_is_refused():
    model, batch = doubled("linear")
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: its weights are broken"):
        measure_curvature(model, [batch])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: top_eigenvalues(h, 0), "k=0"),
        (lambda h: top_eigenvalues(h, 5, max_steps=4), "max_steps=4"),
        (lambda h: hessian_trace(h, probes=0), "probes=0"),
        (lambda h: spectral_density(h, runs=0), "runs=0"),
        (lambda h: spectral_density(h, steps=0), "steps=0"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Hessian(linear(), [make_batch("linear")]))
