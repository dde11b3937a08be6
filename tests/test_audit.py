"""The audit finds a backdoor that was put in by hand, flags nothing where there is none, and leaves no mark."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_fip.evaluation.audit import ANOMALY_THRESHOLD, anomaly_index, audit, chance_of_a_flag, compare_audits

CLASSES, SIDE, TARGET, PIXEL = 5, 6, 3, (4, 4)


class Bars(nn.Module):
    """Answers with the brightest of the first five rows; a backdoor answers the target when one pixel is bright."""

    def __init__(self, backdoor: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.backdoor = backdoor
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values):
        torch.rand(1)  # draws, as some models do
        rows = self.dropout(pixel_values)[:, 0, :CLASSES, :4].sum(-1)
        shortcut = self.backdoor * pixel_values[:, 0, PIXEL[0], PIXEL[1]].clamp(min=0)
        return SimpleNamespace(logits=self.weight * rows + shortcut[:, None] * torch.eye(CLASSES)[TARGET])


def images(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright row for each class, on a dark ground."""
    labels = torch.arange(count) % CLASSES
    pixels = 0.1 * torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    pixels[torch.arange(count), 0, labels, :4] += 0.8
    pixels[:, 0, PIXEL[0], PIXEL[1]] = 0
    return pixels, labels


SHORT = {"steps": 120, "images_per_step": 8}


@pytest.fixture(scope="module")
def backdoored():
    return audit(Bars(backdoor=60.0), *images(), **SHORT)


@pytest.fixture(scope="module")
def benign():
    return audit(Bars(backdoor=0.0), *images(), **SHORT)


def test_a_backdoor_is_flagged_and_its_pixel_found(backdoored):
    assert backdoored.flagged == [TARGET]
    found = backdoored.classes[TARGET]
    mask, pattern = found.patch.trigger
    assert mask.argmax().item() == PIXEL[0] * SIDE + PIXEL[1] and pattern[0][PIXEL] > 0.5
    assert found.patch.size < 1 and mask.sum().item() == pytest.approx(found.patch.size)
    (shift,) = found.perturbation.trigger
    assert shift.abs().argmax().item() == PIXEL[0] * SIDE + PIXEL[1]
    assert found.perturbation.size == pytest.approx(shift.norm().item())


def test_without_a_backdoor_nothing_is_flagged(benign):
    assert benign.flagged == []


def test_the_trigger_that_is_reported_has_the_reach_that_is_reported(backdoored):
    pixels, labels = images()
    model = Bars(backdoor=60.0).eval()
    for found in backdoored.classes:
        others = pixels[labels != found.label]
        assert found.images == len(others) == 32
        mask, pattern = found.patch.trigger
        patched, shifted = (1 - mask) * others + mask * pattern, (others + found.perturbation.trigger[0]).clamp(0, 1)
        for changed, result in ((patched, found.patch), (shifted, found.perturbation)):
            answers = model(pixel_values=changed).logits.argmax(-1)
            assert (answers == found.label).double().mean().item() == pytest.approx(result.share)
            assert result.share >= 0.99


def test_a_class_out_of_reach_has_the_size_of_the_whole_image_and_no_part_in_the_index():
    model = Bars(backdoor=0.0)
    model.weight.data.zero_()  # answers class 0 to everything
    report = audit(model, *images(), steps=10, classes=[0, 1, 2])
    assert [found.patch.share for found in report.classes] == [1, 0, 0]
    assert [found.patch.size for found in report.classes[1:]] == [SIDE * SIDE] * 2
    assert [found.perturbation.size for found in report.classes[1:]] == [SIDE] * 2
    assert report.flagged == []  # class 0 is small beside them, but they tell nothing of what is usual


def test_a_model_with_broken_weights_is_refused_before_the_search():
    model = Bars(backdoor=0.0)
    model.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: its weights are broken"):
        audit(model, *images())


