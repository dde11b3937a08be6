"""The image task: what a model is fed, which models are taken, and how classes are matched."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

from hf_fip.tasks import image_classification
from hf_fip.tasks.data import LabelledImages
from hf_fip.tasks.image_architectures import small_model, small_resnet, small_vit
from hf_fip.tasks.image_classification import PixelDataset, load_image_classifier, match_labels

MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "I;16")


def picture(mode: str = "RGB", size: tuple[int, int] = (9, 7), seed: int = 0) -> Pillow.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode == "I;16":
        return Pillow.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Pillow.fromarray(pixels).convert(mode)


def dataset_of(pictures: list, names: list[str] = ("a", "b"), labels: list[int] | None = None) -> Dataset:
    def stored(image) -> dict:
        file = io.BytesIO()
        image.save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    images = [{"bytes": image, "path": None} if isinstance(image, bytes) else stored(image) for image in pictures]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": images, "label": labels or [0] * len(images)}, features=features)


def images_of(names: list[str], labels: list[int], mode: str = "RGB", size=(9, 7)) -> LabelledImages:
    pictures = [picture(mode, size, seed) for seed in range(len(labels))]
    part = dataset_of(pictures, names, labels)
    return LabelledImages(part, part, "some images")


def processor_of(channels: int, side: int = 8) -> ViTImageProcessor:
    size = {"height": side, "width": side}
    return ViTImageProcessor(size=size, image_mean=[0.5] * channels, image_std=[0.25] * channels)


# What a model is fed


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_sees_what_its_processor_makes_of_the_image_in_the_models_channels(mode, channels):
    image = picture(mode)
    seen = PixelDataset(dataset_of([image]), processor_of(channels), channels)[0]["pixel_values"]
    wanted = image.convert("L" if channels == 1 else "RGB")
    array = np.asarray(wanted)[..., None] if channels == 1 else np.asarray(wanted)
    expected = processor_of(channels)(array, return_tensors="pt", input_data_format="channels_last").pixel_values[0]
    assert seen.shape == (channels, 8, 8) and seen.dtype == torch.float32
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_rescaled_and_normalised(channels):
    flat = Pillow.new("L", (8, 8), 51)
    seen = PixelDataset(dataset_of([flat]), processor_of(channels), channels)[0]["pixel_values"]
    torch.testing.assert_close(seen, torch.full((channels, 8, 8), (0.2 - 0.5) / 0.25))


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_mixed_modes_and_sizes_make_one_batch(channels):
    pictures = [picture(mode, (6 + i, 9 - i), seed=i) for i, mode in enumerate(MODES)]
    items = PixelDataset(dataset_of(pictures), processor_of(channels), channels)
    assert torch.stack([item["pixel_values"] for item in items]).shape == (len(MODES), channels, 8, 8)


def test_a_16_bit_picture_is_not_clipped():
    seen, eight = PixelDataset(dataset_of([picture("I;16"), picture("RGB").getchannel(0)]), processor_of(1), 1)
    assert torch.equal(seen["pixel_values"], eight["pixel_values"])


def test_items_are_the_same_kept_in_memory_and_made_when_asked_for(monkeypatch):
    dataset = dataset_of([picture(seed=seed) for seed in range(5)], labels=[0, 1, 1, 0, 1])
    kept = PixelDataset(dataset, processor_of(3))
    monkeypatch.setattr(image_classification, "_KEEP_IN_MEMORY", 0)
    made = PixelDataset(dataset, processor_of(3))
    assert kept._pixels is not None and made._pixels is None
    assert len(kept) == len(made) == 5
    for i in range(5):
        assert torch.equal(kept[i]["pixel_values"], made[i]["pixel_values"])
        assert kept[i]["labels"] == made[i]["labels"] == [0, 1, 1, 0, 1][i]


def bad_bytes() -> bytes:
    return b"not an image"


def bad_end() -> bytes:
    file = io.BytesIO()
    picture(size=(90, 70)).save(file, "PNG")
    return file.getvalue()[:-4000]


def bad_middle() -> bytes:
    file = io.BytesIO()
    picture(size=(90, 70)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[500:520] = bytes(20)
    return bytes(data)


@pytest.mark.parametrize("damage", [bad_bytes, bad_end, bad_middle], ids=lambda make: make.__name__)
@pytest.mark.parametrize("memory", [2**30, 0], ids=["kept", "made"])
def test_a_damaged_picture_is_named_by_its_row(damage, memory, monkeypatch):
    monkeypatch.setattr(image_classification, "_KEEP_IN_MEMORY", memory)
    with pytest.raises(ValueError, match="Image 2 of the data set cannot be read"):
        PixelDataset(dataset_of([picture(), picture(), damage()]), processor_of(3))


def test_a_model_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="4 channels"):
        PixelDataset(dataset_of([picture()]), processor_of(4), 4)


# Which models are taken


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small ViT and a small ResNet with their processors."""
    root = tmp_path_factory.mktemp("models")
    for name, build in (("vit", small_vit), ("resnet", small_resnet)):
        model, processor = build(["a", "b"], 8, 1)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.fixture
def spoiled(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "vit", tmp_path / "model"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_saved_classifier_loads_with_its_processor(saved, name):
    model, processor = load_image_classifier(str(saved / name))
    pixels = PixelDataset(dataset_of([picture()]), processor, 1)[0]["pixel_values"]
    assert model.config.id2label == {0: "a", 1: "b"}
    assert model(pixel_values=pixels[None]).logits.shape == (1, 2)


def test_a_model_stored_in_half_precision_is_loaded_in_full(saved, spoiled):
    model, _ = load_image_classifier(str(saved / "vit"))
    model.half().save_pretrained(spoiled)
    assert {p.dtype for p in load_image_classifier(str(spoiled))[0].parameters()} == {torch.float32}


def only_a_body(folder):
    ViTModel(
        ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(folder)


def only_a_body_that_says_otherwise(folder):
    only_a_body(folder)
    edit_config(folder, architectures=["ViTForImageClassification"])


def a_language_model(folder):
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)).save_pretrained(
        folder
    )


