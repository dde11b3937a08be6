"""Random changes of training images: what they keep, what they change, and that they repeat."""

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessor

from hf_fip.evaluation.reactivation import PixelRange
from hf_fip.tasks import augmentation
from hf_fip.tasks.augmentation import both, disturb, shift_and_flip

PIXELS = PixelRange(-torch.ones(3, 16, 16), torch.ones(3, 16, 16))


def batch(count: int = 64, channels: int = 3, side: int = 16) -> dict:
    generator = torch.Generator().manual_seed(0)
    pixels = 2 * torch.rand(count, channels, side, side, generator=generator) - 1
    return {"pixel_values": pixels, "labels": torch.arange(count)}


def changed_images(names: tuple[str, ...], monkeypatch, given: dict) -> torch.Tensor:
    """The batch disturbed by only some of the changes."""
    for name in ("_mix", "_warp", "_jitter", "_erase"):
        if name not in names:
            monkeypatch.setattr(augmentation, name, lambda images: images)
    torch.manual_seed(0)
    return disturb(PIXELS)(given)["pixel_values"]


def test_disturbed_images_are_images_still_and_labels_and_the_given_batch_stay():
    given = batch()
    before = given["pixel_values"].clone()
    torch.manual_seed(0)
    changed = disturb(PIXELS)(given)
    assert changed["pixel_values"].shape == before.shape and changed["pixel_values"].dtype == before.dtype
    assert changed["pixel_values"].min() >= -1 and changed["pixel_values"].max() <= 1
    assert torch.equal(given["pixel_values"], before) and changed["labels"] is given["labels"]


def test_disturbing_repeats_with_the_random_state_and_differs_without_it():
    torch.manual_seed(3)
    first = disturb(PIXELS)(batch())["pixel_values"]
    second = disturb(PIXELS)(batch())["pixel_values"]
    torch.manual_seed(3)
    assert torch.equal(disturb(PIXELS)(batch())["pixel_values"], first) and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["_mix", "_warp", "_jitter", "_erase"])
def test_each_change_reaches_about_half_of_the_images(name, monkeypatch):
    given = batch(400)
    changed = changed_images((name,), monkeypatch, given)
    share = (changed - given["pixel_values"]).abs().flatten(1).amax(1).gt(1e-3).float().mean().item()
    assert 0.4 < share < 0.6  # of 400 at one half: four standard deviations


def test_an_erased_square_has_its_size_and_the_rest_is_as_it_was(monkeypatch):
    given = batch(200)
    changed = changed_images(("_erase",), monkeypatch, given)
    for was, now in zip(given["pixel_values"], changed, strict=True):
        rows, columns = ((was - now).abs().amax(0) > 1e-4).nonzero(as_tuple=True)
        if len(rows):
            height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
            assert 2 <= height <= 6 and 2 <= width <= 6  # an eighth to three eighths of 16


def test_mixing_blends_in_at_most_three_tenths(monkeypatch):
    given = batch(200)
    given["pixel_values"] = torch.ones_like(given["pixel_values"])
    changed = changed_images(("_mix",), monkeypatch, given)
    assert changed.min() >= 1 - 2 * 0.3 - 1e-5 and changed.min() < 0.6


def test_a_warp_of_a_plain_image_is_that_image(monkeypatch):
    given = batch()
    given["pixel_values"] = torch.full_like(given["pixel_values"], 0.25)
    assert torch.allclose(changed_images(("_warp",), monkeypatch, given), given["pixel_values"], atol=1e-5)


def test_a_warp_moves_pixels_by_two_at_most_on_small_images(monkeypatch):
    given = batch(64)
    columns = torch.linspace(-1, 1, 16).expand(64, 3, 16, 16)  # the value tells where a pixel was
    changed = changed_images(("_warp",), monkeypatch, given | {"pixel_values": columns.clone()})
    moved = ((changed - columns).abs() * 15 / 2)[..., 4:12]  # in pixels, away from the reflecting border
    assert 0.5 < moved.max() < 2.5  # bicubic interpolation may overshoot its knots


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)])
def test_gray_and_colour_small_and_large(channels, side):
    pixels = PixelRange(-torch.ones(channels, side, side), torch.ones(channels, side, side))
    changed = disturb(pixels)(batch(8, channels, side))["pixel_values"]
    assert changed.shape == (8, channels, side, side) and torch.isfinite(changed).all()


def test_the_range_of_a_processor_with_other_means_is_kept():
    processor = ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.3, 0.4]
    )
    pixels = PixelRange.of(processor, 8, 8, 3)
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    values = processor(list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    changed = disturb(pixels)({"pixel_values": values})["pixel_values"]
    for channel in range(3):
        least, most = pixels.black[channel].min(), pixels.white[channel].max()
        assert changed[:, channel].min() >= least - 1e-4 and changed[:, channel].max() <= most + 1e-4


@pytest.mark.parametrize("flip", [True, False])
def test_both_is_one_after_the_other_and_none_of_none(flip):
    shift = shift_and_flip(1 / 8, flip)
    assert both(None, None) is None and both(shift, None) is shift and both(None, shift) is shift
    torch.manual_seed(1)
    together = both(shift, disturb(PIXELS))(batch())["pixel_values"]
    torch.manual_seed(1)
    assert torch.equal(together, disturb(PIXELS)(shift(batch()))["pixel_values"])


def crops(image: np.ndarray, padding: int, mirrored: bool) -> set[bytes]:
    """All crops of an image (C, H, W) padded by reflection, or their mirror images."""
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
    height, width = image.shape[1:]
    shifts = range(2 * padding + 1)
    found = [padded[:, top : top + height, left : left + width] for top in shifts for left in shifts]
    return {np.ascontiguousarray(crop[..., ::-1] if mirrored else crop).tobytes() for crop in found}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 24)], ids=str)
def test_augmented_images_are_crops_within_the_reflected_border_mirrored_only_when_asked(flip, shape):
    pixels = torch.rand(60, *shape, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": pixels, "labels": torch.arange(60)}
    torch.manual_seed(0)
    changed = shift_and_flip(1 / 8, flip)(batch)
    assert changed["pixel_values"].shape == pixels.shape and changed["pixel_values"].is_contiguous()
    assert changed["labels"] is batch["labels"]
    padding = shape[1] // 8
    plain = mirrored = 0
    for before, after in zip(pixels.numpy(), changed["pixel_values"].numpy(), strict=True):
        plain += after.tobytes() in crops(before, padding, False)
        mirrored += after.tobytes() in crops(before, padding, True)
    assert plain + mirrored == 60
    assert (15 <= mirrored <= 45) if flip else (mirrored == 0)


def test_augmentation_is_decided_by_torchs_generator_and_leaves_its_input_alone():
    batch = {"pixel_values": torch.rand(20, 3, 8, 8)}
    found = batch["pixel_values"].clone()
    transform = shift_and_flip(1 / 8, True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, other = transform(batch), transform(batch)
    torch.set_rng_state(state)
    assert torch.equal(transform(batch)["pixel_values"], first["pixel_values"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    assert torch.equal(batch["pixel_values"], found)
