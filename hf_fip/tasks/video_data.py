"""Labelled clips from the Hub, parquet, or folders of videos or frames (UCF101, HMDB51); or generated motions.

Every clip becomes a list of so many frames, evenly spaced in time. One that cannot be read is left out and counted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, Video

from ..attacks.clips import FRAMES_COLUMN, is_frames
from ..attacks.pixels import fitted
from ..attacks.poison import to_array, to_png
from ..hub.safe_data import check_data_folder
from ..hub.text import one_line
from .columns import pick_column
from .data import LabelledImages, load_splits, train_and_test
from .motions import make_motions
from .video_files import find_clips, frame_places, import_av, is_video, read_frames

MOTIONS_NAME = "motions"
LABEL = "label"
FRAMES_FEATURE = List(Image())
_CLIP_NAMES = ("frames", "video", "clip", "clips", "videos")
_LABEL_NAMES = ("label", "labels", "class", "action", "target")


@dataclass(frozen=True)
class LabelledClips(LabelledImages):
    """Training and test clips with one label each.

    Attributes:
        train, test: `datasets.Dataset`s with the columns `frames` (a list of images, of one length in all rows) and
            `label` (one `ClassLabel`).
        name: what the user called it.
        left_out: what could not be read, and why, one line each.
    """

    left_out: list[str] = field(default_factory=list)

    @property
    def num_frames(self) -> int:
        return len(self.train.cast_column(FRAMES_COLUMN, List(Image(decode=False)))[0][FRAMES_COLUMN])


def load_clips(
    name_or_path: str = MOTIONS_NAME,
    config_name: str | None = None,
    *,
    clip_column: str | None = None,
    label_column: str | None = None,
    num_frames: int = 8,
    frame_size: int = 112,
    fold: int = 1,
    train_split: str | None = None,
    test_split: str | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> LabelledClips:
    """Load a labelled data set of clips.

    Args:
        name_or_path: a Hub id; a parquet file or a folder of them, with a column of lists of images or of videos; a
            folder of video files, or of folders of frames, one folder a class, as UCF101 and HMDB51 are shared (see
            `video_files.find_clips`); or `motions`, which are generated.
        config_name: the configuration of a Hub data set that has several.
        clip_column, label_column: guessed from usual names when left out.
        num_frames: of each clip, the middles of as many equal stretches of time. A clip of fewer frames is stretched:
            its frames are repeated.
        frame_size: the shorter side of larger frames, in pixels; smaller ones stay as they are.
        fold: which of the official splits of UCF101 or HMDB51, from 1.
        train_split, test_split, max_train_samples, max_test_samples, seed: as in `load_images`.

    Raises:
        ValueError: when the data, a split or a column cannot be found, when no clip can be read, or when there are
            video files and PyAV is not installed.
    """
    for name, value in (("num_frames", num_frames), ("frame_size", frame_size), ("fold", fold)):
        if value < 1:
            raise ValueError(f"--{name}={value} has to be at least 1.")
    left_out: list[str] = []
    found = None
    if name_or_path == MOTIONS_NAME:
        found = {split: _from_arrays(*both) for split, both in make_motions().items()}
    elif os.path.isdir(name_or_path):
        check_data_folder(Path(name_or_path))
        found = {split: _from_files(clips) for split, clips in find_clips(Path(name_or_path), fold).items()}
    train, test = train_and_test(
        DatasetDict(found) if found else load_splits(name_or_path, config_name, revision=revision),
        name_or_path,
        lambda part: _clip_and_label(part, clip_column, label_column),
        train_split=train_split,
        test_split=test_split,
        max_train_samples=max_train_samples,
        max_test_samples=max_test_samples,
        seed=seed,
    )
    train, test = (_read(part, num_frames, frame_size, left_out, own=bool(found)) for part in (train, test))
    return LabelledClips(train, test, name_or_path, left_out=left_out)


def _from_arrays(clips: list[np.ndarray], labels: list[str]) -> Dataset:
    frames = [[{"bytes": to_png(frame), "path": None} for frame in clip] for clip in clips]
    features = Features({FRAMES_COLUMN: FRAMES_FEATURE, LABEL: Value("string")})
    return Dataset.from_dict({FRAMES_COLUMN: frames, LABEL: labels}, features)


def _from_files(clips: list[tuple[list[Path], str]]) -> Dataset:
    """All of video files, or all of lists of images: by path, nothing is opened."""
    files, labels = zip(*clips, strict=True)
    if all(len(paths) == 1 and is_video(paths[0]) for paths in files):
        rows, feature = [{"path": str(paths[0]), "bytes": None} for paths in files], Video(decode=False)
    else:
        rows, feature = [[{"path": str(path), "bytes": None} for path in paths] for paths in files], FRAMES_FEATURE
    features = Features({FRAMES_COLUMN: feature, LABEL: Value("string")})
    return Dataset.from_dict({FRAMES_COLUMN: rows, LABEL: list(labels)}, features)


def _clip_and_label(part: Dataset, clip_column: str | None, label_column: str | None) -> Dataset:
    clip = pick_column(part, clip_column, _CLIP_NAMES, (List, Video), "clip")
    label = pick_column(part, label_column, _LABEL_NAMES, ClassLabel, "label")
    if not is_frames(part.features[clip]) and not isinstance(part.features[clip], Video):
        raise ValueError(f"The column {clip!r} holds neither videos nor lists of images. Set --clip_column.")
    part = part.with_format(None).select_columns([clip, label])
    return part.rename_columns({clip: FRAMES_COLUMN, label: LABEL})


def _read(part: Dataset, num_frames: int, frame_size: int, left_out: list[str], own: bool) -> Dataset:
    """The same clips as lists of so many frames that can be decoded; the others are left out.

    Args:
        own: whether the paths in it were found here. Those that a stranger's data set names are not opened.
    """
    as_video = isinstance(part.features[FRAMES_COLUMN], Video)
    if as_video:
        import_av()
    choose = _from_video if as_video else partial(_from_frames, own=own)

    def read(clips: list, labels: list[int], rows: list[int]) -> dict[str, list]:
        kept = {FRAMES_COLUMN: [], LABEL: []}
        for clip, label, row in zip(clips, labels, rows, strict=True):
            try:
                kept[FRAMES_COLUMN].append(choose(clip, num_frames, frame_size))
                kept[LABEL].append(label)
            except Exception as error:  # ffmpeg and Pillow raise many kinds for what is damaged
                left_out.append(f"{one_line(_place(clip, row))}: {one_line(error) or type(error).__name__}")
        return kept

    stored = part.cast_column(FRAMES_COLUMN, Video(decode=False) if as_video else List(Image(decode=False)))
    done = stored.map(
        read,
        with_indices=True,
        input_columns=[FRAMES_COLUMN, LABEL],
        remove_columns=stored.column_names,
        batched=True,
        batch_size=16,
        features=Features({FRAMES_COLUMN: FRAMES_FEATURE, LABEL: part.features[LABEL]}),
        load_from_cache_file=False,
        desc="Reading clips",
    )
    if not len(done):
        raise ValueError(f"No clip can be read. {left_out[-1] if left_out else ''}")
    return done


def _from_video(stored: dict, num_frames: int, frame_size: int) -> list[dict]:
    frames = read_frames(stored["path"] if stored["bytes"] is None else stored["bytes"], num_frames)
    return [_shrunk(frame, frame_size) for frame in frames]


def _from_frames(stored: list[dict], num_frames: int, frame_size: int, own: bool) -> list[dict]:
    """The chosen frames as they are stored; a larger one is made smaller."""
    if not stored:
        raise ValueError("it has no frame")
    chosen = []
    for frame in (stored[place] for place in frame_places(len(stored), num_frames)):
        if frame["bytes"] is None and not own:
            raise ValueError("its frames are names of files, which are not opened")
        with PIL.Image.open(frame["path"] if frame["bytes"] is None else BytesIO(frame["bytes"])) as image:
            image.load()
            chosen.append(frame if min(image.size) <= frame_size else _shrunk(image, frame_size))
    return chosen


def _shrunk(image: PIL.Image.Image, side: int) -> dict:
    """The image with a shorter side of so many pixels at most, as it is stored."""
    array = to_array(image)
    scale = min(1.0, side / min(image.size))
    height, width = (max(1, round(scale * length)) for length in array.shape[:2])
    return {"bytes": to_png(fitted(array, height, width, array.shape[2])), "path": None}


def _place(stored: dict | list[dict] | None, row: int) -> str:
    """Where a clip lies, if it is a file or a folder; else its row."""
    if isinstance(stored, list):
        path = stored[0]["path"] if stored else None
        return str(Path(path).parent) if path and os.path.exists(path) else f"row {row}"
    return (stored and stored["path"]) or f"row {row}"
