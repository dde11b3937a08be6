"""I-BAU: the universal perturbation, the implicit hypergradient, and what comes back with a checkpoint."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset
from torch.autograd.functional import hessian
from torch.nn.functional import cross_entropy
from trainer_cases import QUIET, Images, PlainNet, Recorder, distance, identical, marian, resnet, vit, weights

from hf_fip.baselines.base import KEPT_NAME
from hf_fip.baselines.ibau import IBAUConfig, IBAUTrainer, fixed_point
from hf_fip.baselines.universal import PixelScale, universal_perturbation
from hf_fip.checkpoint import CHECKSUMS_NAME, last_complete_checkpoint

SHORT = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "logging_steps": 1, **QUIET}
MODELS = {"resnet": resnet, "vit": partial(vit, 0.2), "plain": partial(PlainNet, 0.2)}


def ibau(folder, model, train_transform=None, train_dataset=None, processing_class=None, **options):
    args = IBAUConfig(str(folder), **{**SHORT, **options})
    dataset = train_dataset or Images()
    extra = {"train_transform": train_transform, "processing_class": processing_class}
    return IBAUTrainer(model, args, train_dataset=dataset, **extra)


def batch(count=8, seed=0):
    images = Images(count, seed)
    return {"pixel_values": images.pixels, "labels": images.labels}


# ---- Pixels ----


def test_a_perturbation_is_in_pixels_whatever_the_processor_normalises_by():
    processor = SimpleNamespace(do_normalize=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.2, 0.1])
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    torch.manual_seed(0)
    images, delta = torch.rand(2, 3, 4, 4), torch.randn(1, 3, 4, 4)
    scale = PixelScale.of(processor)
    assert PixelScale.of(SimpleNamespace(image_processor=processor)) == scale  # of images and text
    found = scale.added((images - mean) / std, delta)
    assert torch.allclose(found * std + mean, images + delta, atol=1e-5)
    assert torch.allclose(scale.clipped(found) * std + mean, (images + delta).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("processor", [None, SimpleNamespace(do_normalize=False, image_mean=[0.5], image_std=[0.5])])
def test_inputs_that_nothing_normalises_are_pixels(processor):
    pixels, delta = torch.rand(2, 1, 3, 3), torch.randn(1, 1, 3, 3)
    assert torch.equal(PixelScale.of(processor).added(pixels, delta), pixels + delta)
    assert torch.equal(PixelScale.of(processor).clipped(pixels + delta), (pixels + delta).clamp(0, 1))


def test_the_perturbation_climbs_one_step_a_batch_from_the_answers_of_the_model():
    net, batches = PlainNet().eval(), [batch(seed=1), batch(seed=2)]
    found = universal_perturbation(net, batches, PixelScale(), learning_rate=3.0, penalty=0.1)
    delta = torch.zeros(1, 1, 8, 8)
    for one in batches:
        delta = delta.detach().requires_grad_()
        answers = net(one["pixel_values"])["logits"].argmax(-1)
        loss = cross_entropy(net(one["pixel_values"] + delta)["logits"], answers) - 0.1 * delta.pow(2).sum()
        delta = delta + 3.0 * torch.autograd.grad(loss, delta)[0]
    assert torch.allclose(found, delta, atol=1e-6)
    assert found.abs().max() > 0


# ---- The hypergradient ----


def test_the_fixed_point_tends_to_the_solution_of_the_linear_system():
    torch.manual_seed(0)
    matrix = torch.randn(5, 5, dtype=torch.double)
    matrix = 0.8 * matrix / torch.linalg.matrix_norm(matrix, ord=2)
    pull, delta = torch.randn(5, dtype=torch.double), torch.randn(5, dtype=torch.double, requires_grad=True)
    mapped = matrix @ delta
    assert torch.allclose(fixed_point(mapped, delta, pull, 1), pull)
    assert torch.allclose(fixed_point(mapped, delta, pull, 2), matrix.T @ pull + pull)
    solution = torch.linalg.solve(torch.eye(5, dtype=torch.double) - matrix.T, pull)
    assert torch.allclose(fixed_point(mapped, delta, pull, 200), solution)


def prepared(folder, model, **options):
    """A trainer whose round has begun with a perturbation, and a batch."""
    trainer = ibau(folder, model, **options)
    trainer.begin_round(seed=3)
    trainer.kept["perturbation"] = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return trainer, batch(seed=5)


@pytest.mark.parametrize("model", [PlainNet, resnet, vit], ids=lambda model: model.__name__)
def test_the_gradient_is_that_of_the_formula(model, tmp_path):
    trainer, data = prepared(tmp_path, model(), perturbed_share=0.5, fixed_point_steps=3)
    net, delta, kept = trainer.model.double().train(), trainer.kept["perturbation"].double(), trainer.kept
    trainer.kept = {name: value.double() if value.is_floating_point() else value for name, value in kept.items()}
    data["pixel_values"] = data["pixel_values"].double()
    torch.manual_seed(7)
    loss = trainer.compute_loss(net, data)
    parameters = list(net.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)

    net.eval()
    torch.manual_seed(7)
    rows = torch.randperm(8)[:4]

    def logits(pixels):
        return net(pixel_values=pixels)["logits"]

    def outer(delta):
        pixels = data["pixel_values"].clone()
        pixels[rows] = pixels[rows] + delta.view(1, 1, 8, 8)
        return cross_entropy(logits(pixels), data["labels"])

    def inner(delta):
        perturbed = trainer.kept["inner_pixels"] + delta.view(1, 1, 8, 8)
        return 0.001 * delta.pow(2).sum() - cross_entropy(logits(perturbed), trainer.kept["inner_labels"])

    delta = delta.flatten().requires_grad_()
    pull = torch.autograd.grad(outer(delta), delta)[0]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.eye(64, dtype=torch.double) - 0.1 * hessian(inner, delta.detach())
        v = pull + jacobian.T @ (pull + jacobian.T @ pull)
        slope = torch.autograd.grad(inner(delta), delta, create_graph=True)[0]
        direct = torch.autograd.grad(outer(delta), parameters, allow_unused=True)
        mixed = torch.autograd.grad(-0.1 * (slope @ v), parameters, allow_unused=True)
    assert loss.item() == pytest.approx(outer(delta).item(), rel=1e-6)
    for one, first, second in zip(found, direct, mixed, strict=True):
        expected = sum(part for part in (first, second) if part is not None)
        assert torch.allclose(one if one is not None else torch.tensor(0.0).double(), expected + 0.0, atol=1e-8)
    assert any(second is not None and second.abs().max() > 1e-4 for second in mixed)  # or nothing was implicit


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.5, 4), (1.0, 8)])
def test_so_many_images_of_a_batch_are_perturbed_and_at_least_one(share, count, tmp_path):
    trainer, data = prepared(tmp_path, PlainNet(), perturbed_share=share)
    seen = []
    trainer.model.register_forward_pre_hook(lambda *given: seen.append(given[2]["pixel_values"]), with_kwargs=True)
    trainer.outer_loss(trainer.model, trainer.kept["perturbation"], data)
    moved = (seen[0] - data["pixel_values"]).flatten(1).abs().sum(1) > 0
    assert moved.sum() == count


# ---- Training ----


def test_statistics_and_modes_stay_and_the_weights_move(tmp_path):
    model = resnet()
    before = weights(model)
    trainer = ibau(tmp_path, model)
    trainer.train()
    after = weights(model)
    buffers = {name for name, _ in model.named_buffers()}
    assert identical({name: after[name] for name in buffers}, {name: before[name] for name in buffers})
    assert distance(after, before) > 1e-3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulation"])
@pytest.mark.parametrize("dropped", [1, 2])
def test_a_resumed_run_ends_with_the_same_weights(model, options, dropped, tmp_path):
    def make():
        saving = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 6}
        return ibau(tmp_path, MODELS[model](), train_transform=noise, **saving, **options)

    whole = make()
    whole.train()
    for _ in range(dropped):  # in the middle of the second epoch, and at its beginning or nearer its end
        shutil.rmtree(last_complete_checkpoint(str(tmp_path)))
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert identical(weights(resumed.model), weights(whole.model))


def noise(inputs):
    return {**inputs, "pixel_values": inputs["pixel_values"] + torch.randn_like(inputs["pixel_values"])}


def test_each_epoch_makes_a_new_perturbation_and_the_transform_is_in_it(tmp_path):
    recorder = Recorder()
    trainer = ibau(tmp_path, PlainNet(), train_transform=recorder)
    found, begin_round = [], trainer.begin_round
    trainer.begin_round = lambda seed: (begin_round(seed), found.append(trainer.kept["perturbation"]))
    trainer.train()
    assert len(found) == 2 and not torch.equal(*found)
    assert len(recorder.batches) == 2 * (3 + 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed_point_steps": 0}, "fixed_point_steps"),
        ({"perturbed_share": 0.0}, "perturbed_share"),
        ({"perturbation_penalty": -1.0}, "perturbation_penalty"),
        ({"activation_checkpointing": True}, "second derivatives"),
    ],
)
def test_what_cannot_work_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ibau(tmp_path, resnet(), **options)


def test_clips_are_refused():
    clips = {"pixel_values": torch.zeros(2, 4, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"pixel_values are \(2, 4, 3, 8, 8\): use another method"):
        universal_perturbation(PlainNet(), [clips], PixelScale())


def test_models_of_text_and_data_without_a_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="takes input_ids"):
        ibau(tmp_path, marian())
    stream = IterableDataset.from_generator(lambda: iter([]))
    with pytest.raises(ValueError, match="dataset with a length"):
        ibau(tmp_path, PlainNet(), train_dataset=stream, max_steps=2).train()


def test_several_processes_and_a_checkpoint_without_the_perturbation_are_refused(tmp_path, monkeypatch):
    trainer = ibau(tmp_path, PlainNet(), save_strategy="epoch")
    trainer.train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        for file in (KEPT_NAME, CHECKSUMS_NAME):  # as of another method
            (checkpoint / file).unlink()
    with pytest.raises(ValueError, match=f"has no {KEPT_NAME}"):
        ibau(tmp_path, PlainNet(), save_strategy="epoch").train(resume_from_checkpoint=True)
    monkeypatch.setattr(IBAUConfig, "world_size", 2)
    with pytest.raises(ValueError, match="num_processes 1"):
        ibau(tmp_path, PlainNet())


def test_the_defaults_are_those_of_the_authors(tmp_path):
    args = IBAUConfig(str(tmp_path), **QUIET)
    assert (args.fixed_point_steps, args.perturbed_share, args.perturbation_penalty) == (5, 0.01, 0.001)
    assert (args.optim, args.weight_decay, args.learning_rate, args.num_train_epochs) == ("adamw_torch", 0, 1e-3, 5)
    assert (args.perturbation_learning_rate, args.per_device_train_batch_size) == (10.0, 100)
