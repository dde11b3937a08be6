"""Labelled point clouds from the Hub, parquet, OFF meshes, HDF5 or NumPy files, or generated shapes.

Every cloud is brought to the unit sphere around the origin, and to a number of points at most. One that cannot be read
is left out and counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, List, Value

from .columns import pick_column
from .data import LabelledImages, load_splits, train_and_test
from .shapes import make_shapes

SHAPES_NAME = "shapes"
POINTS, LABEL = "points", "label"
_POINTS_NAMES = ("points", "point_cloud", "cloud", "xyz", "pc")
_LABEL_NAMES = ("label", "labels", "class", "target")
_SPLITS = {"train": "train", "training": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
FEATURE = List(List(Value("float32"), length=3))


@dataclass(frozen=True)
class LabelledClouds(LabelledImages):
    """Training and test clouds with one label each.

    Attributes:
        train, test: `datasets.Dataset`s with the columns `points` (float32, N×3 each) and `label` (one `ClassLabel`).
        name: what the user called it.
        left_out: what could not be read, and why, one line each.
    """

    left_out: list[str] = field(default_factory=list)


def load_clouds(
    name_or_path: str = SHAPES_NAME,
    config_name: str | None = None,
    *,
    points_column: str | None = None,
    label_column: str | None = None,
    num_points: int = 1024,
    train_split: str | None = None,
    test_split: str | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> LabelledClouds:
    """Load a labelled data set of point clouds.

    Args:
        name_or_path: a Hub id; a parquet file or a folder of them; a folder of HDF5 files as ModelNet40 has them
            (`data`, `label`, the split in the file's name, `shape_names.txt`); a folder of OFF meshes or NumPy files,
            `class/split/file` or `split/class/file`; or `shapes`, which are generated. Of more than three columns in
            an HDF5 or NumPy file the first three are the coordinates.
        config_name: the configuration of a Hub data set that has several.
        points_column, label_column: guessed from usual names when left out.
        num_points: what a mesh is sampled to (evenly over its surface), and a larger cloud is thinned out to. A
            smaller one stays as it is.
        train_split, test_split, max_train_samples, max_test_samples, seed: as in `load_images`; `seed` also decides
            which points are kept.

    Raises:
        ValueError: when the data, a split or a column cannot be found, or no cloud can be read.
    """
    if num_points < 1:
        raise ValueError(f"--num_points={num_points} has to be at least 1.")
    left_out: list[str] = []

    def prepare(part: Dataset) -> Dataset:
        points = pick_column(part, points_column, _POINTS_NAMES, List, "points")
        label = pick_column(part, label_column, _LABEL_NAMES, Value, "label") if label_column else _label_of(part)
        part = part.with_format(None).select_columns([points, label])
        part = part.rename_columns({points: POINTS, label: LABEL})
        return _normalised(part, num_points, seed, left_out)

    splits = _splits(name_or_path, config_name, revision, num_points, seed, left_out)
    train, test = train_and_test(
        splits,
        name_or_path,
        prepare,
        train_split=train_split,
        test_split=test_split,
        max_train_samples=max_train_samples,
        max_test_samples=max_test_samples,
        seed=seed,
    )
    return LabelledClouds(train, test, name_or_path, left_out=left_out)


def _label_of(part: Dataset) -> str:
    from datasets import ClassLabel

    return pick_column(part, None, _LABEL_NAMES, ClassLabel, "label")


def normalised(points: np.ndarray) -> np.ndarray:
    """The cloud, (N, 3), moved to its centre of mass and scaled into the unit sphere, as float32.

    Raises:
        ValueError: it has no points, another shape, coordinates that are not finite, or no extent.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f"it has the shape {points.shape}, not (N, 3)")
    if not np.isfinite(points).all():
        raise ValueError("it has coordinates that are not finite")
    points = points - points.mean(axis=0)
    extent = np.linalg.norm(points, axis=1).max()
    if extent == 0:
        raise ValueError("all of its points are one")
    return (points / extent).astype(np.float32)


