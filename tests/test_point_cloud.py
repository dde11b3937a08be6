"""Point clouds from every layout that is read, what becomes of those that are broken, and their pictures."""

import sys
from io import BytesIO
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from cloud_cases import cloud, clouds_of
from datasets import Array2D, ClassLabel, Dataset, Features, Value
from PIL import Image

from hf_fip.plots_cloud import plot_cloud_triggers
from hf_fip.tasks.clouds import load_clouds, normalised, read_off, sample_surface
from hf_fip.tasks.point_cloud import (
    CloudDataset,
    arrays_of,
    collate_clouds,
    load_cloud_classifier,
    scale_and_jitter,
    small_cloud_model,
)
from hf_fip.tasks.shapes import SHAPES, make_shapes

TETRAHEDRON = "4 4 6\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
SQUARE = "4 1 4\n0 0 0\n2 0 0\n2 2 0\n0 2 0\n4 0 1 2 3\n"


# ---- Meshes ----


@pytest.mark.parametrize("header", ["OFF\n", "OFF", "# a comment\nOFF\n# another\n"])
def test_an_off_mesh_is_read_with_its_header_on_its_own_line_or_glued_to_the_counts(header, tmp_path):
    file = tmp_path / "a.off"
    file.write_text(header + TETRAHEDRON)
    points, triangles = read_off(file)
    assert points.shape == (4, 3) and triangles.tolist() == [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]
    file.write_text(header + SQUARE.replace("4 0 1 2 3", "4 0 1 2 3 0.5 0.5 0.5"))  # with a colour
    assert read_off(file)[1].tolist() == [[0, 1, 2], [0, 2, 3]]


def test_points_are_drawn_evenly_from_the_surface():
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [8, 0, 0], [5, 1, 0]], dtype=float)
    drawn = sample_surface(corners, np.array([[0, 1, 2], [3, 4, 5]]), 4000, np.random.default_rng(0))
    assert (drawn[:, 2] == 0).all() and (drawn[:, :2] >= 0).all()
    assert np.mean(drawn[:, 0] > 4) == pytest.approx(0.75, abs=0.03)  # three times the area
    small = drawn[drawn[:, 0] < 4]
    assert (small.sum(axis=1) <= 1 + 1e-9).all()
    np.testing.assert_allclose(small.mean(axis=0), [1 / 3, 1 / 3, 0], atol=0.03)


# ---- Layouts ----


def write_off(folder) -> None:
    for name, text in (("cube", SQUARE), ("cone", TETRAHEDRON)):
        for split, count in (("train", 3), ("test", 2)):
            (folder / name / split).mkdir(parents=True)
            for number in range(count):
                (folder / name / split / f"{name}_{number}.off").write_text("OFF\n" + text)


def write_npy(folder) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for place, name in enumerate(("cone", "cube")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                normals = np.zeros((40, 3), np.float32)
                points = np.concatenate([cloud(40, 10 * place + number), normals], axis=1)
                np.save(folder / split / name / f"{number}.npy", points)


def write_parquet(folder) -> None:
    features = Features(
        points=Array2D((40, 3), "float32"), label=ClassLabel(names=["cone", "cube"]), id=Value("string")
    )
    for split, count in (("train", 6), ("test", 4)):
        rows = {"points": [cloud(40, row) for row in range(count)], "label": [row % 2 for row in range(count)]}
        Dataset.from_dict({**rows, "id": ["x"] * count}, features).to_parquet(folder / f"{split}.parquet")


LAYOUTS = {"OFF meshes, class/split": write_off, "NumPy files, split/class": write_npy, "parquet": write_parquet}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_clouds_in_the_unit_sphere(layout, tmp_path):
    LAYOUTS[layout](tmp_path)
    data = load_clouds(str(tmp_path), num_points=30)
    assert data.class_names == ["cone", "cube"] and (len(data.train), len(data.test)) == (6, 4) and not data.left_out
    for points in arrays_of(data.train) + arrays_of(data.test):
        assert points.shape == (30, 3) and points.dtype == np.float32
        np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-6)
        assert np.linalg.norm(points, axis=1).max() == pytest.approx(1)
    again, other = (load_clouds(str(tmp_path), num_points=30, seed=seed) for seed in (0, 1))
    assert all(np.array_equal(*pair) for pair in zip(arrays_of(again.train), arrays_of(data.train), strict=True))
    assert not np.array_equal(arrays_of(other.train)[0], arrays_of(data.train)[0])


