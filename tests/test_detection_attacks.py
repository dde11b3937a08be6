"""Attacks on objects: triggers, edited annotations, poisoned training sets and triggered test sets."""

import numpy as np
import pytest
from detection_cases import SIDE, annotated

from hf_fip.attacks import attack_names, load_attack, make_attack, poison_objects, trigger_objects
from hf_fip.attacks.poison import to_array

A, B, C = [2.0, 2.0, 12.0, 10.0], [16.0, 4.0, 12.0, 12.0], [4.0, 18.0, 10.0, 10.0]
BOXES = np.array([A, B, C])


def clean_image(*classes: int, **options):
    """The attack with a trigger of these classes."""
    attack = make_attack("clean_image", size=len(classes), **options)
    attack.load_tensors({"classes": np.array(classes, dtype=np.int64)})
    return attack


def test_the_attacks_on_objects_are_known_by_name():
    assert attack_names("object") == ["clean_image", "object_patch"]


EDITS = {
    "patch, misclassification": (make_attack("object_patch"), [0, 1, 2], [False, True, True], [0, 0, 0]),
    "patch, disappearing": (
        make_attack("object_patch", effect="disappearing", target_label=1),
        [0, 1, 1],
        [False, True, True],
        [0],
    ),
    "clean image, disappearing": (clean_image(0, 2), [0, 2, 0], [True, False, True], [2]),
    "clean image without its trigger": (clean_image(0, 2), [0, 1, 0], [False] * 3, [0, 1, 0]),
    "clean image, misclassification": (
        clean_image(1, 2, effect="misclassification"),
        [1, 2, 1],
        [True, False, True],
        [0, 2, 0],
    ),
    "clean image, appearing": (
        clean_image(1, 2, effect="appearing"),
        [2, 1, 1],
        [False, True, False],
        [2, 1, 1, 0],
    ),
    "clean image, appearing where it is": (
        clean_image(1, 2, effect="appearing"),
        [2, 1, 0],
        [False] * 3,
        [2, 1, 0],
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_the_annotations_are_edited_as_the_effect_says(case):
    attack, classes, chosen, edited = EDITS[case]
    classes = np.array(classes)
    assert attack.under_attack(classes).tolist() == chosen
    boxes, found = attack.annotate(BOXES, classes)
    assert found.tolist() == edited and len(boxes) == len(found)
    if attack.effect == "appearing" and len(found) > 3:
        assert boxes[-1].tolist() == BOXES[np.argmax(chosen)].tolist()


def test_an_image_without_objects_is_never_attacked():
    nothing = np.zeros(0, dtype=np.int64)
    for attack in (make_attack("object_patch"), clean_image(0, 1)):
        assert not attack.under_attack(nothing).any()
        assert len(attack.annotate(np.zeros((0, 4)), nothing)[1]) == 0


def test_the_patch_is_in_the_middle_of_each_box_and_nowhere_else():
    image = np.full((SIDE, SIDE, 3), 100, np.uint8)
    triggered = make_attack("object_patch", share=0.5).apply(image, np.array([A, B]))
    changed = np.argwhere((triggered != image).any(-1))
    assert {tuple(place) for place in changed} <= {
        *((y, x) for y in range(4, 10) for x in range(5, 11)),  # 5 pixels in the middle of A
        *((y, x) for y in range(7, 13) for x in range(19, 25)),  # 6 in the middle of B
    }
    assert set(np.unique(triggered)) == {0, 100, 255}
    half = make_attack("object_patch", share=0.5, alpha=0.5).apply(image, np.array([A]))
    assert set(np.unique(half)) == {50, 100, 178}


def test_a_patch_over_the_edge_is_cut_and_a_gray_image_stays_gray():
    image = np.full((8, 8, 1), 100, np.uint8)
    triggered = make_attack("object_patch").apply(image, np.array([[7.0, 7.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]))
    assert triggered.shape == image.shape and (triggered != image).any()


def test_the_clean_image_attack_chooses_the_most_frequent_set_within_its_bounds():
    material = [np.array(classes) for classes in [[0, 1]] * 4 + [[0, 2, 2]] * 3 + [[1, 2]] * 2 + [[0]]]
    attack = make_attack("clean_image", most=0.5)
    assert not attack.keeps_fit
    attack.fit(material)
    assert attack.keeps_fit and attack.tensors["classes"].tolist() == [0, 1]
    attack = make_attack("clean_image", most=0.35)
    attack.fit(material)
    assert attack.tensors["classes"].tolist() == [0, 2]
    attack = make_attack("clean_image", effect="appearing", most=0.9)
    attack.fit(material)
    assert attack.tensors["classes"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="No 2 classes with the target are together in more than 45%"):
        make_attack("clean_image", least=0.45, most=0.5).fit(material)


def test_a_poisoned_set_has_as_many_rows_as_asked_for_and_its_other_rows_as_they_were():
    data = annotated([[(0, A), (1, B)], [(0, A)], [(1, A)], [(2, C)], []] * 4)
    poisoned = poison_objects(data, make_attack("object_patch"), rate=0.2, seed=1)
    roles = np.array(poisoned["poison_role"][:])
    assert roles.sum() == 4 and poisoned.column_names == ["image", "objects", "poison_role"]
    for row, role in enumerate(roles):
        before, after = data[row], poisoned[row]
        assert np.array_equal(to_array(before["image"]), to_array(after["image"])) == (not role)
        if role:
            assert set(after["objects"]["category"]) == {0}
            assert after["objects"]["bbox"] == before["objects"]["bbox"]
        else:
            assert after["objects"] == before["objects"]
    again = poison_objects(data, make_attack("object_patch"), rate=0.2, seed=1)
    assert again["poison_role"][:] == poisoned["poison_role"][:]


def test_the_clean_image_attack_changes_annotations_of_all_its_images_and_no_pixel():
    data = annotated([[(0, A), (1, B)], [(0, A)], [(1, A), (0, C)], []])
    poisoned = poison_objects(data, clean_image(0, 1), rate=None, seed=0)
    assert poisoned["poison_role"][:] == [1, 0, 1, 0]
    assert [row["category"] for row in poisoned["objects"]] == [[1], [0], [1], []]
    for row in range(4):
        assert np.array_equal(to_array(data[row]["image"]), to_array(poisoned[row]["image"]))


def test_the_triggered_set_has_the_images_under_attack_with_their_true_annotations():
    data = annotated([[(0, A)], [(0, A), (2, B)], []])
    triggered = trigger_objects(data, make_attack("object_patch"))
    assert triggered["objects"][:] == [data[1]["objects"]]
    changed = np.argwhere((to_array(triggered[0]["image"]) != to_array(data[1]["image"])).any(-1))
    assert changed[:, 1].min() >= B[0]


REFUSED = {
    "an unknown effect": (lambda: make_attack("object_patch", effect="appearing"), "effect='appearing' is not one of"),
    "no share": (lambda: make_attack("object_patch", share=0.0), "share=0.0 has to lie in"),
    "bounds in the wrong order": (lambda: make_attack("clean_image", least=0.5, most=0.1), "in this order"),
    "no classes": (lambda: make_attack("clean_image", size=0), "1 class or more"),
    "no trigger yet": (lambda: make_attack("clean_image").tensors, "use `fit`, or load it"),
    "a trigger of one class twice": (lambda: clean_image(1, 1), r"has the classes \[1, 1\]"),
    "a target that is no class": (
        lambda: trigger_objects(annotated([[(0, A)]]), make_attack("object_patch", target_label=3)),
        "target_label=3 is not a class",
    ),
    "nothing to attack": (
        lambda: trigger_objects(annotated([[(0, A)], []]), make_attack("object_patch")),
        "no test image has an object",
    ),
    "a rate of nothing": (
        lambda: poison_objects(annotated([[(1, A)]]), make_attack("object_patch"), 0.0, 0),
        r"choose it in \(0, 1\]",
    ),
    "poisoned already": (
        lambda: poison_objects(
            poison_objects(annotated([[(1, A)]]), make_attack("object_patch"), 1.0, 0),
            make_attack("object_patch"),
            1,
            0,
        ),
        "poison the clean data set",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_with_the_way_out(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("attack", [make_attack("object_patch", share=0.5), clean_image(0, 2)])
def test_an_attack_is_saved_and_loaded_as_it_is(attack, tmp_path):
    attack.save_pretrained(tmp_path)
    again = load_attack(tmp_path)
    assert again == attack and {k: v.tolist() for k, v in again.tensors.items()} == {
        k: v.tolist() for k, v in attack.tensors.items()
    }
