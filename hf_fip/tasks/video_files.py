"""Clips in folders: where they lie, which official split they belong to, and how video files are read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image

VIDEO_SUFFIXES = (".avi", ".mp4", ".mov", ".mkv", ".webm", ".mpg", ".mpeg")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")
_SPLITS = {"train": "train", "training": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}

_UCF101_LIST, _HMDB51_LIST = re.compile(r"(train|test)list(\d\d)"), re.compile(r"(.+)_test_split(\d)")

# split -> (what a clip is stored as: a video file, or the files of its frames in order; the name of its class)
Found = dict[str, list[tuple[list[Path], str]]]


def find_clips(folder: Path, fold: int) -> Found:
    """The clips in a folder, by split. Nothing is opened but the lists of the official splits.

    A clip is a video file or, where there is none, a folder of images in the order of their names. The folder that it
    lies in names its class, and a folder above or below that one its split: `class/clip`, `train/class/clip`,
    `class/train/clip`. Lists win over folders: those of UCF101 (`trainlist01.txt`, `testlist01.txt`) and of HMDB51
    (`CLASS_test_split1.txt`), anywhere in the folder; clips that no list of the fold names are left out. Where nothing
    tells, all are for training.

    Args:
        fold: which of the official splits, from 1.

    Returns:
        Empty when there is no clip, or there are parquet or arrow files.

    Raises:
        ValueError: there are lists, but none of this fold.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if any(file.suffix in (".parquet", ".arrow") for file in files):
        return {}  # the clips are in there
    clips = [[file] for file in files if is_video(file)]
    if not clips:
        frames = defaultdict(list)
        for file in files:
            if file.suffix.lower() in IMAGE_SUFFIXES:
                frames[file.parent].append(file)
        clips = list(frames.values())
    official = _official_split([file for file in files if file.suffix.lower() == ".txt"], fold)
    found: Found = defaultdict(list)
    for clip in clips:
        place = clip[0] if is_video(clip[0]) else clip[0].parent
        above = place.relative_to(folder).parts[:-1]
        classes = [name for name in above if name not in _SPLITS]
        if not classes:
            continue
        split = next((_SPLITS[name] for name in above if name in _SPLITS), "train")
        if official:
            split = official.get(_key(classes[-1], place.stem if is_video(clip[0]) else place.name))
        if split:
            found[split].append((clip, classes[-1]))
    return dict(found)


def is_video(file: Path) -> bool:
    """Whether the name of a file is that of a video."""
    return file.suffix.lower() in VIDEO_SUFFIXES


def _official_split(lists: list[Path], fold: int) -> dict[tuple[str, str], str]:
    """The split of each clip, by class and name; empty when there are no lists.

    UCF101: a line is `class/clip.avi`, in lists for training also the number of the class. HMDB51: `clip.avi` and 1
    (training), 2 (testing) or 0 (neither).
    """
    ucf = {file: found.groups() for file in lists if (found := _UCF101_LIST.fullmatch(file.stem))}
    hmdb = {file: found.groups() for file in lists if (found := _HMDB51_LIST.fullmatch(file.stem))}
    if not ucf and not hmdb:
        return {}
    split = {}
    for line, part in _lines({file: part for file, (part, number) in ucf.items() if int(number) == fold}):
        name, _, clip = line.split()[0].rpartition("/")
        split[_key(name, Path(clip).stem)] = part
    for line, name in _lines({file: name for file, (name, number) in hmdb.items() if int(number) == fold}):
        clip, _, number = line.rpartition(" ")
        if number in ("1", "2"):
            split[_key(name, Path(clip.strip()).stem)] = ("train", "test")[int(number) - 1]
    if not split:
        there = ", ".join(sorted(file.name for file in [*ucf, *hmdb])[:6])
        raise ValueError(f"There is no list of --fold {fold}; there are {there}.")
    return split


def _lines(files: dict[Path, str]) -> Iterator[tuple[str, str]]:
    """The lines of files that are not empty, each with what is known of its file."""
    for file, known in files.items():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield line.strip(), known


def _key(name: str, clip: str) -> tuple[str, str]:
    return name.lower(), clip.lower()  # UCF101 writes HandStandPushups in two ways


def frame_places(available: int, wanted: int) -> np.ndarray:
    """Which of the available frames stand for a clip of `wanted` ones: the middles of as many equal stretches of time.

    A clip with fewer frames is stretched: each of its frames stands in several places.
    """
    return ((np.arange(wanted) + 0.5) * available / wanted).astype(int)


def read_frames(video: str | Path | bytes, wanted: int) -> list[PIL.Image.Image]:
    """So many frames of a video file, evenly spaced in time, in RGB.

    Packets are counted first, so that a file without an index, or with a wrong one, gives the right frames; only the
    frames that are kept stay in memory.

    Raises:
        ValueError: PyAV is not installed, or the file holds no frame.
        av.FFmpegError: it cannot be decoded.
    """
    with _opened(video) as (container, stream):
        available = sum(packet.size > 0 for packet in container.demux(stream))
    if not available:
        raise ValueError("it has no frame")
    places = frame_places(available, wanted)
    found: dict[int, PIL.Image.Image] = {}
    with _opened(video) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in places:
                found[number] = frame.to_image()
            if number == places[-1]:
                break
    if not found:
        raise ValueError("none of its frames can be decoded")
    # Of a file that ends early, a frame that is not there is the last one before it, or the first of all.
    earlier = np.sort(np.array(list(found)))
    return [found[earlier[max(0, np.searchsorted(earlier, place, side="right") - 1)]] for place in places]


def import_av():
    """PyAV; ValueError when it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ValueError("Video files are read by PyAV: `pip install 'hf-fip[video]'`.") from error
    return av


@contextmanager
def _opened(video: str | Path | bytes) -> Iterator[tuple]:
    """PyAV's container and its first video stream."""
    options = {"protocol_whitelist": ""}  # a file that is a list of other files or places does not open them
    with (
        BytesIO(video) if isinstance(video, bytes) else open(video, "rb") as file,
        import_av().open(file, options=options) as container,
    ):
        if not container.streams.video:
            raise ValueError("it has no video stream")
        yield container, container.streams.video[0]