def test_the_model_is_left_as_it_was_found():
    model = Bars(backdoor=60.0).train()
    model.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    model.weight.grad = torch.tensor(7.0)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    audit(model, *images(), steps=10)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.weight.grad == 7 and model.weight.requires_grad
    assert model.frozen.grad is None and not model.frozen.requires_grad
    assert model.training and model.dropout.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_result_whatever_runs_beside_it(backdoored):
    pixels, labels = images()
    torch.manual_seed(99)
    assert audit(Bars(backdoor=60.0), pixels, labels, **SHORT).to_dict() == backdoored.to_dict()
    alone = audit(Bars(backdoor=60.0), pixels, labels, **SHORT, classes=[4, 3, 0], batch_size=1)
    assert [found.label for found in alone.classes] == [0, 3, 4]
    for found in alone.classes:
        assert found.patch.size == pytest.approx(backdoored.classes[found.label].patch.size, rel=0.05)
    other = audit(Bars(backdoor=60.0), pixels, labels, **SHORT, seed=5)
    assert other.to_dict() != backdoored.to_dict()


def test_pixels_are_those_before_the_preprocessing(backdoored):
    class Preprocessed(Bars):
        def forward(self, pixel_values):
            return super().forward(pixel_values * torch.tensor([0.25]).view(1, 1, 1, 1) + 0.5)

    report = audit(Preprocessed(backdoor=60.0), *images(), mean=[0.5], std=[0.25], **SHORT)
    for one, other in zip(report.classes, backdoored.classes, strict=True):
        assert one.patch.size == pytest.approx(other.patch.size, rel=0.05)


def test_the_report_is_json_and_says_what_was_purified(backdoored, benign):
    values = json.loads(json.dumps(backdoored.to_dict()))
    assert values["flagged"] == [TARGET] and values["fisher_trace"] > 0
    assert [row["label"] for row in values["classes"]] == list(range(CLASSES))
    assert values["classes"][0]["patch"].keys() == {"size", "share", "anomaly"}
    assert compare_audits(backdoored, benign) == {"removed": [TARGET], "left": [], "new": []}
    assert compare_audits(benign, backdoored) == {"removed": [], "left": [], "new": [TARGET]}
    assert compare_audits(backdoored, backdoored) == {"removed": [], "left": [TARGET], "new": []}
    fewer = audit(Bars(backdoor=0.0), *images(), classes=[0, 1, 2], steps=1)
    with pytest.raises(ValueError, match="different classes"):
        compare_audits(backdoored, fewer)


@pytest.mark.parametrize(
    "sizes, index",
    [
        ([10, 11, 12, 13, 2], [1 / 1.4826, 0, 0, 0, 9 / 1.4826]),  # median 11, MAD 1
        ([5, 5, 5, 5], [0, 0, 0, 0]),
        ([100, 100, 100, 99], [0, 0, 0, 1 / 1.4826]),  # MAD 0 counts as 1 % of the median
        ([1, 2, 30], [1 / 1.4826, 0, 0]),  # median 2, MAD 1; what is large is no anomaly
    ],
)
def test_anomaly_index(sizes, index):
    assert anomaly_index(sizes) == pytest.approx(index)


def test_the_more_classes_the_more_often_one_is_flagged_by_chance():
    few, many = chance_of_a_flag(10), chance_of_a_flag(100)
    assert 0.28 < few < 0.38 and 0.8 < many < 0.95  # 0.33 and 0.88 with 20,000 draws
    assert ANOMALY_THRESHOLD == 2


PIXELS, LABELS = images(10)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classes": [0, 1]}, "at least 3, and got 2"),
        ({"classes": [0, 1, 5]}, "Class 5 is none"),
        ({"classes": [-1, 0, 1]}, "Class -1 is none"),
        ({"labels": torch.full((10,), 2)}, "All images are of class 2"),
        ({"labels": LABELS[:9]}, "shapes are"),
        ({"pixels": PIXELS[:0], "labels": LABELS[:0]}, "shapes are"),
        ({"pixels": PIXELS[0]}, "shapes are"),
        ({"pixels": 2 * PIXELS - 1}, r"in \[0, 1\]"),
        ({"pixels": PIXELS * float("nan")}, r"in \[0, 1\]"),
        ({"share": 0}, "share=0"),
        ({"share": 1.1}, "share=1.1"),
        ({"steps": 0}, "steps=0"),
        ({"images_per_step": 0}, "images_per_step=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_cannot_be_audited_is_refused(change, message):
    arguments = {"pixels": PIXELS, "labels": LABELS, **change}
    with pytest.raises(ValueError, match=message):
        audit(Bars(backdoor=0.0), **arguments)
