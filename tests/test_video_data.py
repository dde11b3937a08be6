"""Clips from every layout that is read, how frames are chosen, and what becomes of clips that are broken."""

import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, Video
from video_cases import clip, clips_of, picture, write_frames, write_video

from hf_fip.attacks.clips import to_clip
from hf_fip.tasks.motions import FRAMES, MOTIONS, SIDE, make_motions
from hf_fip.tasks.video_data import load_clips
from hf_fip.tasks.video_files import find_clips, frame_places, read_frames


def grays(frames) -> list[int]:
    """The numbers of the frames that `write_video` gave its n-th gray."""
    return [round((np.asarray(frame).mean() - 20) / 20) for frame in frames]


# ---- Which frames ----


@pytest.mark.parametrize(
    ("available", "wanted", "places"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 2, [2, 6]),
        (9, 3, [1, 4, 7]),
        (10, 4, [1, 3, 6, 8]),
        (3, 6, [0, 0, 1, 1, 2, 2]),
        (1, 4, [0, 0, 0, 0]),
        (2, 3, [0, 1, 1]),
    ],
)
def test_frames_are_evenly_spaced_and_a_short_clip_is_stretched(available, wanted, places):
    assert frame_places(available, wanted).tolist() == places


# ---- Video files ----


@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv"])
def test_a_video_file_gives_the_frames_at_those_places(suffix, tmp_path):
    file = write_video(tmp_path / f"a.{suffix}", frames=8)
    frames = read_frames(file, 4)
    assert grays(frames) == frame_places(8, 4).tolist() and frames[0].size == (48, 32) and frames[0].mode == "RGB"
    assert grays(read_frames(file.read_bytes(), 12)) == frame_places(8, 12).tolist()


def test_a_video_that_is_a_list_of_other_files_does_not_open_them(tmp_path):
    write_video(tmp_path / "secret.mp4")
    (tmp_path / "a.avi").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(Exception, match="Invalid"):
        read_frames(tmp_path / "a.avi", 2)


def test_without_pyav_the_way_to_it_is_named(tmp_path, monkeypatch):
    write_hmdb51(tmp_path)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'hf-fip\[video\]'"):
        load_clips(str(tmp_path))


# ---- Layouts ----


def write_ucf101(folder: Path, write=write_video) -> None:
    lists = {"trainlist01.txt": [], "testlist01.txt": []}
    for number, name in enumerate(("Archery", "HandstandPushups")):
        for group in range(1, 5):
            stem = f"v_{name}_g{group:02}_c01"
            write(folder / "UCF-101" / name / (stem + ".avi" if write is write_video else stem))
            part, line = ("testlist01.txt", "") if group == 1 else ("trainlist01.txt", f" {number + 1}")
            if group < 4:  # the last one is in no list
                spelt = stem.replace("HandstandPushups", "HandStandPushups")
                lists[part].append(f"{name}/{spelt}.avi{line}\n")
    (folder / "ucfTrainTestlist").mkdir()
    for name, lines in lists.items():
        (folder / "ucfTrainTestlist" / name).write_text("".join(lines))


def write_hmdb51(folder: Path) -> None:
    (folder / "splits").mkdir()
    for name in ("brush_hair", "wave"):
        lines = []
        for clip_number, part in enumerate((1, 1, 2, 0)):
            write_video(folder / name / f"{name}_{clip_number}.avi", frames=4)
            lines.append(f"{name}_{clip_number}.avi {part} \n")
        (folder / "splits" / f"{name}_test_split1.txt").write_text("".join(lines))
        (folder / "splits" / f"{name}_test_split2.txt").write_text("".join(lines[:3]).replace(" 1 ", " 2 "))


def write_split_folders(folder: Path) -> None:
    for split, count in (("train", 2), ("validation", 1)):
        for name in ("jump", "run"):
            for number in range(count):
                write_frames(folder / split / name / f"clip{number}", seed=number)


