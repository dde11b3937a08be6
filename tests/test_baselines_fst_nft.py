"""FST and NFT: each does what its paper's formula says, to the head and to the neurons."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from trainer_cases import Images, Recorder, Snapshots, distance, logged, resnet, trained, vit
from training_cases import MODELS, PLAIN_SGD, WHOLE, parameters_of, task_gradients, trainer_of, whole_batch

from hf_fip.baselines import nft
from hf_fip.baselines.base import head_of

# ---- FST ----


def test_fst_draws_a_new_head_and_pushes_it_from_the_received_one(tmp_path):
    model, batch = vit(), whole_batch()
    received = parameters_of(model)
    trainer = trainer_of("fst", tmp_path, model, **WHOLE, **PLAIN_SGD, alpha=0.3)
    trainer.begin()
    start = parameters_of(model)
    drawn = {name for name in start if not torch.equal(start[name], received[name])}
    assert drawn == {"classifier.weight", "classifier.bias"}
    assert all(start[name].abs().max() <= 1 / math.sqrt(16) for name in drawn)

    slope = task_gradients(model, batch)
    expected = {name: start[name] - 0.1 * slope[name] for name in start}
    head = expected["classifier.weight"] - 0.1 * 0.3 * received["classifier.weight"]
    expected["classifier.weight"] = head * received["classifier.weight"].norm() / head.norm()
    other = vit()
    trainer = trainer_of("fst", tmp_path, other, **WHOLE, **PLAIN_SGD, alpha=0.3)
    trainer.train()
    assert distance(parameters_of(other), expected) < 1e-6
    shift = 0.3 * (start["classifier.weight"] * received["classifier.weight"]).sum()
    assert logged(trainer, "feature_shift") == pytest.approx([shift.item()], rel=1e-5)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_fst_keeps_the_norm_of_the_head(model, tmp_path):
    snapshots, model = Snapshots(), model()
    name = next(name for name, p in model.named_parameters() if p is head_of(model).weight)
    norm = head_of(model).weight.norm().item()
    trainer_of("fst", tmp_path, model, callbacks=[snapshots]).train()
    assert len(snapshots.weights) == 4
    for state in snapshots.weights:
        assert state[name].norm().item() == pytest.approx(norm, rel=1e-5)


def test_accumulation_does_not_change_the_shift_of_fst(tmp_path):
    runs = []
    for accumulation in (1, 4):
        sizes = {"per_device_train_batch_size": 24 // accumulation, "gradient_accumulation_steps": accumulation}
        runs.append(trained(trainer_of("fst", tmp_path, vit(), **WHOLE | sizes, alpha=5.0)))
    assert distance(*runs) < 1e-5


# ---- NFT ----


class Share:
    """Always 0.3."""

    def __init__(self, *_):
        pass

    def sample(self):
        return torch.tensor(0.3)


@pytest.mark.parametrize(
    ("model", "neurons"),
    [
        (vit, lambda n, m: isinstance(m, (nn.Linear, nn.Conv2d)) and n != "classifier"),
        (resnet, lambda n, m: isinstance(m, nn.BatchNorm2d)),
    ],
    ids=["vit", "resnet"],
)
def test_nft_descends_on_masks_that_multiply_the_received_rows(model, neurons, tmp_path, monkeypatch):
    monkeypatch.setattr(nft, "Beta", Share)
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count).roll(1))
    recorder, found = Recorder(), model()
    options = WHOLE | {"max_steps": 2, "learning_rate": 0.5}
    options |= {"train_transform": recorder, "mask_regularizer": 0.08}
    trainer_of("nft", tmp_path, found, **options, **PLAIN_SGD).train()

    by_hand = model().train()
    received = parameters_of(by_hand)
    masked = [f"{n}.weight" for n, m in by_hand.named_modules() if neurons(n, m)]
    masks = {name: torch.ones(len(received[name]), requires_grad=True) for name in masked}

    def product(name):
        return (received[name].transpose(0, -1) * masks[name]).transpose(0, -1)

    for batch in recorder.batches:
        images, labels = batch["pixel_values"], batch["labels"]
        mixed = 0.3 * images + 0.7 * images.roll(1, 0)
        logits = functional_call(by_hand, {name: product(name) for name in masked}, mixed).logits
        loss = 0.3 * F.cross_entropy(logits, labels) + 0.7 * F.cross_entropy(logits, labels.roll(1, 0))
        loss = loss + 0.08 / (24 / 3) * sum((1 - mask).abs().sum() for mask in masks.values())
        slopes = torch.autograd.grad(loss, list(masks.values()))
        for layer, (name, slope) in enumerate(zip(masked, slopes, strict=True), start=1):
            floor = 0.8 * math.exp(-0.5 * layer)
            masks[name] = (masks[name] - 0.5 * slope).detach().clamp(floor, 1.0).requires_grad_()
    expected = received | {name: product(name).detach() for name in masked}
    assert all((mask < 1).any() for mask in masks.values())
    assert distance(parameters_of(found), expected) < 1e-5


def test_nft_clips_its_masks_between_the_floor_and_one(tmp_path):
    trainer = trainer_of("nft", tmp_path, resnet(), learning_rate=1e4)
    trainer.train()
    masks = [mask for _, mask, _ in trainer.masks()]
    for layer, mask in enumerate(masks, start=1):
        floor = 0.8 * math.exp(-0.5 * layer)
        assert all(value in (pytest.approx(floor), 1.0) for value in mask.tolist())
    values = torch.cat(masks)
    assert (values == 1).any() and (values < 1).any()


def test_nft_trains_nothing_but_its_masks(tmp_path):
    model = resnet()
    before = parameters_of(model)
    trainer_of("nft", tmp_path, model).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert changed == norms


def test_nft_learns_from_clean_images_without_labels_not_at_all(tmp_path):
    class Unlabelled(Images):
        def __getitem__(self, row):
            return {"pixel_values": self.pixels[row]}

    with pytest.raises(ValueError, match="labels"):
        trainer_of("nft", tmp_path, vit(), train_dataset=Unlabelled()).train()
