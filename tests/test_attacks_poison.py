"""Poisoned training sets and triggered test sets: which rows change, what is stored, what is refused."""

import random
from io import BytesIO

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from attack_cases import attack_of, every_attack, image_of

from hf_fip.attacks import BadNets, Blend, WaNet, make_attack, poison, trigger
from hf_fip.attacks.poison import to_array, to_png


def file_of(image: np.ndarray, file_format: str = "JPEG") -> bytes:
    file = BytesIO()
    PIL.Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, format=file_format)
    return file.getvalue()


def stored(dataset: datasets.Dataset, column: str = "image") -> list[dict]:
    return dataset.cast_column(column, datasets.Image(decode=False))[:][column]


def make_dataset(rows: int = 100, classes: int = 4, shapes=((12, 12, 3),), label_feature=None) -> datasets.Dataset:
    """JPEG files of random pixels; row i has class i mod `classes` and the shape i mod len(shapes)."""
    features = datasets.Features(
        image=datasets.Image(),
        label=label_feature or datasets.ClassLabel(names=[f"class {k}" for k in range(classes)]),
        row=datasets.Value("int32"),
    )
    columns = {
        "image": [{"bytes": file_of(image_of(shapes[i % len(shapes)], i)), "path": None} for i in range(rows)],
        "label": [i % classes for i in range(rows)],
        "row": list(range(rows)),
    }
    return datasets.Dataset.from_dict(columns, features=features)


# Poisoned training sets


@every_attack
@pytest.mark.parametrize("shapes", [[(12, 12, 3)], [(12, 12, 3), (9, 14, 1), (16, 10, 3)]], ids=["one size", "mixed"])
def test_poison_changes_the_chosen_rows_and_no_other_byte(case, shapes):
    attack, dataset = attack_of(case), make_dataset(shapes=shapes)
    poisoned = poison(dataset, attack, rate=0.1, seed=7)

    role = datasets.ClassLabel(names=["clean", "backdoor", "cover"])
    assert poisoned.features == {**dataset.features, "poison_role": role}
    assert poisoned["row"][:] == dataset["row"][:]
    roles = np.array(poisoned["poison_role"])
    assert list(np.bincount(roles, minlength=3)[1:]) == [10, round(100 * attack.cover_rate)]

    for old, new, file, new_file in zip(dataset, poisoned, stored(dataset), stored(poisoned), strict=True):
        if new["poison_role"] == 0:
            assert (new_file, new["label"]) == (file, old["label"])
            continue
        image = to_array(old["image"])
        assert new["image"].format == "PNG" and new["image"].mode == old["image"].mode
        if new["poison_role"] == 1:
            assert old["label"] != attack.target_label and new["label"] == attack.target_label
            np.testing.assert_array_equal(to_array(new["image"]), attack.apply(image))
        else:
            assert new["label"] == old["label"]
            assert (to_array(new["image"]) != attack.apply(image)).any()


def test_poison_writes_each_row_its_own_label_under_all_to_all():
    dataset = make_dataset()
    poisoned = poison(dataset, BadNets(label_rule="all_to_all"), rate=0.5, seed=0)
    old, new, roles = (np.array(column) for column in (dataset["label"], poisoned["label"], poisoned["poison_role"]))
    np.testing.assert_array_equal(new, np.where(roles == 1, (old + 1) % 4, old))
    assert set(old[roles == 1]) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["badnets", "wanet"])
def test_poison_is_decided_by_its_seed(name):
    dataset, attack = make_dataset(), make_attack(name)
    first, again, other = (poison(dataset, attack, rate=0.1, seed=seed) for seed in (1, 1, 2))
    assert stored(first) == stored(again) and first["poison_role"][:] == again["poison_role"][:]
    assert first["poison_role"][:] != other["poison_role"][:]


def test_covers_of_equal_images_differ():
    image = {"bytes": file_of(image_of((12, 12, 3)), "PNG"), "path": None}
    dataset = make_dataset(20).map(lambda row: {"image": image})
    poisoned = poison(dataset, WaNet(cover_rate=0.5), rate=0.1, seed=0)
    covers = [file["bytes"] for file, role in zip(stored(poisoned), poisoned["poison_role"], strict=True) if role == 2]
    assert len(set(covers)) == 10


@pytest.mark.parametrize("rate, count", [(0.5, 50), (0.29, 29), (0.014, 1), (0.75, 75)])
def test_the_number_of_backdoor_rows_is_the_rate_of_the_whole_set_rounded(rate, count):
    poisoned = poison(make_dataset(), BadNets(), rate=rate, seed=0)
    assert sum(poisoned["poison_role"]) == count