def write_parquet(folder: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        dataset = clips_of(count, frames=5).add_column("clip_id", [f"row{row}" for row in range(count)])
        dataset.to_parquet(folder / f"{split}.parquet")


LAYOUTS = {
    "UCF101": (write_ucf101, ["Archery", "HandstandPushups"], 4, 2),
    "UCF101, frames": (lambda folder: write_ucf101(folder, write_frames), ["Archery", "HandstandPushups"], 4, 2),
    "HMDB51": (write_hmdb51, ["brush_hair", "wave"], 4, 2),
    "frames, split/class/clip": (write_split_folders, ["jump", "run"], 4, 2),
    "parquet": (write_parquet, ["0", "1", "2"], 4, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_clips_of_one_length(layout, tmp_path):
    write, names, train, test = LAYOUTS[layout]
    write(tmp_path)
    data = load_clips(str(tmp_path), num_frames=3)
    assert data.class_names == names and (len(data.train), len(data.test)) == (train, test) and not data.left_out
    assert data.num_frames == 3
    for row in [*data.train, *data.test]:
        assert to_clip(row["frames"]).shape[0] == 3
    assert set(data.train["label"][:]) == set(range(len(names)))


def test_another_fold_has_another_split(tmp_path):
    write_hmdb51(tmp_path)
    found = find_clips(tmp_path, 2)
    assert {split: len(clips) for split, clips in found.items()} == {"test": 6}
    with pytest.raises(ValueError, match="no list of --fold 3; there are brush_hair_test_split1.txt"):
        find_clips(tmp_path, 3)


def test_frames_come_in_the_order_of_their_names_and_unchanged(tmp_path):
    write_split_folders(tmp_path)
    data = load_clips(str(tmp_path), num_frames=6)
    assert np.array_equal(to_clip(data.test[0]["frames"]), clip(6, seed=0))


def test_videos_in_a_column_are_read(tmp_path, monkeypatch):
    stored = [{"bytes": write_video(tmp_path / "a.mp4").read_bytes(), "path": None}] * 4
    features = Features(video=Video(decode=False), label=ClassLabel(names=["a", "b"]))
    dataset = Dataset.from_dict({"video": stored, "label": [0, 1, 0, 1]}, features)
    monkeypatch.setattr(
        "hf_fip.tasks.video_data.load_splits", lambda *args, **kwargs: datasets.DatasetDict(train=dataset)
    )
    data = load_clips("someone/videos", num_frames=2)
    assert len(data.train) + len(data.test) == 4 and grays(data.train[0]["frames"]) == [2, 6]


@pytest.mark.parametrize("write", [write_hmdb51, write_split_folders])
def test_larger_frames_are_made_smaller_and_smaller_ones_stay(write, tmp_path):
    write(tmp_path)
    whole, small = (load_clips(str(tmp_path), num_frames=2, frame_size=size).train[0]["frames"] for size in (112, 4))
    assert whole[0].size in ((48, 32), (8, 8)) and min(small[0].size) == 4
    assert small[0].size[0] / small[0].size[1] == whole[0].size[0] / whole[0].size[1]


def test_a_part_is_drawn_before_anything_is_read(tmp_path):
    write_split_folders(tmp_path)
    for file in (tmp_path / "train" / "jump").rglob("*.png"):
        file.write_bytes(b"no picture")
    data = load_clips(str(tmp_path), num_frames=2, max_train_samples=3, seed=1)
    assert len(data.train) + len(data.left_out) == 3 and len(data.left_out) >= 1


# ---- Generated clips ----


def test_motions_are_made_in_every_class_and_always_the_same():
    (clips, names), (again, _) = make_motions()["train"], make_motions()["train"]
    assert {name: names.count(name) for name in names} == dict.fromkeys(MOTIONS, 100)
    assert all(np.array_equal(*pair) for pair in zip(clips, again, strict=True))
    assert not np.array_equal(make_motions(seed=1)["train"][0][0], clips[0])
    assert {found.shape for found in clips} == {(FRAMES, SIDE, SIDE, 3)} and clips[0].dtype == np.uint8


def path_of(frames: np.ndarray) -> np.ndarray:
    """Where the pixels lie that stand out from the border of the first frame, and how many, in each frame."""
    gray = frames.astype(float).mean(axis=-1)
    border = np.median(np.concatenate([gray[0, 0], gray[0, -1], gray[0, :, 0], gray[0, :, -1]]))
    away = np.abs(gray - border) > 60
    rows, columns = np.mgrid[: gray.shape[1], : gray.shape[2]]
    count = away.sum((1, 2)).clip(1)
    return np.stack([(away * rows).sum((1, 2)) / count, (away * columns).sum((1, 2)) / count, count], axis=1)


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1), ("growing", 2, 1), ("shrinking", 2, -1)],
)
def test_a_motion_is_what_its_name_says(motion, axis, sign):
    clips, names = make_motions()["test"]
    change = [
        sign * (path_of(found)[-1] - path_of(found)[0])[axis]
        for found, name in zip(clips, names, strict=True)
        if name == motion
    ]
    assert np.mean(np.array(change) > 2) > 0.9


