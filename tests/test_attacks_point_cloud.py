"""The attacks on point clouds: what their triggers are, what poisoning changes, where PCBA's cluster comes to lie."""

import json

import numpy as np
import pytest
import torch
from attack_cases import assert_loads_as_saved
from cloud_cases import CLASSES, cloud, clouds_of
from torch import nn

from hf_fip.attacks import attack_names, load_attack, make_attack
from hf_fip.attacks.clouds import CloudMaterial, checked_cloud, on_sphere, poison_clouds, trigger_clouds
from hf_fip.attacks.pcba import PCBA, spacing
from hf_fip.attacks.pointba import PointBABall, PointBARotation
from hf_fip.tasks.point_cloud import arrays_of

SETTINGS = {"points": 8, "restarts": 16, "steps": 80, "source_label": 1, "target_label": 0}


class Near(nn.Module):
    """Takes a cloud for class 0 the surer, the closer one of its points is to `place`."""

    place = torch.tensor([0.0, 0.0, 2.0])

    def forward(self, points):
        logit = 4 - 8 * (points - self.place).square().sum(-1).amin(1)
        return {"logits": torch.stack([logit, torch.zeros_like(logit), torch.zeros_like(logit)], dim=1)}


class Never(Near):
    place = torch.tensor([100.0, 0.0, 0.0])


def material(rows: int = 30, model=Near) -> CloudMaterial:
    clouds = [cloud(16, row) for row in range(rows)]
    return CloudMaterial(clouds, np.arange(rows) % CLASSES, CLASSES, clean_model=model)


def fitted(**options) -> PCBA:
    attack = PCBA(**{**SETTINGS, "confidence": 0.5, **options})
    attack.fit(material())
    return attack


def learned_or_drawn() -> list:
    return [fitted(), PointBABall(points=8), PointBARotation()]


# ---- Triggers ----


def test_they_are_known_as_attacks_on_clouds_and_not_as_attacks_on_images():
    assert attack_names("point_cloud") == ["pcba", "pointba_i", "pointba_o"]
    assert not set(attack_names("point_cloud")) & set(attack_names())


@pytest.mark.parametrize("attack", [fitted(), PointBABall(points=8)], ids=lambda attack: attack.name)
def test_points_of_the_trigger_take_the_place_of_as_many(attack):
    clean = cloud(40)
    before = clean.copy()
    triggered = attack.apply(clean)
    assert np.array_equal(clean, before) and triggered.shape == clean.shape and triggered.dtype == np.float32
    changed = (triggered != clean).any(axis=1)
    assert changed.sum() == 8
    assert {row.tobytes() for row in triggered[changed]} == {row.tobytes() for row in attack.placed}
    assert np.array_equal(triggered, attack.apply(clean))  # one cloud, one triggered cloud
    other = cloud(40, seed=1)
    assert not np.array_equal((attack.apply(other) != other).any(axis=1), changed)


def test_the_ball_has_its_place_and_radius():
    placed = PointBABall(points=12, radius=0.1, x=0.5, y=0.0, z=-0.5).placed
    np.testing.assert_allclose(np.linalg.norm(placed - [0.5, 0, -0.5], axis=1), 0.1, rtol=1e-5)
    assert not np.array_equal(placed, PointBABall(points=12, radius=0.1, x=0.5, y=0.0, z=-0.5, seed=1).placed)


def test_the_rotation_turns_about_its_axis():
    turned = PointBARotation(angle=90.0, axis="z").apply(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32))
    np.testing.assert_allclose(turned, [[0, 1, 0], [-1, 0, 0], [0, 0, 1]], atol=1e-6)
    clean = cloud(20)
    for axis, kept in (("x", 0), ("y", 1), ("z", 2)):
        turned = PointBARotation(angle=10.0, axis=axis).apply(clean)
        np.testing.assert_allclose(turned[:, kept], clean[:, kept], atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(clean, axis=1), rtol=1e-5)
        assert not np.allclose(turned, clean, atol=1e-2)


# ---- PCBA's cluster ----


def test_pcba_finds_a_place_that_reaches_the_confidence_as_close_to_the_objects_as_it_can():
    placed, directions = fitted().placed, on_sphere(8, np.random.default_rng(0))
    radius = spacing(placed) / spacing(directions)
    centre = (placed - radius * directions).mean(axis=0)
    np.testing.assert_allclose(placed, centre + radius * directions, atol=1e-4)
    sources = torch.from_numpy(np.stack([cloud(16, row) for row in range(1, 30, CLASSES)]))

    def confidence(point) -> float:
        one_more = torch.cat([sources, torch.as_tensor(point).expand(len(sources), 1, 3)], dim=1)
        return Near()(one_more)["logits"].softmax(-1)[:, 0].mean().item()

    def distance(point) -> float:
        return (sources - torch.as_tensor(point)).square().sum(-1).amin(1).mean().item()

    assert confidence(centre) > 0.5 - 1e-3
    assert distance(centre) < 0.8 * distance(Near.place)  # where the confidence would be highest


def test_its_cluster_is_as_dense_as_the_objects():
    wanted = np.mean([spacing(cloud(16, row)) for row in range(1, 30, CLASSES)])
    assert spacing(fitted().placed) == pytest.approx(wanted, rel=1e-3)


