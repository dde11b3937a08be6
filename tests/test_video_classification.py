"""Clips as model inputs, changes that are the same in all frames, the small models, and the picture of a trigger."""

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForVideoClassification, ViTImageProcessor
from video_cases import CLASSES, FRAMES, MODELS, SIDE, clip, clips_of, cnn_lstm, processor, videomae

from hf_fip.attacks.clips import poison_clips, to_clip
from hf_fip.attacks.frame_triggers import FrameBadNets
from hf_fip.evaluation.reactivation import PixelRange
from hf_fip.plots_video import plot_clip_triggers
from hf_fip.tasks.augmentation import disturb, shift_and_flip
from hf_fip.tasks.video_classification import (
    ARCHITECTURES,
    ClipDataset,
    FrameProcessor,
    clip_material,
    collate_clips,
    load_video_classifier,
    match_clips,
    on_frames,
    small_video_model,
)
from hf_fip.tasks.video_data import LabelledClips


def data_of(**shape) -> LabelledClips:
    return LabelledClips(clips_of(9, **shape), clips_of(6, **shape), "clips")


def as_pixels(array: np.ndarray) -> torch.Tensor:
    """What a processor with mean and deviation 1/2 makes of a clip."""
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1


# ---- Model inputs ----


def image_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@pytest.mark.parametrize("make", [processor, image_processor], ids=["of clips", "of images"])
def test_a_processor_of_clips_and_one_of_images_give_the_same_inputs(make):
    dataset = clips_of(5)
    items = ClipDataset(dataset, make())
    assert len(items) == 5 and [item["labels"] for item in items] == dataset["label"][:]
    for item, row in zip(items, dataset, strict=True):
        torch.testing.assert_close(item["pixel_values"], as_pixels(to_clip(row["frames"])), atol=1e-5, rtol=0)
    black_and_white = PixelRange.of(FrameProcessor(make()), SIDE, SIDE, 3)
    assert (black_and_white.black == -1).all() and (black_and_white.white == 1).all()


def test_frames_become_gray_or_rgb_as_the_model_wants_them():
    gray = ClipDataset(clips_of(2, channels=1), processor())[0]["pixel_values"]
    assert gray.shape == (FRAMES, 3, SIDE, SIDE) and torch.equal(gray[:, 0], gray[:, 2])
    assert ClipDataset(clips_of(2), processor(channels=1), channels=1)[0]["pixel_values"].shape[1] == 1
    with pytest.raises(ValueError, match="5 channels"):
        ClipDataset(clips_of(2), processor(), channels=5)


def test_what_is_not_kept_in_memory_is_the_same(monkeypatch):
    kept = ClipDataset(clips_of(3), processor())
    monkeypatch.setattr("hf_fip.tasks.image_classification._KEEP_IN_MEMORY", 0)
    made = ClipDataset(clips_of(3), processor())
    assert kept._pixels is not None and made._pixels is None
    assert all(torch.equal(kept[row]["pixel_values"], made[row]["pixel_values"]) for row in range(3))


@pytest.mark.parametrize("memory", [2**30, 0], ids=["kept", "made"])
def test_a_frame_that_breaks_after_loading_is_named(memory, monkeypatch):
    monkeypatch.setattr("hf_fip.tasks.image_classification._KEEP_IN_MEMORY", memory)
    dataset = clips_of(4)
    stored = dataset.cast_column("frames", datasets.List(datasets.Image(decode=False)))["frames"][:]
    stored[2] = [{"bytes": b"broken", "path": None}]
    broken = Dataset.from_dict({"frames": stored, "label": dataset["label"][:]}, dataset.features)
    with pytest.raises(ValueError, match="Clip 2 of the data set cannot be read"):
        ClipDataset(broken, processor())


def test_roles_of_a_poisoned_set_come_with_it():
    poisoned = poison_clips(clips_of(9), FrameBadNets(), 0.2, 0)
    items = ClipDataset(poisoned, processor())
    assert items.roles.sum() == 2 and sum(items[row]["roles"] for row in range(9)) == 2


def test_a_ragged_batch_is_stretched_to_its_longest_clip():
    items = [{"pixel_values": torch.arange(n).float().view(n, 1, 1, 1), "labels": n} for n in (2, 4, 3)]
    made = collate_clips(items)
    assert made["labels"].tolist() == [2, 4, 3]
    assert made["pixel_values"].flatten(1).tolist() == [[0, 0, 1, 1], [0, 1, 2, 3], [0, 1, 1, 2]]


def test_models_answer_a_ragged_batch():
    batch = collate_clips([{"pixel_values": torch.randn(n, 3, SIDE, SIDE), "labels": 0} for n in (1, 3, FRAMES)])
    for make in MODELS.values():
        assert make()(**batch).logits.shape == (3, CLASSES)


# ---- The same change in all frames ----


def still(frames: int = FRAMES, rows: int = 6) -> torch.Tensor:
    """Clips whose frames are all the same."""
    images = torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return images[:, None].expand(-1, frames, -1, -1, -1)


CHANGES = {
    "shifts": shift_and_flip(1 / 4, flip=True),
    "disturbances": disturb(PixelRange(torch.zeros(3, 16, 16), torch.ones(3, 16, 16))),
}