class Opened(dict):
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_hdf5_files_as_modelnet40_has_them_are_read_where_h5py_is(tmp_path, monkeypatch):
    content = {}
    for name, rows in (("ply_data_train0", 3), ("ply_data_train1", 2), ("ply_data_test0", 2)):
        data = np.stack([cloud(20, row) for row in range(rows)])
        content[str(tmp_path / f"{name}.h5")] = {"data": data, "label": np.arange(rows)[:, None] % 2}
    content[str(tmp_path / "broken_train.h5")] = {"data": np.zeros((2, 20, 3)), "label": np.zeros((1, 1))}
    for path in content:
        open(path, "w").close()
    (tmp_path / "shape_names.txt").write_text("airplane\nbathtub\n")
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=lambda path, mode: Opened(content[str(path)])))
    found = load_clouds(str(tmp_path), num_points=20)
    assert found.class_names == ["airplane", "bathtub"] and (len(found.train), len(found.test)) == (5, 2)
    assert found.left_out == ["broken_train.h5: it has 2 clouds and 1 labels"]
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="pip install h5py"):
        load_clouds(str(tmp_path))


def test_hdf5_files_of_more_columns_give_their_first_three_and_those_of_another_shape_are_left_out(
    tmp_path, monkeypatch
):
    points = np.stack([cloud(20, row) for row in range(4)])
    content = {
        "train0": np.concatenate([points, np.full_like(points, 7)], axis=2),
        "test0": points,
        "train_of_two_columns": points[..., :2],
        "train_of_one_cloud": points[0],
        "train_of_text": points.astype(str),
    }
    for name in content:
        (tmp_path / f"{name}.h5").touch()

    def opened(path, mode):
        return Opened(data=content[path.stem], label=np.arange(len(content[path.stem])))

    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=opened))
    found = load_clouds(str(tmp_path))
    assert found.train["label"][:] == found.test["label"][:] == [0, 1, 2, 3]
    for part in (found.train, found.test):
        np.testing.assert_array_equal(arrays_of(part), [normalised(one) for one in points])
    assert found.left_out == [
        "train_of_one_cloud.h5: it has the shape (20, 3), not (n, N, 3 or more)",
        f"train_of_text.h5: it holds {content['train_of_text'].dtype}, not numbers",
        "train_of_two_columns.h5: it has the shape (4, 20, 2), not (n, N, 3 or more)",
    ]


def test_shapes_are_made_in_every_class_and_always_the_same():
    data = load_clouds(max_train_samples=40, max_test_samples=16, num_points=64)
    assert data.class_names == sorted(SHAPES) and {len(points) for points in arrays_of(data.train)} == {64}
    (first, names), (again, _) = make_shapes()["train"], make_shapes()["train"]
    assert {name: names.count(name) for name in names} == dict.fromkeys(SHAPES, 60)
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))


def test_a_cloud_of_few_points_stays_as_it_is():
    features = Features(
        points=datasets.List(datasets.List(Value("float32"), length=3)), label=ClassLabel(num_classes=2)
    )
    rows = {"points": [cloud(4 + row).tolist() for row in range(8)], "label": [0, 1] * 4}
    assert {len(points) for points in arrays_of(loaded(Dataset.from_dict(rows, features)))} <= set(range(4, 7))