def _normalised(part: Dataset, num_points: int, seed: int, left_out: list[str]) -> Dataset:
    """The same clouds in the unit sphere, `num_points` at most; those that are no clouds are left out."""
    clouds, kept = [], []
    rows = part.select_columns(POINTS).with_format("numpy")
    for row in range(len(rows)):
        try:
            points = np.asarray(rows[row][POINTS], dtype=np.float64)
            if len(points) > num_points:
                chosen = np.random.default_rng([seed, row]).choice(len(points), num_points, replace=False)
                points = points[np.sort(chosen)]
            clouds.append(normalised(points))
            kept.append(row)
        except (ValueError, TypeError) as error:
            left_out.append(f"row {row}: {error}")
    if not kept:
        raise ValueError(f"No cloud can be read. {left_out[-1] if left_out else ''}")
    part = part.select(kept).remove_columns(POINTS)
    return part.add_column(POINTS, _stored(clouds), feature=FEATURE)


# ---- Where clouds lie ----


def _splits(
    path: str, config_name: str | None, revision: str | None, num_points: int, seed: int, left_out: list[str]
) -> DatasetDict:
    if path == SHAPES_NAME:
        made = make_shapes()
        return DatasetDict({split: _dataset(*clouds_and_names) for split, clouds_and_names in made.items()})
    folder = Path(path)
    if folder.is_dir():
        for pattern, read in (("*.off", _read_off), ("*.npy", _read_npy)):
            if files := sorted(file for file in folder.rglob(pattern)):
                return _from_files(files, folder, lambda file, read=read: read(file, num_points, seed), left_out)
        if files := sorted([*folder.rglob("*.h5"), *folder.rglob("*.hdf5")]):
            return _from_hdf5(files, folder, left_out)
    return load_splits(path, config_name, revision=revision)


def _dataset(clouds: list[np.ndarray], labels: list) -> Dataset:
    dataset = Dataset.from_dict({LABEL: labels})
    return dataset.add_column(POINTS, _stored(clouds), feature=FEATURE)


def _stored(clouds: list[np.ndarray]) -> pa.Array:
    """The clouds as a column."""
    offsets = np.cumsum([0, *map(len, clouds)])
    coordinates = np.concatenate([np.asarray(cloud, dtype=np.float32).reshape(-1) for cloud in clouds])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.FixedSizeListArray.from_arrays(coordinates, 3))


def _from_files(
    files: list[Path], folder: Path, read: Callable[[Path], np.ndarray], left_out: list[str]
) -> DatasetDict:
    """One cloud a file; the class is the folder that is no split."""
    found: dict[str, tuple[list, list]] = {}
    for file in files:
        places = file.relative_to(folder).parts[:-1]
        split = next((_SPLITS[place] for place in places if place in _SPLITS), "train")
        classes = [place for place in places if place not in _SPLITS]
        try:
            if not classes:
                raise ValueError("it lies in no folder that names its class")
            cloud = read(file)
        except Exception as error:  # NumPy raises many kinds for what is damaged
            left_out.append(f"{file.relative_to(folder)}: {str(error) or type(error).__name__}")
            continue
        clouds, labels = found.setdefault(split, ([], []))
        clouds.append(cloud)
        labels.append(classes[0])
    if not found:
        raise ValueError(f"{folder}: no cloud can be read. {left_out[0]}")
    return DatasetDict({split: _dataset(*both) for split, both in found.items()})