@pytest.mark.parametrize("case", CHANGES)
def test_all_frames_of_a_clip_are_changed_alike_and_as_an_image_would_be(case):
    change, clips = CHANGES[case], still()
    torch.manual_seed(0)
    found = on_frames(change)({"pixel_values": clips, "labels": 7})
    after = torch.get_rng_state()
    assert found["labels"] == 7 and found["pixel_values"].shape == clips.shape
    assert (found["pixel_values"] == found["pixel_values"][:, :1]).all()
    torch.manual_seed(0)
    assert torch.equal(found["pixel_values"][:, 0], change({"pixel_values": clips[:, 0]})["pixel_values"])
    assert torch.equal(torch.get_rng_state(), after)  # as if there had been one image
    changed = (found["pixel_values"] != clips).flatten(1).any(dim=1)
    assert changed.float().mean() > 0.5
    assert not torch.equal(on_frames(change)({"pixel_values": clips})["pixel_values"], found["pixel_values"])


def test_the_motion_of_a_clip_survives():
    clips = torch.rand(4, FRAMES, 3, 16, 16)
    shifted = on_frames(shift_and_flip(1 / 8, flip=False))({"pixel_values": clips})["pixel_values"]
    for clean, moved in zip(clips, shifted, strict=True):
        places = [(down, across) for down in range(5) for across in range(5)]
        inner = moved[..., 2:14, 2:14]
        assert any(torch.equal(inner, clean[..., y : y + 12, x : x + 12]) for y, x in places)  # one shift for all


# ---- What an attacker works with ----


def test_the_attackers_material_holds_the_clips_and_the_size_of_a_frame():
    dataset = clips_of(4, height=20, width=12)
    material = clip_material(dataset, CLASSES, processor(), 3, clean_model=cnn_lstm)
    assert material.images is dataset and material.size == (SIDE, SIDE, 3)
    pixels = torch.rand(2, FRAMES, 3, SIDE, SIDE)
    model = material.classifier.model
    torch.testing.assert_close(material.classifier(pixels), model(2 * pixels - 1).logits)
    cropping = processor()
    cropping.do_center_crop, cropping.crop_size = True, {"height": 4, "width": 4}
    with pytest.raises(ValueError, match="cropping"):
        clip_material(dataset, CLASSES, cropping, 3)


# ---- Models ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [{}, {"frames": 3, "height": 30, "width": 70, "channels": 1}], ids=["tiny", "odd"])
def test_a_small_model_is_made_saved_and_loaded(architecture, shape, tmp_path):
    data = data_of(**shape)
    model, made_for = small_video_model(architecture, data)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    model.save_pretrained(tmp_path)
    made_for.save_pretrained(tmp_path)
    again, its_processor = load_video_classifier(str(tmp_path))
    assert type(again) is type(AutoModelForVideoClassification.from_pretrained(tmp_path)) is type(model)
    channels = shape.get("channels", 3)
    batch = collate_clips([ClipDataset(data.train, its_processor, channels)[row] for row in range(3)])
    assert batch["pixel_values"].shape[2:] == ((3, 8, 8) if not shape else (1, 64, 64))
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_what_is_no_classifier_of_clips_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No model"):
        load_video_classifier(str(tmp_path / "nothing"))
    videomae().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--image_processor_name"):
        load_video_classifier(str(tmp_path))
    processor().save_pretrained(tmp_path / "other")
    assert type(load_video_classifier(str(tmp_path), str(tmp_path / "other"))[0]).__name__.startswith("VideoMAE")


def test_a_model_of_another_number_of_frames_says_how_many():
    data = data_of(frames=6)
    with pytest.raises(ValueError, match="clips of 4 frames, not 6: set --num_frames 4"):
        match_clips(data, videomae())
    assert match_clips(data, cnn_lstm()).num_frames == 6


def test_classes_are_numbered_as_the_model_numbers_them():
    model = cnn_lstm()
    model.config.id2label = {0: "2", 1: "0", 2: "1"}
    matched = match_clips(data_of(), model)
    assert matched.class_names == ["2", "0", "1"] and matched.train["label"][:4] == [1, 2, 0, 1]


# ---- The picture ----


def example(name: str = "run", frames: int = 10, **answers) -> dict:
    clean = clip(frames, 12, 10)
    return {"clean": clean, "triggered": FrameBadNets().apply(clean), "label": name, **answers}


def vermillion(path) -> int:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return (np.abs(pixels - [0xD5, 0x5E, 0x00]).sum(axis=-1) < 60).sum()


def test_the_picture_shows_frames_and_answers(tmp_path):
    fooled, right = {"clean": "run", "triggered": "jump"}, {"clean": "run", "triggered": "run"}
    rows = [example(before=fooled, after=right), example(frames=3, before=fooled, after=right)]
    path = plot_clip_triggers(rows, tmp_path / "deep" / "a.png", target="jump", title="Trigger: frame_badnets")
    with Image.open(path) as picture:
        assert picture.size[0] > 1000
    plain = [{**row, "before": right} for row in rows]
    other = plot_clip_triggers(plain, tmp_path / "b.png", target="jump")
    assert vermillion(path) > vermillion(other) + 100


@pytest.mark.parametrize(
    "rows",
    [[], [{**example(answer={}), "clean": clip(10)}], [{**example(answer={}), "clean": clip(10, 12, 10) / 255}]],
    ids=["nothing", "another size", "no pixels"],
)
def test_a_picture_of_nothing_or_of_no_clips_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="plot_clip_triggers"):
        plot_clip_triggers(rows, tmp_path / "a.png", target="jump")