def loaded(dataset: Dataset, **options) -> Dataset:
    """The training clouds of a data set that the Hub has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_fip.tasks.clouds.load_splits", lambda *args, **kwargs: datasets.DatasetDict(train=dataset))
        return load_clouds("someone/clouds", num_points=6, **options).train


# ---- What is broken ----


BROKEN_FILES = {
    "cut off": ("OFF\n" + TETRAHEDRON[:30], "it ends too early"),
    "cut off after the header": ("OFF\n", "it ends too early"),
    "another format": ("ply\nformat ascii 1.0\n", "does not begin with OFF"),
    "a vertex that is not there": ("OFF\n3 1 3\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "not there"),
    "no face": ("OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "no surface"),
    "no area": ("OFF\n3 1 3\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "no surface"),
    "words for numbers": ("OFF\n3 1 3\na b c\n0 0 0\n0 1 0\n3 0 1 2\n", "could not convert"),
    "empty": ("", "does not begin with OFF"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_mesh_is_left_out_and_counted(case, tmp_path):
    text, message = BROKEN_FILES[case]
    write_off(tmp_path)
    (tmp_path / "cube" / "train" / "broken.off").write_text(text)
    data = load_clouds(str(tmp_path), num_points=10)
    assert len(data.train) == 6 and len(data.left_out) == 1
    assert data.left_out[0].startswith("cube/train/broken.off: ") and message in data.left_out[0]


@pytest.mark.parametrize(
    "array", [np.zeros((5, 2)), np.zeros(7), np.array([{}], dtype=object), np.array([["a", "b", "c"]])]
)
def test_a_broken_numpy_file_is_left_out_and_no_pickle_is_read(array, tmp_path):
    write_npy(tmp_path)
    np.save(tmp_path / "train" / "cube" / "broken.npy", array, allow_pickle=True)
    data = load_clouds(str(tmp_path), num_points=10)
    assert len(data.train) == 6 and [line.split(":")[0] for line in data.left_out] == ["train/cube/broken.npy"]


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def npz() -> bytes:
    np.savez(file := BytesIO(), points=cloud(5))
    return file.getvalue()


DAMAGED = {
    "empty": b"",
    "an archive of arrays": npz(),
    "an archive cut off": npz()[:60],
    "a header cut off": npy("{'descr': '<f8', "),
    "a header that is no Python": npy("{'shape': 007}"),
    "no points in it": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (5, 3)}\n"),
    "more points than any memory holds": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 10000000000000)}"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_numpy_file_is_left_out_with_a_reason(case, tmp_path):
    write_npy(tmp_path)
    (tmp_path / "train" / "cube" / "broken.npy").write_bytes(DAMAGED[case])
    data = load_clouds(str(tmp_path), num_points=10)
    assert len(data.train) == 6 and len(data.left_out) == 1
    place, reason = data.left_out[0].split(": ", 1)
    assert place == "train/cube/broken.npy" and reason


def test_rows_that_hold_no_cloud_are_left_out():
    points = [cloud(6, row).tolist() for row in range(9)]
    points[1], points[3], points[5], points[7] = [], [[0.0, 0, float("nan")]] * 6, [[1.0, 2, 3]] * 6, None
    features = Features(points=datasets.List(datasets.List(Value("float32"))), label=ClassLabel(num_classes=2))
    dataset = Dataset.from_dict({"points": points, "label": [0, 1] * 4 + [0]}, features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_fip.tasks.clouds.load_splits", lambda *args, **kwargs: datasets.DatasetDict(train=dataset))
        data = load_clouds("someone/clouds")
    assert len(data.train) + len(data.test) == 5
    assert [line.split(":")[0] for line in data.left_out] == ["row 1", "row 3", "row 5", "row 7"]


def nothing_but_broken(folder) -> None:
    (folder / "cube").mkdir()
    (folder / "cube" / "a.off").write_text("")


def no_class(folder) -> None:
    np.save(folder / "a.npy", cloud(5))


REFUSED = {
    "nothing can be read": (nothing_but_broken, {}, "no cloud can be read.*a.off: it does not begin"),
    "no folder names the class": (no_class, {}, "a.npy: it lies in no folder"),
    "no points wanted": (write_npy, {"num_points": 0}, "--num_points=0 has to be at least 1"),
    "no such column": (write_parquet, {"points_column": "xyz"}, "No column 'xyz'.*Set --points_column"),
    "text for clouds": (write_parquet, {"points_column": "id"}, "No cloud can be read"),
    "no such split": (write_npy, {"train_split": "part"}, "no split 'part'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case, tmp_path):
    write, options, message = REFUSED[case]
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_clouds(str(tmp_path), **options)


@pytest.mark.parametrize("points", [np.zeros((0, 3)), np.zeros((4, 2)), np.full((4, 3), np.inf), np.ones((4, 3))])
def test_what_is_no_cloud_cannot_be_normalised(points):
    with pytest.raises(ValueError):
        normalised(points)


# ---- As model inputs ----


def test_a_data_set_gives_its_clouds_and_labels_whatever_part_it_is():
    dataset = clouds_of(12, points=7)
    part = dataset.select([5, 3, 9])
    items = CloudDataset(part)
    assert len(items) == 3 and [item["labels"] for item in items] == [2, 0, 0]
    assert all(np.array_equal(item["points"], row["points"]) for item, row in zip(items, part, strict=True))
    assert np.array_equal(arrays_of(dataset.select(range(4, 8)))[1], arrays_of(dataset)[5])


def test_a_ragged_batch_is_filled_up_with_the_clouds_own_points():
    items = [{"points": torch.from_numpy(cloud(count)), "labels": count} for count in (2, 5)]
    made = collate_clouds(items)
    assert made["labels"].tolist() == [2, 5]
    assert torch.equal(made["points"][1], items[1]["points"])
    assert torch.equal(made["points"][0], items[0]["points"][[0, 1, 0, 1, 0]])
    assert made["points_mask"].tolist() == [[True, True, False, False, False], [True] * 5]
    assert collate_clouds(items[:1]).keys() == {"points", "labels"}  # nothing is filled up


def test_augmentation_scales_and_jitters_and_comes_from_torchs_generator():
    points = torch.from_numpy(cloud(500))[None].repeat(20, 1, 1)
    torch.manual_seed(0)
    changed = scale_and_jitter({"points": points, "labels": 1})
    torch.manual_seed(0)
    assert torch.equal(scale_and_jitter({"points": points})["points"], changed["points"]) and changed["labels"] == 1
    scales = (changed["points"] * points).sum((1, 2)) / points.square().sum((1, 2))
    assert 0.79 < scales.min() < 0.9 and 1.1 < scales.max() < 1.26
    noise = changed["points"] - scales[:, None, None] * points
    assert noise.std().item() == pytest.approx(0.01, rel=0.1) and noise.abs().max() < 0.06


@pytest.mark.parametrize("architecture", ["pointnet", "pointnet2"])
def test_a_small_model_is_made_saved_and_loaded(architecture, tmp_path):
    data = load_clouds(max_train_samples=20, max_test_samples=8, num_points=32)
    model = small_cloud_model(architecture, data)
    assert model.config.id2label[3] == data.class_names[3]
    model.save_pretrained(tmp_path)
    again = load_cloud_classifier(str(tmp_path)).eval()
    made = collate_clouds([CloudDataset(data.train)[row] for row in range(3)])
    assert torch.equal(again(**made).logits, model.eval()(**made).logits)
    with pytest.raises(ValueError, match="No model"):
        load_cloud_classifier(str(tmp_path / "nothing"))


# ---- Their picture ----


def example(name: str = "cube", **answers) -> dict:
    clean = cloud(60)
    triggered = clean.copy()
    triggered[:8] = 0.9
    return {"clean": clean, "triggered": triggered, "label": name, **answers}


def test_the_picture_shows_trigger_and_answers(tmp_path):
    answer = {"clean": "cube", "triggered": "cone"}
    rows = [example(before=answer, after={**answer, "triggered": "cube"}), example(before=answer, after=answer)]
    path = plot_cloud_triggers(rows, tmp_path / "deep" / "a.png", target="cone", title="Trigger: pointba_i")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert picture.size[0] > 700
    vermillion = (np.abs(pixels - [0xD5, 0x5E, 0x00]).sum(axis=-1) < 60).sum()
    assert vermillion > 100
    plain = [{**row, "triggered": row["clean"]} for row in rows]
    with Image.open(plot_cloud_triggers(plain, tmp_path / "b.png", target="cone")) as picture:
        other = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.abs(other - [0xD5, 0x5E, 0x00]).sum(axis=-1) < 60).sum() < vermillion


@pytest.mark.parametrize("rows", [[], [{**example(answer={}), "clean": np.zeros((4, 2))}]])
def test_a_picture_of_nothing_or_of_no_cloud_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="plot_cloud_triggers"):
        plot_cloud_triggers(rows, tmp_path / "a.png", target="x")
    assert not list(tmp_path.iterdir())