def _from_hdf5(files: list[Path], folder: Path, left_out: list[str]) -> DatasetDict:
    """Many clouds a file, as ModelNet40 is shared: `data` (n, N, 3 or more) and `label` (n, 1)."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{folder} holds HDF5 files: `pip install h5py` to read them.") from error

    names_file = next(folder.rglob("shape_names.txt"), None)
    names = names_file.read_text(encoding="utf-8").split() if names_file else None
    found: dict[str, tuple[list, list]] = {}
    for file in files:
        split = next((split for word, split in _SPLITS.items() if word in file.stem.lower()), "train")
        try:
            with h5py.File(file, "r") as opened:
                data, numbers = opened["data"][:], opened["label"][:].reshape(-1).astype(int).tolist()
            data = _coordinates(data, "n, N")
            if len(data) != len(numbers):
                raise ValueError(f"it has {len(data)} clouds and {len(numbers)} labels")
            of_file = [names[number] for number in numbers] if names else numbers
        except (OSError, KeyError, ValueError, IndexError) as error:
            left_out.append(f"{file.relative_to(folder)}: {error}")
            continue
        clouds, labels = found.setdefault(split, ([], []))
        clouds.extend(data)
        labels.extend(of_file)
    if not found:
        raise ValueError(f"{folder}: no cloud can be read. {left_out[0]}")
    return DatasetDict({split: _dataset(*both) for split, both in found.items()})


def _read_npy(file: Path, num_points: int, seed: int) -> np.ndarray:
    with file.open("rb") as opened:  # np.load takes archives for arrays too
        return _coordinates(np.lib.format.read_array(opened, allow_pickle=False), "N")


def _coordinates(array: np.ndarray, axes: str) -> np.ndarray:
    """The first three columns of clouds with these axes before their columns.

    Raises:
        ValueError: it has other axes, fewer columns, or no numbers.
    """
    if array.ndim != len(axes.split(",")) + 1 or array.shape[-1] < 3:
        raise ValueError(f"it has the shape {array.shape}, not ({axes}, 3 or more)")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    return array[..., :3]


def _read_off(file: Path, num_points: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(file.name.encode())])
    return sample_surface(*read_off(file), num_points, rng)


def read_off(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and triangles (F, 3) of an OFF mesh; larger faces are cut into triangles around a corner.

    Raises:
        ValueError: the file is no such mesh, or a cut-off one.
    """
    lines = (
        line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    header, *rest = [line for line in lines if line] or [""]
    if not header.startswith("OFF"):
        raise ValueError("it does not begin with OFF")
    if header[3:].strip():  # some files of ModelNet40 have the counts glued to it
        rest.insert(0, header[3:])
    vertices, faces = (int(count) for count in rest[0].split()[:2]) if rest else (0, 1)
    if len(rest) < 1 + vertices + faces:
        raise ValueError("it ends too early")
    points = np.array([line.split()[:3] for line in rest[1 : 1 + vertices]], dtype=float).reshape(-1, 3)
    triangles = []
    for line in rest[1 + vertices : 1 + vertices + faces]:
        count, *corners = line.split()  # behind the corners there may be a colour
        corners = [int(corner) for corner in corners[: int(count)]]
        triangles += [(corners[0], *pair) for pair in zip(corners[1:], corners[2:], strict=False)]
    triangles = np.array(triangles, dtype=np.int64).reshape(-1, 3)
    if triangles.size and not 0 <= triangles.min() <= triangles.max() < vertices:
        raise ValueError("a face names a vertex that is not there")
    return points, triangles


def sample_surface(points: np.ndarray, triangles: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` points drawn evenly from the surface of a mesh, (count, 3).

    Args:
        points: vertices, (V, 3).
        triangles: their numbers, (F, 3).

    Raises:
        ValueError: the mesh has no surface.
    """
    corners = points[triangles]  # (F, 3, 3)
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    if not np.isfinite(areas).all() or not areas.sum() > 0:
        raise ValueError("its mesh has no surface")
    chosen = corners[rng.choice(len(areas), count, p=areas / areas.sum())]
    first, second = rng.random((2, count, 1))
    first, second = np.where(first + second > 1, (1 - first, 1 - second), (first, second))
    return chosen[:, 0] + first * (chosen[:, 1] - chosen[:, 0]) + second * (chosen[:, 2] - chosen[:, 0])