def a_language_model_that_says_otherwise(folder):
    a_language_model(folder)
    edit_config(folder, architectures=["ViTForImageClassification"])


def only_pickled_weights(folder):
    model, _ = load_image_classifier(str(folder))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def weights_cut_off(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)


def a_weight_missing(folder):
    model, _ = load_image_classifier(str(folder))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "classifier.weight"}
    model.save_pretrained(folder, state_dict=tensors)


REFUSED = {
    "only a body": (only_a_body, "ViTModel, which lacks the head of a ...ForImageClassification"),
    "only a body, saying otherwise": (only_a_body_that_says_otherwise, "lacks 2 weights, among them classifier"),
    "a language model": (a_language_model, "BertModel, which lacks the head"),
    "a language model, saying otherwise": (a_language_model_that_says_otherwise, "lacks|cannot be loaded"),
    "pickled weights": (only_pickled_weights, "no file named model.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights cut off": (weights_cut_off, "model.safetensors is no whole safetensors file"),
    "a weight missing": (a_weight_missing, "lacks 1 weights, among them classifier.weight"),
    "weights of another size": (lambda folder: edit_config(folder, hidden_size=96), "do not fit its config.json"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "No model at .*config.json cannot be read"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "a wrong value": (lambda folder: edit_config(folder, hidden_size="wide"), "No model at"),
    "wrong architectures": (lambda folder: edit_config(folder, architectures=[3]), "architecture '3'"),
    "an unknown kind": (lambda folder: edit_config(folder, model_type="secret"), "No model at .*secret"),
    "code of its own": (
        lambda folder: edit_config(folder, model_type="secret", auto_map={"AutoConfig": "code.Config"}),
        "needs code of its own, which is not run",
    ),
    "no architecture": (lambda folder: edit_config(folder, architectures=None), "architecture 'none'"),
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "--image_processor_name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_these_models_are_refused_with_one_clear_error(spoiled, case):
    spoil, message = REFUSED[case]
    spoil(spoiled)
    with pytest.raises(ValueError, match=message):
        load_image_classifier(str(spoiled))


@pytest.mark.parametrize("name", ["./nowhere", "no such name!", "a/b/c", ""])
def test_what_cannot_be_a_model_is_refused(name):
    with pytest.raises(ValueError, match="No model at "):
        load_image_classifier(name)


def test_the_processor_may_come_from_elsewhere(saved, spoiled):
    (spoiled / "preprocessor_config.json").unlink()
    _, processor = load_image_classifier(str(spoiled), str(saved / "resnet"))
    assert processor.size["height"] == 8


# Which class is which


def model_of(names: list[str]) -> torch.nn.Module:
    return small_vit(names, 8, 1)[0]


MATCHES = {  # classes of the model, of the data; labels of the data, in the model's numbers
    "the same": (["cat", "dog"], ["cat", "dog"], [0, 1, 1], [0, 1, 1]),
    "another order": (["dog", "cat"], ["cat", "dog"], [0, 1, 1], [1, 0, 0]),
    "some of the model's": (["cow", "dog", "cat"], ["cat", "dog"], [0, 1, 1], [2, 1, 1]),
    "other names": (["LABEL_0", "LABEL_1", "LABEL_2"], ["cat", "dog"], [0, 1, 1], [0, 1, 1]),
}


@pytest.mark.parametrize("case", MATCHES)
def test_classes_are_matched_by_name_where_the_model_knows_all_names(case):
    model_names, data_names, labels, expected = MATCHES[case]
    matched = match_labels(images_of(data_names, labels), model_of(model_names))
    assert matched.train["label"][:] == matched.test["label"][:] == expected
    assert matched.name == "some images"


def test_a_model_that_uses_one_name_twice_is_matched_by_number():
    model = model_of(["a", "b", "c"])
    model.config.id2label = {0: "crane", 1: "crane", 2: "dog"}
    assert match_labels(images_of(["dog", "crane"], [0, 1]), model).train["label"][:] == [0, 1]


def test_a_model_that_has_only_some_classes_of_the_data_by_name_is_refused():
    with pytest.raises(ValueError, match="some classes of some images by name, but not cat: it answers dog, cow"):
        match_labels(images_of(["cat", "dog"], [0, 1]), model_of(["dog", "cow"]))


def test_more_classes_than_the_model_answers_are_refused():
    with pytest.raises(ValueError, match="some images has 3 classes and the model answers 2"):
        match_labels(images_of(["x", "y", "z"], [0, 1, 2]), model_of(["a", "b"]))


# Small models and augmentation


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
@pytest.mark.parametrize(
    "mode, size", [("L", (8, 8)), ("RGB", (32, 32)), ("L", (30, 21)), ("RGBA", (300, 200))], ids=str
)
def test_a_small_model_fits_the_images(architecture, mode, size):
    images = images_of(["a", "b", "c"], [0, 1, 2], mode, size)
    model, processor = small_model(architecture, images)
    pixels = PixelDataset(images.train, processor, model.config.num_channels)[0]["pixel_values"]
    assert pixels.shape[0] == (1 if mode == "L" else 3)
    assert pixels.shape[1] == pixels.shape[2] == min(max(size), 64)
    assert model(pixel_values=pixels.repeat(2, 1, 1, 1)).logits.shape == (2, 3)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