def test_global_random_states_are_neither_read_nor_changed():
    def everything():
        return stored(poison(dataset, WaNet(), rate=0.1, seed=0)), stored(trigger(dataset, Blend()))

    dataset = make_dataset(40)

    def seed_all():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed_all()
    expected = random.random(), np.random.random(), torch.rand(1).item()
    seed_all()
    first = everything()
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected
    assert everything() == first


def test_images_may_be_pil_paths_or_bytes(tmp_path):
    images = [image_of((10, 10, 3), i) for i in range(8)]
    files = [file_of(image, "PNG") for image in images]
    for i, file in enumerate(files):
        (tmp_path / f"{i}.png").write_bytes(file)
    sources = {
        "pil": [PIL.Image.fromarray(image) for image in images],
        "paths": [str(tmp_path / f"{i}.png") for i in range(8)],
        "bytes": [{"bytes": file, "path": None} for file in files],
    }
    results = {}
    for kind, source in sources.items():
        dataset = datasets.Dataset.from_dict({"picture": source, "y": [0, 1] * 4})
        dataset = dataset.cast_column("picture", datasets.Image())
        columns = {"image_column": "picture", "label_column": "y", "num_labels": 2}
        poisoned = poison(dataset, BadNets(), rate=0.25, seed=0, **columns)
        triggered = trigger(dataset, BadNets(), **columns)
        results[kind] = [to_array(image).tolist() for image in [*poisoned["picture"], *triggered["picture"]]]
        changed = np.flatnonzero(poisoned["poison_role"])
        assert all(stored(poisoned, "picture")[i]["path"] is None for i in changed)
    assert results["pil"] == results["paths"] == results["bytes"]


def test_poison_and_trigger_accept_shuffled_formatted_and_undecoded_data_sets():
    dataset = make_dataset(40)
    rows = np.random.default_rng(0).permutation(40)
    shuffled = dataset.select(rows).with_format("numpy")
    plain = dataset.select(rows).flatten_indices()
    undecoded = plain.cast_column("image", datasets.Image(decode=False))
    for make in (lambda data: poison(data, BadNets(), rate=0.2, seed=0), lambda data: trigger(data, BadNets())):
        expected = make(plain)
        for variant in (shuffled, undecoded):
            result = make(variant)
            assert result["row"][:] == expected["row"][:] and result["label"][:] == expected["label"][:]
            for one, other in zip(result.cast_column("image", datasets.Image()), expected, strict=True):
                np.testing.assert_array_equal(to_array(one["image"]), to_array(other["image"]))
        assert make(undecoded).features["image"] == datasets.Image(decode=False)


def test_a_poisoned_set_survives_being_saved(tmp_path):
    poisoned = poison(make_dataset(), WaNet(), rate=0.1, seed=0)
    poisoned.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    assert loaded.features == poisoned.features
    assert stored(loaded) == stored(poisoned) and loaded["label"][:] == poisoned["label"][:]


# Triggered test sets


@every_attack
def test_trigger_keeps_the_rows_that_count_with_their_true_labels(case):
    attack, dataset = attack_of(case), make_dataset(shapes=[(12, 12, 3), (9, 14, 1)])
    triggered = trigger(dataset, attack)
    assert triggered.features == dataset.features
    assert triggered["row"][:] == [row for row in range(100) if row % 4 != attack.target_label]
    for new in triggered:
        old = dataset[new["row"]]
        assert new["label"] == old["label"] and new["image"].format == "PNG"
        assert new["image"].mode == old["image"].mode
        np.testing.assert_array_equal(to_array(new["image"]), attack.apply(to_array(old["image"])))


def test_trigger_keeps_every_row_under_all_to_all():
    assert len(trigger(make_dataset(20), BadNets(label_rule="all_to_all"))) == 20


# Images


@pytest.mark.parametrize(
    "mode, channels",
    [("L", 1), ("1", 1), ("LA", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3), ("YCbCr", 3)],
)
def test_every_mode_becomes_gray_or_rgb_and_survives_png(mode, channels):
    image = PIL.Image.new(mode, (6, 4))
    array = to_array(image)
    assert array.shape == (4, 6, channels) and array.dtype == np.uint8
    noise = image_of(array.shape)
    np.testing.assert_array_equal(to_array(PIL.Image.open(BytesIO(to_png(noise)))), noise)


