"""What must hold of the pictures: they are complete, legible, and say nothing that the data do not."""

import itertools
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from hf_fip import drawing, plots
from hf_fip.plots import plot_attacks, plot_purification, plot_triggers

CURVES = [{"step": s, "accuracy": 96 - s / 100, "asr": 100 - s / 5} for s in range(0, 401, 50)]
TRACES = [{"step": s, "fisher_trace": 1000 * 0.99**s} for s in range(1, 400, 3)]
BROKEN_MATH = r"$\no_such_command{$_a^_b"  # matplotlib raises when it takes this for mathtext
WIDE = "W" * 400


def example(image=None, label="4", answer="0"):
    image = np.uint8(load_digits().images[4] * 255 / 16) if image is None else image
    triggered = image.copy()
    triggered[-2:, -2:] = 255
    answers = {"clean": label, "triggered": answer}
    return {"clean": image, "triggered": triggered, "label": label, "before": answers, "after": answers}


def pixels(path):
    """The picture as H×W×3, after checks that hold of every picture: PNG, 150 dpi, nothing touches the border."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        drawn = np.array(picture.convert("RGB"))
    border = np.concatenate([drawn[:3].ravel(), drawn[-3:].ravel(), drawn[:, :3].ravel(), drawn[:, -3:].ravel()])
    assert (border == 255).all()
    return drawn


def has_color(drawn, color):
    return (drawn == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum() > 10


@pytest.fixture
def texts(monkeypatch):
    """The text and its box in pixels, of everything written in the figures saved during a test."""
    found, save = [], Figure.savefig

    def spy(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        found.extend(
            (text.get_text(), text.get_window_extent(dpi=drawing.DPI)) for text in figure.findobj(matplotlib.text.Text)
        )

    monkeypatch.setattr(Figure, "savefig", spy)
    return found


@pytest.mark.parametrize(
    ("history", "title", "colors"),
    [
        (CURVES + TRACES, "digits", "acc asr trace"),
        (CURVES + TRACES, BROKEN_MATH, "acc asr trace"),
        (CURVES + TRACES, WIDE, "acc asr trace"),
        (CURVES, None, "acc asr"),
        (TRACES, None, "trace"),
        ([{"step": 0, "accuracy": 99.0, "asr": 20.0, "fisher_trace": 12.5}], None, "acc asr trace"),
        ([{"step": 0, "accuracy": 0, "asr": None, "fisher_trace": None}, {"step": 5, "asr": None}], None, "acc"),
        ([*CURVES, {"step": 9, "fisher_trace": float("nan")}, {"step": 9, "fisher_trace": 0.0}], None, "acc asr"),
        ([{"step": s, "fisher_trace": 7.0} for s in range(3)], None, "trace"),
        ([{"step": s, "fisher_trace": 10.0 ** (9 - s)} for s in range(20)], None, "trace"),
    ],
)
def test_purification_draws_each_curve_that_has_data_and_no_other(tmp_path, history, title, colors):
    path = plot_purification(history, tmp_path / "plots" / "purification.png", title)
    drawn = pixels(path)
    for name, color in (("acc", plots.BLUE), ("asr", plots.VERMILLION), ("trace", plots.GREEN)):
        assert has_color(drawn, color) == (name in colors.split()), name


def test_purification_has_one_panel_without_a_trace(tmp_path):
    both = pixels(plot_purification(CURVES + TRACES, tmp_path / "both.png"))
    single = pixels(plot_purification(CURVES, tmp_path / "single.png"))
    assert single.shape[0] < 0.7 * both.shape[0]


def test_purification_does_not_depend_on_the_order_of_the_rows(tmp_path):
    there = plot_purification(CURVES + TRACES, tmp_path / "there.png")
    back = plot_purification((CURVES + TRACES)[::-1], tmp_path / "back.png")
    assert there.read_bytes() == back.read_bytes()


def test_purification_states_the_first_and_last_percentages(tmp_path, texts):
    plot_purification(CURVES, tmp_path / "p.png")
    assert {"accuracy (ACC) 96.0 → 92.0 %", "attack success (ASR) 100.0 → 20.0 %"} <= {text for text, _ in texts}


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "history is empty"),
        ([{"accuracy": 1.0}], "needs a step"),
        ([{"step": 0}, {"step": 1, "asr": None}], "no row of the history has"),
        ([{"step": 0, "accuracy": 100.5}], "accuracy is a percentage from 0 to 100, got 100.5"),
        ([{"step": 0, "asr": -1}], "asr is a percentage"),
    ],
)
def test_purification_refuses_what_it_cannot_draw(tmp_path, history, message):
    with pytest.raises(ValueError, match=message):
        plot_purification(history, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (32, 32, 3), (30, 90, 3), (300, 40, 3)])
def test_triggers_draws_images_of_every_shape(tmp_path, shape, count):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    drawn = pixels(plot_triggers([example(image)] * count, tmp_path / "t.png", target="0"))
    assert has_color(drawn, plots.GREEN) and has_color(drawn, plots.VERMILLION)


def test_triggers_keeps_every_pixel_of_a_small_image(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    drawn = pixels(plot_triggers([example(image)], tmp_path / "t.png", target="0"))
    assert {tuple(p) for p in image.reshape(-1, 3)} <= {tuple(p) for p in drawn.reshape(-1, 3)}


def test_triggers_draws_the_first_eight_examples(tmp_path):
    rows = [example(label=str(i)) for i in range(9)]
    nine, eight = (plot_triggers(rows[:n], tmp_path / f"{n}.png", target="0") for n in (9, 8))
    assert nine.read_bytes() == eight.read_bytes()


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", ["4", BROKEN_MATH, WIDE, "two\nlines\tof text " * 9])
def test_triggers_texts_neither_overlap_nor_leave_the_picture(tmp_path, texts, name, count):
    drawn = pixels(plot_triggers([example(label=name, answer=name)] * count, tmp_path / "t.png", name, title=name))
    boxes = [box for text, box in texts if text]
    assert len(boxes) >= 9 * count
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= drawn.shape[1] and 0 <= box.y0 < box.y1 <= drawn.shape[0]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_triggers_of_a_victim_have_one_line_of_answers(tmp_path, texts):
    row = example()
    row["answer"] = row.pop("before")
    del row["after"]
    pixels(plot_triggers([row], tmp_path / "t.png", target="0"))
    written = [text for text, _ in texts]
    assert "answer: 4" in written and "answer: 0" in written
    assert not any(text.startswith(("before", "after")) for text in written)


def attack_row(name="badnets", image=None, answer="0"):
    row = example(image, answer=answer)
    return {"name": name, "target": "0", "answer": row.pop("before"), **row}


@pytest.mark.parametrize(("count", "text"), [(1, "0"), (1, BROKEN_MATH), (8, WIDE)])
def test_the_contact_sheet_is_legible_whatever_the_names(tmp_path, texts, count, text):
    rows = [attack_row(name=text, answer=text)] * count
    drawn = pixels(plot_attacks(rows, tmp_path / "sheet.png", title=text))
    boxes = [box for written, box in texts if written]
    assert len(boxes) >= 4 * count
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    assert has_color(drawn, plots.VERMILLION) == (text == "0")


def test_the_contact_sheet_amplifies_each_difference_by_itself_and_shows_images_of_several_sizes(tmp_path, texts):
    faint = attack_row(image=np.zeros((16, 12, 3), np.uint8))
    faint["triggered"] = faint["clean"] + np.uint8(2)
    pixels(plot_attacks([attack_row(), faint], tmp_path / "sheet.png"))
    assert {"difference ×1", "difference ×100"} <= {text for text, _ in texts}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no attack"),
        ([attack_row() | {"clean": np.zeros((9, 9), np.uint8)}], r"\(9, 9\) and \(8, 8\)"),
        ([attack_row() | {"clean": np.zeros((8, 8))}], "clean is uint8.*float64"),
    ],
)
def test_the_contact_sheet_refuses_what_it_cannot_draw(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        plot_attacks(rows, tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answer", "label", "symbol"), [("4", "4", "✓"), ("0", "4", "⚑"), ("7", "4", "✗"), ("0", "0", "✓")]
)
def test_an_answer_is_right_or_the_target_or_wrong_by_symbol_and_color(answer, label, symbol):
    verdicts = {plots._verdict(answer, "4", target="0") for answer in "407"}
    assert len({color for _, color in verdicts}) == 3
    assert plots._verdict(answer, label, target="0")[0] == symbol


@pytest.mark.parametrize(("largest", "gain"), [(0, 1), (1, 200), (25, 10), (26, 5), (51, 5), (128, 1), (255, 1)])
def test_the_difference_is_amplified_as_far_as_nothing_clips(largest, gain):
    assert plots._gain(largest) == gain


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no example"),
        ([example() | {"clean": np.zeros((8, 8))}], "clean is uint8.*float64"),
        ([example() | {"triggered": np.zeros((8, 8, 4), np.uint8)}], r"triggered is uint8.*\(8, 8, 4\)"),
        ([example() | {"clean": np.zeros(8, np.uint8)}], r"\(8,\)"),
        ([example() | {"clean": np.zeros((0, 8), np.uint8)}], r"\(0, 8\)"),
        ([example() | {"clean": np.zeros((9, 9), np.uint8)}], r"\(9, 9\) and \(8, 8\)"),
    ],
)
def test_triggers_refuses_what_it_cannot_draw(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        plot_triggers(rows, tmp_path / "t.png", target="0")
    assert not list(tmp_path.iterdir())


def test_a_picture_is_the_same_whatever_style_the_caller_has_set_and_the_style_is_kept(tmp_path):
    plain = plot_purification(CURVES + TRACES, tmp_path / "plain.png", "title")
    mine = {"axes.facecolor": "black", "text.color": "white", "font.size": 20.0, "text.usetex": True}
    with matplotlib.rc_context(mine):
        styled = plot_purification(CURVES + TRACES, tmp_path / "styled.png", "title")
        assert mine.items() <= dict(matplotlib.rcParams).items()
    assert styled.read_bytes() == plain.read_bytes()


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    path = plot_purification(CURVES, tmp_path / "p.png")
    before = path.read_bytes()

    def full_disk(figure, file, **kwargs):
        file.write_bytes(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space left"):
        plot_purification(CURVES + TRACES, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_importing_plots_does_not_load_matplotlib():
    code = "import hf_fip.plots, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_drawing_does_not_load_pyplot(tmp_path):
    code = (
        f"import sys, hf_fip.plots as p; p.plot_purification([{{'step': 0, 'asr': 1}}], {str(tmp_path / 'p.png')!r})"
    )
    assert (
        subprocess.run([sys.executable, "-c", f"{code}; sys.exit('matplotlib.pyplot' in sys.modules)"]).returncode == 0
    )


def audited(label="4", flagged=True, channels=1, side=8) -> dict:
    mask = np.zeros((side, side))
    mask[-3:, -3:] = 1
    pattern = np.ones((channels, side, side))
    return {"label": label, "mask": mask, "pattern": pattern, "size": 9.0, "anomaly": 4.25, "flagged": flagged}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["4", BROKEN_MATH, WIDE])
def test_an_audit_states_size_and_index_and_its_texts_do_not_overlap(tmp_path, texts, name, channels):
    rows = [audited(name, flagged, channels) for flagged in (True, False)]
    drawn = pixels(plots.plot_audit({"received": rows, name: rows}, tmp_path / "a.png", title=name))
    assert has_color(drawn, plots.VERMILLION)
    assert {"9.0 px ⚑", "9.0 px", "index 4.2"} <= {text for text, _ in texts}
    for one, other in itertools.combinations([box for text, box in texts if text], 2):
        assert not one.overlaps(other)


def test_an_audit_of_many_classes_shows_the_ten_most_anomalous_in_order(tmp_path, texts):
    rows = [audited(f"class {i}") | {"anomaly": float(i % 4)} for i in range(20)]
    plots.plot_audit({"model": rows}, tmp_path / "a.png")
    shown = [text for text, _ in texts if text.startswith("class")]
    assert shown == [f"class {i}" for i in (2, 3, 6, 7, 10, 11, 14, 15, 18, 19)]


@pytest.mark.parametrize(
    ("audits", "message"),
    [({}, "no class"), ({"a": []}, "no class"), ({"a": [audited()], "b": [audited("5")]}, "different classes")],
)
def test_an_audit_without_classes_or_of_different_ones_is_not_drawn(tmp_path, audits, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_audit(audits, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
