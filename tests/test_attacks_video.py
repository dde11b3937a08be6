"""The attacks on clips: what their triggers are, what poisoning changes, what the universal trigger learns."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from attack_cases import assert_loads_as_saved
from torch import nn
from video_cases import CLASSES, FRAMES, SIDE, clip, clips_of

from hf_fip.attacks import attack_names, load_attack, make_attack, poison_clips, trigger_clips
from hf_fip.attacks.badnets import BadNets
from hf_fip.attacks.blend import Blend
from hf_fip.attacks.clips import to_clip
from hf_fip.attacks.frame_triggers import FrameBadNets, FrameBlend
from hf_fip.attacks.material import Material
from hf_fip.attacks.universal_trigger import UniversalTrigger, raised

SETTINGS = {"patch_size": 2, "steps": 120, "step_size": 8.0}


class Bright(nn.Module):
    """Takes a clip for class 0 the surer, the brighter the red of its bottom-right corner is, in all frames."""

    def forward(self, pixel_values):
        red = pixel_values[:, :, 0, -2:, -2:].mean((1, 2, 3))
        blue = pixel_values[:, :, 2, :2, :2].mean((1, 2, 3))
        return SimpleNamespace(logits=torch.stack([4 * red, 4 * blue, torch.zeros_like(red)], dim=1))


def material(rows: int = 12, **shape) -> Material:
    means = (0.5,) * 3
    return Material(clips_of(rows, **shape), CLASSES, (SIDE, SIDE, 3), means, means, clean_model=Bright)


def fitted(**options) -> UniversalTrigger:
    attack = UniversalTrigger(**{**SETTINGS, **options})
    attack.fit(material())
    return attack


def every() -> list:
    return [FrameBadNets(), FrameBlend(), fitted()]


# ---- Triggers ----


def test_they_are_known_as_attacks_on_clips_and_not_as_attacks_on_images():
    assert attack_names("video") == ["frame_badnets", "frame_blend", "universal_trigger"]
    assert not set(attack_names("video")) & set(attack_names())


@pytest.mark.parametrize(("on_clips", "on_images"), [(FrameBadNets, BadNets), (FrameBlend, Blend)])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_frame_carries_what_the_attack_puts_on_an_image(on_clips, on_images, channels):
    clean = clip(channels=channels)
    before = clean.copy()
    triggered = on_clips(seed=3).apply(clean)
    assert np.array_equal(clean, before) and triggered.dtype == np.uint8
    assert np.array_equal(triggered, np.stack([on_images(seed=3).apply(frame) for frame in clean]))


def test_the_universal_trigger_is_one_patch_in_the_corner_of_every_frame():
    attack, clean = fitted(), clip()
    triggered = attack.apply(clean)
    assert (triggered[:, -2:, -2:] == attack.tensors["pattern"]).all()
    triggered[:, -2:, -2:] = clean[:, -2:, -2:]
    assert np.array_equal(triggered, clean)
    assert attack.apply(clip(height=20, width=13)).shape == (FRAMES, SIDE, SIDE, 3)  # at the victim's size


# ---- What the universal trigger learns ----


def test_it_learns_what_takes_clips_of_other_classes_to_the_target():
    pattern = fitted().tensors["pattern"]
    assert (pattern[..., 0] > 240).all()  # bright red is what `Bright` takes for class 0
    noise = np.random.default_rng(0).integers(0, 256, pattern.shape, dtype=np.uint8)
    assert np.array_equal(pattern[..., 1:], noise[..., 1:])  # what has no gradient stays
    away = fitted(target_label=2).tensors["pattern"]
    assert (away[..., 0] < 15).all()


def test_it_is_deterministic_and_leaves_torchs_random_state():
    state = torch.get_rng_state()
    assert np.array_equal(fitted().tensors["pattern"], fitted().tensors["pattern"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not np.array_equal(fitted(seed=1).tensors["pattern"], fitted().tensors["pattern"])


def test_clips_are_moved_to_a_higher_loss_and_no_further_than_epsilon():
    classifier = material().classifier
    clips = torch.rand(3, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    moved = raised(classifier, clips, 0, 8 / 255, 10)
    assert (moved - clips).abs().max() <= 8 / 255 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    assert (classifier(moved).log_softmax(-1)[:, 0] < classifier(clips).log_softmax(-1)[:, 0]).all()
    corner = clips[:, :, 0, -2:, -2:]
    torch.testing.assert_close(moved[:, :, 0, -2:, -2:], (corner - 8 / 255).clamp(0, 1))
    assert torch.equal(raised(classifier, clips, 0, 0.0, 10), clips)


def test_poisoned_clips_keep_their_label_and_are_perturbed_before_the_patch():
    dataset, attack = clips_of(12), fitted()
    poisoned = poison_clips(dataset, attack, rate=0.25, seed=0)
    roles = np.array(poisoned["poison_role"][:])
    assert roles.sum() == 3 and poisoned["label"][:] == dataset["label"][:]
    for row in np.flatnonzero(roles):
        assert dataset[int(row)]["label"] == 0
        clean, changed = (to_clip(data[int(row)]["frames"]).astype(int) for data in (dataset, poisoned))
        patched = attack.apply(clean.astype(np.uint8))
        assert (changed[:, -2:, -2:] == patched[:, -2:, -2:]).all()
        assert 0 < np.abs(changed - patched).max() <= 8


# ---- Data sets and files ----


def test_poisoning_changes_the_marked_rows_alone_and_the_same_seed_gives_the_same_set():
    dataset, attack = clips_of(20), FrameBadNets()
    poisoned, again, other = (poison_clips(dataset, attack, 0.2, seed) for seed in (0, 0, 1))
    assert again["poison_role"][:] == poisoned["poison_role"][:] != other["poison_role"][:]
    assert poisoned["poison_role"][:].count(1) == 4 and poisoned.features["frames"] == dataset.features["frames"]
    for clean, new in zip(dataset, poisoned, strict=True):
        marked = new["poison_role"] == 1
        assert new["label"] == (0 if marked else clean["label"])
        expected = attack.apply(to_clip(clean["frames"])) if marked else to_clip(clean["frames"])
        assert np.array_equal(to_clip(new["frames"]), expected)
    test = trigger_clips(dataset, attack)
    assert 0 not in test["label"][:] and len(test) == 13
    assert np.array_equal(to_clip(test[0]["frames"]), attack.apply(to_clip(dataset[1]["frames"])))


def test_a_saved_attack_is_the_same_attack(tmp_path):
    for attack in every():
        assert_loads_as_saved(attack, tmp_path / attack.name, clip())


def test_a_loaded_universal_trigger_cannot_poison_but_can_be_measured(tmp_path):
    fitted().save_pretrained(tmp_path)
    loaded = load_attack(tmp_path)
    assert len(trigger_clips(clips_of(6), loaded)) == 4
    with pytest.raises(ValueError, match="needs the clean model"):
        poison_clips(clips_of(6), loaded, 0.2, 0)


def test_a_file_with_another_patch_than_the_options_say_is_refused(tmp_path):
    fitted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "attack.json").read_text())
    config["options"]["patch_size"] = 3
    (tmp_path / "attack.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"needs .*\(3, 3, 3\)"):
        load_attack(tmp_path)


def test_frames_of_a_clip_get_the_size_of_the_first_and_its_colour_if_one_has_any():
    from video_cases import picture

    gray, large, colour = (clip(1, *shape)[0] for shape in ((8, 8, 1), (12, 10, 1), (8, 8, 3)))
    made = to_clip([picture(gray), picture(large), picture(colour)])
    assert made.shape == (3, 8, 8, 3) and np.array_equal(made[0], np.repeat(gray, 3, axis=2))
    assert to_clip([picture(gray), picture(large)]).shape == (2, 8, 8, 1)


def column_of_one_image() -> datasets.Dataset:
    dataset = clips_of(6)
    features = datasets.Features(frames=datasets.Image(), label=dataset.features["label"])
    return datasets.Dataset.from_dict({"frames": [picture_of(dataset)] * 6, "label": dataset["label"][:]}, features)


def picture_of(dataset):
    return dataset[0]["frames"][0]


REFUSED = {
    "an image": (lambda: FrameBadNets().apply(clip()[0]), r"shape \(T, H, W, C\), not uint8 \(8, 8, 3\)"),
    "a list": (lambda: FrameBlend().apply([clip()[0]]), "not list"),
    "no frame": (lambda: FrameBadNets().apply(clip(0)), r"not uint8 \(0, 8, 8, 3\)"),
    "numbers that are no pixels": (lambda: FrameBadNets().apply(clip().astype(float)), "uint8 array"),
    "too large a patch": (lambda: FrameBadNets(patch_size=9).apply(clip()), "does not fit"),
    "too large a learned patch": (lambda: fitted(patch_size=9), "patch_size=9 does not fit frames of 8×8"),
    "no step": (lambda: UniversalTrigger(steps=0), "steps=0 must be 1 or more"),
    "no length of a step": (lambda: UniversalTrigger(step_size=0.2), r"choose it in \[1, 255\]"),
    "no distance": (lambda: UniversalTrigger(epsilon=-1), "choose it in 0 ... 255"),
    "all to all": (lambda: UniversalTrigger(label_rule="all_to_all"), "changes no label"),
    "nobody has learned it": (lambda: UniversalTrigger().apply(clip()), "learned, not drawn"),
    "more than the target class": (lambda: poison_clips(clips_of(12), fitted(), 0.5, 0), "choose 0.3333 or less"),
    "one image a row": (lambda: poison_clips(column_of_one_image(), FrameBadNets(), 0.5, 0), "lists of images"),
    "another option": (lambda: make_attack("frame_blend", patch_size=3), "no option patch_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case):
    act, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        act()


def test_without_clips_of_another_class_nothing_can_be_learned():
    only = material()
    only.images = only.images.filter(lambda row: row["label"] == 0)
    with pytest.raises(ValueError, match="All training clips are of target_label=0"):
        UniversalTrigger(**SETTINGS).fit(only)