def test_sixteen_bit_gray_is_scaled_to_eight():
    deep = PIL.Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16))
    file = BytesIO()
    deep.save(file, format="PNG")
    for image in (deep, PIL.Image.open(file)):
        np.testing.assert_array_equal(to_array(image)[..., 0], [[0, 0, 1, 255]])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_unknown_range_are_refused(mode):
    with pytest.raises(ValueError, match="convert them to 8 bits first"):
        to_array(PIL.Image.new(mode, (4, 4)))


# Errors


def renamed(dataset):
    return dataset.rename_column("image", "img")


def retyped(column, feature):
    return lambda dataset: dataset.remove_columns(column).add_column(column, feature)


def without_images(dataset):
    return datasets.Dataset.from_dict({**dataset[:], "image": [None] * len(dataset)}, features=dataset.features)


BOTH_ERRORS = {
    "target": (lambda d: d, BadNets(target_label=4), {}, "target_label=4 is not a class: choose one of 0 ... 3"),
    "image column": (renamed, BadNets(), {}, "no column 'image': the columns are img, label, row"),
    "label column": (
        lambda d: d,
        BadNets(),
        {"label_column": "y"},
        "no column 'y': the columns are image, label, row",
    ),
    "not images": (lambda d: d, BadNets(), {"image_column": "row"}, r"cast_column\('row', datasets.Image\(\)\)"),
    "missing images": (without_images, BadNets(), {}, r"no image \(None\).*dataset.filter"),
    "text labels": (retyped("label", ["cat", "dog"] * 50), BadNets(), {}, r"class_encode_column\('label'\)"),
    "float labels": (retyped("label", [0.5] * 100), BadNets(), {}, "does not hold an integer in each row"),
    "missing labels": (retyped("label", [0, None] * 50), BadNets(), {}, "does not hold an integer in each row"),
    "hidden labels": (retyped("label", [-1] * 100), BadNets(), {"num_labels": 4}, "labels from -1 to -1 do not fit 4"),
    "too few classes": (lambda d: d, BadNets(), {"num_labels": 3}, "labels from 0 to 3 do not fit 3 classes"),
    "unknown classes": (retyped("label", [0, 1] * 50), BadNets(), {}, "pass num_labels="),
    "patch": (
        lambda d: d,
        BadNets(patch_size=13),
        {},
        "patch_size=13 does not fit .* 12×12 pixels: choose 12 or less",
    ),
}


@pytest.mark.parametrize("what", BOTH_ERRORS)
def test_poison_and_trigger_refuse_what_they_cannot_use(what):
    prepare, attack, options, message = BOTH_ERRORS[what]
    dataset = prepare(make_dataset())
    for make in (
        lambda: poison(dataset, attack, rate=0.1, seed=0, **options),
        lambda: trigger(dataset, attack, **options),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "attack, rate, message",
    [
        (BadNets(), -0.1, "rate=-0.1 is a share"),
        (BadNets(), 1.5, "rate=1.5 is a share"),
        (BadNets(), float("nan"), "rate=nan is a share"),
        (BadNets(), 0, r"rate=0 is a share of the data set: choose it in \(0, 1\]"),
        (BadNets(), 0.001, "no row at all: choose a higher rate"),
        (BadNets(), 0.8, "asks for 80 rows, but only 75 of 100 can be used: choose 0.75 or less"),
        (WaNet(cover_rate=0.001), 0.1, "cover_rate=0.001 of 100 rows is no row at all"),
        (WaNet(cover_rate=0.6), 0.5, "cover_rate=0.6 asks for 60 rows, but only 50"),
    ],
)
def test_poison_refuses_rates_that_cannot_be_met(attack, rate, message):
    with pytest.raises(ValueError, match=message):
        poison(make_dataset(), attack, rate=rate, seed=0)


def test_a_set_is_not_poisoned_twice():
    poisoned = poison(make_dataset(), BadNets(), rate=0.1, seed=0)
    with pytest.raises(ValueError, match="poison the clean data set"):
        poison(poisoned, Blend(), rate=0.1, seed=0)


def test_trigger_refuses_a_set_without_a_row_that_counts():
    dataset = make_dataset().filter(lambda row: row["label"] == 0)
    with pytest.raises(ValueError, match="every row is of the attacked class"):
        trigger(dataset, BadNets())


def test_a_set_of_splits_is_refused():
    with pytest.raises(TypeError, match="not DatasetDict: pass one split"):
        trigger(datasets.DatasetDict(test=make_dataset(4)), BadNets())