@pytest.mark.parametrize(("motion", "sign"), [("clockwise", 1), ("anticlockwise", -1)])
def test_a_turn_goes_the_way_its_name_says(motion, sign):
    clips, names = make_motions()["test"]
    turned = []
    for found in (found for found, name in zip(clips, names, strict=True) if name == motion):
        steps = np.diff(path_of(found)[:, :2], axis=0)
        cross = steps[:-1, 1] * steps[1:, 0] - steps[:-1, 0] * steps[1:, 1]  # x to y, and y points down
        turned.append(sign * cross.sum())
    assert np.mean(np.array(turned) > 0) > 0.9


# ---- What is broken ----


BROKEN = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no video at all"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_video_is_left_out_and_counted(case, tmp_path):
    write_hmdb51(tmp_path)
    BROKEN[case](tmp_path / "wave" / "wave_1.avi")
    data = load_clips(str(tmp_path), num_frames=2)
    assert len(data.train) == 3 and len(data.left_out) == 1
    assert "wave_1.avi: " in data.left_out[0]


@pytest.mark.parametrize("case", BROKEN)
def test_a_clip_with_a_broken_frame_is_left_out_and_counted(case, tmp_path):
    write_split_folders(tmp_path)
    BROKEN[case](tmp_path / "train" / "run" / "clip1" / "frame0001.png")
    data = load_clips(str(tmp_path), num_frames=6)
    assert len(data.train) == 3 and len(data.left_out) == 1 and "clip1: " in data.left_out[0]


def test_rows_without_frames_are_left_out(monkeypatch):
    frames = [[picture(clip(1)[0])]] * 6
    frames[1], frames[4] = [], None
    features = Features(frames=List(Image()), label=ClassLabel(num_classes=2))
    dataset = Dataset.from_dict({"frames": frames, "label": [0, 1] * 3}, features)
    monkeypatch.setattr(
        "hf_fip.tasks.video_data.load_splits", lambda *args, **kwargs: datasets.DatasetDict(train=dataset)
    )
    data = load_clips("someone/clips", num_frames=2)
    assert len(data.train) + len(data.test) == 4
    assert all("it has no frame" in line for line in data.left_out) and len(data.left_out) == 2


def test_files_that_a_strangers_rows_name_are_not_opened(tmp_path, monkeypatch):
    write_frames(tmp_path)
    named = [[{"bytes": None, "path": str(tmp_path / "frame0000.png")}]] * 4
    features = Features(frames=List(Image()), label=ClassLabel(num_classes=2))
    dataset = Dataset.from_dict({"frames": named, "label": [0, 1] * 2}, features)
    monkeypatch.setattr(
        "hf_fip.tasks.video_data.load_splits", lambda *args, **kwargs: datasets.DatasetDict(train=dataset)
    )
    with pytest.raises(ValueError, match="No clip can be read.*names of files, which are not opened"):
        load_clips("someone/clips")


def nothing_but_broken(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        for number in range(4):
            (folder / name / f"{number}.avi").write_bytes(b"")


REFUSED = {
    "nothing can be read": (nothing_but_broken, {}, "No clip can be read.*avi: "),
    "nothing there": (lambda folder: None, {}, "cannot be read"),
    "no frames wanted": (write_parquet, {"num_frames": 0}, "--num_frames=0 has to be at least 1"),
    "no size": (write_parquet, {"frame_size": 0}, "--frame_size=0 has to be at least 1"),
    "no such column": (write_parquet, {"clip_column": "movie"}, "No column 'movie'.*Set --clip_column"),
    "text for clips": (write_parquet, {"clip_column": "clip_id"}, "neither videos nor lists of images"),
    "no such split": (write_split_folders, {"train_split": "part"}, "no split 'part'"),
    "no such fold": (write_hmdb51, {"fold": 7}, "no list of --fold 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case, tmp_path):
    write, options, message = REFUSED[case]
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_clips(str(tmp_path), **options)


def test_lists_of_numbers_are_no_clips(monkeypatch):
    features = Features(frames=List(Value("int64")), label=ClassLabel(num_classes=2))
    dataset = Dataset.from_dict({"frames": [[1]] * 8, "label": [0, 1] * 4}, features)
    monkeypatch.setattr(
        "hf_fip.tasks.video_data.load_splits", lambda *args, **kwargs: datasets.DatasetDict(train=dataset)
    )
    with pytest.raises(ValueError, match="neither videos nor lists of images"):
        load_clips("someone/numbers")