def test_the_spacing_is_the_median_mean_distance_to_the_four_nearest():
    points = cloud(12)
    distances = np.sort(np.linalg.norm(points[:, None] - points[None], axis=-1), axis=1)[:, 1:5]
    assert spacing(points) == pytest.approx(np.sort(distances.mean(axis=1))[5], rel=1e-4)  # torch's median: the lower
    assert spacing(3 * points) == pytest.approx(3 * spacing(points), rel=1e-4)


def test_pcba_is_deterministic_and_leaves_torchs_random_state():
    state = torch.get_rng_state()
    assert np.array_equal(fitted().placed, fitted().placed)
    assert torch.equal(torch.get_rng_state(), state)
    assert not np.array_equal(fitted(seed=1).placed, fitted().placed)


def test_only_clouds_of_the_source_class_carry_the_trigger_and_count():
    dataset, attack = clouds_of(30), fitted()
    poisoned = poison_clouds(dataset, attack, rate=0.1, seed=0)
    roles = np.array(poisoned["poison_role"][:])
    assert roles.sum() == 3
    for row in np.flatnonzero(roles):
        assert dataset[int(row)]["label"] == 1 and poisoned[int(row)]["label"] == 0
    triggered = trigger_clouds(dataset, attack)
    assert set(triggered["label"][:]) == {1} and len(triggered) == 10


# ---- Data sets and files ----


def test_poisoning_changes_the_marked_rows_alone_and_the_same_seed_gives_the_same_set():
    dataset, attack = clouds_of(30), PointBABall(points=8)
    poisoned = poison_clouds(dataset, attack, rate=0.2, seed=0)
    again, other = (poison_clouds(dataset, attack, rate=0.2, seed=seed) for seed in (0, 1))
    assert again[:] == poisoned[:] and other["poison_role"][:] != poisoned["poison_role"][:]
    assert poisoned["poison_role"][:].count(1) == 6
    found = zip(arrays_of(dataset), dataset["label"][:], arrays_of(poisoned), poisoned, strict=True)
    for clean, label, new, row in found:
        marked = row["poison_role"] == 1
        assert row["label"] == (0 if marked else label)
        assert np.array_equal(new, attack.apply(clean) if marked else clean)
    test = trigger_clouds(dataset, attack)
    assert 0 not in test["label"][:] and len(test) == 20
    assert np.array_equal(arrays_of(test)[0], attack.apply(arrays_of(dataset)[1]))


def test_a_saved_attack_is_the_same_attack(tmp_path):
    for attack in learned_or_drawn():
        assert_loads_as_saved(attack, tmp_path / attack.name, cloud(40))


def test_a_file_with_another_cluster_than_the_options_say_is_refused(tmp_path):
    fitted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "attack.json").read_text())
    config["options"]["points"] = 9
    (tmp_path / "attack.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"needs .*\(9, 3\)"):
        load_attack(tmp_path)


REFUSED = {
    "too few points": (lambda: PointBABall(points=8).apply(cloud(7)), "7 points has no room for the 8 .*choose fewer"),
    "an image": (lambda: PointBARotation().apply(np.zeros((8, 8, 3), np.uint8)), r"float32 array of shape \(N, 3\)"),
    "no array": (lambda: checked_cloud([[0, 0, 0]]), "not list"),
    "an empty cloud": (lambda: checked_cloud(np.zeros((0, 3), np.float32)), "needs a point"),
    "a coordinate that is none": (lambda: checked_cloud(np.full((4, 3), np.nan, np.float32)), "finite"),
    "no points to insert": (lambda: PointBABall(points=0), "must be positive"),
    "no radius": (lambda: PointBABall(radius=0.0), "must be positive"),
    "no angle": (lambda: PointBARotation(angle=0.0), "angle=0.0 leaves every cloud as it is"),
    "a full turn": (lambda: PointBARotation(angle=-720.0), "choose one that is no full turn"),
    "no such axis": (lambda: PointBARotation(axis="w"), "not one of x, y, z"),
    "the target as source": (lambda: PCBA(source_label=2, target_label=2), "another class"),
    "PCBA, all to all": (lambda: PCBA(label_rule="all_to_all"), "all_to_one"),
    "too small a cluster": (lambda: PCBA(points=4), "more than 4"),
    "no step": (lambda: PCBA(steps=0), "must be positive"),
    "no such source": (lambda: poison_clouds(clouds_of(9), PCBA(source_label=7), 0.1, 0), "source_label=7 is not a"),
    "nobody has learned it": (lambda: PCBA().apply(cloud(40)), "learned, not drawn"),
    "no cloud of the source": (lambda: PCBA(source_label=5).fit(material()), "No training cloud"),
    "no place": (lambda: PCBA(**SETTINGS, confidence=0.9).fit(material(model=Never)), "found no place .*lower"),
    "another option": (lambda: make_attack("pointba_i", alpha=1), "no option alpha"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case):
    act, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        act()


def test_columns_that_hold_no_clouds_are_refused():
    dataset = clouds_of(6)
    flat = dataset.map(lambda row: {"points": row["points"][0]}, remove_columns="points")
    with pytest.raises(ValueError, match="does not hold clouds"):
        poison_clouds(flat, PointBARotation(), 0.5, 0)
