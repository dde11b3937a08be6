"""Detectors and multi-label classifiers: inputs, what is measured, training, saving and resuming."""

import numpy as np
import pytest
import torch
from detection_cases import CLASSES, CLASSIFIERS, DETECTORS, NAMES, SIDE, annotated, detr, rt_detr, yolos
from PIL import Image as Pillow
from trainer_cases import QUIET
from transformers import DetrImageProcessor, RTDetrImageProcessor, ViTImageProcessor, YolosImageProcessor

from hf_fip import FIPConfig, FIPTrainer, SingularValueConfig
from hf_fip.attacks import make_attack, trigger_objects
from hf_fip.evaluation.detection import (
    Objects,
    answer_at,
    intersection_over_union,
    is_detected,
    label_mean_average_precision,
    mean_average_precision,
)
from hf_fip.evaluation.reactivation import PixelRange
from hf_fip.plots_detection import plot_objects
from hf_fip.tasks.detection_augmentation import erase_objects, mirror
from hf_fip.tasks.detectors import ARCHITECTURES, small_detector
from hf_fip.tasks.multi_label import LabelSetDataset, MultiLabelTest, load_multi_label_classifier
from hf_fip.tasks.object_detection import (
    DetectionDataset,
    DetectionTest,
    DetectionTrainer,
    collator,
    load_detector,
)

A, B = [2.0, 2.0, 12.0, 12.0], [16.0, 14.0, 12.0, 12.0]
SCENES = [[(0, A), (1, B)], [(1, A)], [], [(2, B)], [(0, B)], [(1, A), (2, B)]]
FIXED = {"size": {"height": SIDE, "width": SIDE}, "do_pad": False}
PROCESSORS = {"detr": DetrImageProcessor, "rt_detr": RTDetrImageProcessor, "yolos": YolosImageProcessor}
SHORT = {"max_steps": 2, "per_device_train_batch_size": 3, "logging_steps": 1, "trace_interval": 1, **QUIET}


def objects(*found: tuple) -> Objects:
    """(class, left, top, right, bottom[, score]) each."""
    boxes = np.array([row[1:5] for row in found], dtype=np.float64).reshape(-1, 4)
    scores = np.array([row[5] for row in found]) if found and len(found[0]) > 5 else np.zeros(len(found))
    return Objects(boxes, np.array([row[0] for row in found], dtype=np.int64), scores)


# ---- What is measured ----


def test_mean_average_precision_is_100_for_the_truth_and_0_for_nothing():
    truths = [objects((0, 0, 0, 10, 10), (2, 5, 5, 20, 20)), objects()]
    sure = [objects((0, 0, 0, 10, 10, 0.9), (2, 5, 5, 20, 20, 0.8)), objects()]
    assert mean_average_precision(sure, truths, CLASSES) == pytest.approx({"map": 100, "map_50": 100})
    assert mean_average_precision([objects(), objects()], truths, CLASSES) == {"map": 0, "map_50": 0}


def test_mean_average_precision_of_a_loose_box_counts_the_thresholds_that_it_meets():
    truths, loose = [objects((0, 0, 0, 10, 10))], [objects((0, 0, 0, 10, 7.2, 0.9))]  # IoU 0.72: 0.50 ... 0.70
    assert mean_average_precision(loose, truths, CLASSES) == pytest.approx({"map": 50, "map_50": 100})


def test_a_surer_false_detection_halves_the_average_precision():
    truths = [objects((0, 0, 0, 10, 10))]
    answers = [objects((0, 0, 0, 10, 10, 0.5), (0, 20, 20, 30, 30, 0.9))]
    assert mean_average_precision(answers, truths, CLASSES)["map_50"] == pytest.approx(50)


def test_mean_average_precision_needs_objects_and_as_many_answers_as_images():
    with pytest.raises(ValueError, match="no annotations"):
        mean_average_precision([objects()], [objects()], CLASSES)
    with pytest.raises(ValueError, match="answers to 0 images, and 1 images"):
        mean_average_precision([], [objects()], CLASSES)


def test_a_detection_counts_by_class_score_and_overlap():
    box = np.array([0.0, 0, 10, 10])
    assert intersection_over_union(np.array([[0.0, 0, 10, 5], [20, 20, 30, 30]]), box).tolist() == [0.5, 0]
    assert is_detected(objects((1, 0, 0, 10, 5, 0.3)), box, 1)
    assert not is_detected(objects((1, 0, 0, 10, 4.9, 0.9)), box, 1)
    assert not is_detected(objects((1, 0, 0, 10, 10, 0.29)), box, 1)
    assert not is_detected(objects((2, 0, 0, 10, 10, 0.9)), box, 1)


def test_an_object_is_taken_for_its_surest_detection():
    box, other = np.array([0.0, 0, 10, 10]), (0, 20, 20, 30, 30, 0.99)
    assert answer_at(objects((1, 0, 0, 10, 9, 0.4), (2, 0, 0, 10, 10, 0.5), other), box) == 2
    assert answer_at(objects((1, 0, 0, 10, 9, 0.29), other), box) is None
    assert answer_at(objects(), box) is None


def test_the_multi_label_mean_leaves_out_classes_that_no_image_has():
    labels, scores = np.array([[1, 0, 0], [0, 1, 0.0]]), np.array([[0.9, 0.8, 1], [0.1, 0.2, 1]])
    assert label_mean_average_precision(scores, labels) == pytest.approx(100 * (1 + 0.5) / 2)
    with pytest.raises(ValueError, match="no class to measure on"):
        label_mean_average_precision(scores, np.zeros((2, 3)))


# ---- Inputs ----


def test_images_of_several_sizes_and_without_objects_make_a_batch():
    data = annotated(SCENES[:3], sizes=[(32, 32), (32, 48), (40, 32)])
    processor = DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    dataset = DetectionDataset(data, processor)
    model = detr()
    batch = collator(model)([dataset[row] for row in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 40, 48)
    assert [mask.sum().item() for mask in batch["pixel_mask"]] == [32 * 32, 32 * 48, 40 * 32]
    assert batch["labels"][2]["boxes"].shape == (0, 4)
    assert batch["labels"][1]["boxes"][0].tolist() == pytest.approx([8 / 48, 8 / 32, 12 / 48, 12 / 32])
    assert torch.isfinite(model(**batch).loss)
    assert "pixel_mask" not in collator(yolos())([dataset[0]])


def test_an_image_that_cannot_be_read_is_named():
    class Damaged:
        def __getitem__(self, row):
            if row == "objects":
                return [{"bbox": [], "category": []}]
            raise Pillow.UnidentifiedImageError("cannot identify")

        def __len__(self):
            return 1

    with pytest.raises(ValueError, match="Image 0 of the data set cannot be read"):
        DetectionDataset(Damaged(), YolosImageProcessor(**FIXED))


def test_a_mirrored_image_has_its_boxes_mirrored():
    dataset = DetectionDataset(annotated([[(0, A)]]), YolosImageProcessor(**FIXED))
    batch = collator(yolos())([dataset[0]] * 20)
    torch.manual_seed(0)
    done = mirror(batch)
    flipped = [torch.equal(image, batch["pixel_values"][0].flip(-1)) for image in done["pixel_values"]]
    assert 0 < sum(flipped) < 20
    for image, was_flipped in zip(done["labels"], flipped, strict=True):
        assert image["boxes"][0, 0].item() == pytest.approx(1 - 8 / SIDE if was_flipped else 8 / SIDE)


def test_only_objects_are_erased_in_part_and_half_of_them():
    processor = DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    dataset = DetectionDataset(annotated([[(0, A)], [(0, A)]], sizes=[(32, 32), (48, 64)]), processor)
    batch = collator(detr())([dataset[row % 2] for row in range(40)])
    torch.manual_seed(0)
    done = erase_objects(PixelRange.of(processor, 32, 32, 3))(batch)
    changed = (done["pixel_values"] != batch["pixel_values"]).any(dim=1)
    scale = [1, 32 / 48]  # of the second image
    for row, image in enumerate(changed):
        inside = round(2 * scale[row % 2]) - 1, round(14 * scale[row % 2]) + 2
        outside = image.clone()
        outside[slice(*inside), slice(*inside)] = False
        assert not outside.any() and image.sum() < 0.6 * (14 * scale[row % 2]) ** 2
    assert 10 < changed.flatten(1).any(dim=1).sum() < 30
    assert done["labels"] is batch["labels"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_detectors_answer_wide_images_in_pixels(architecture):
    model, processor = small_detector(architecture, NAMES, 96, 128, most_objects=7, largest_side=64)
    dataset = DetectionDataset(annotated([[(0, A)], []], sizes=[(96, 128)] * 2), processor)
    model.eval()
    assert dataset[0]["pixel_values"].shape == (3, 64, 64)  # sides are multiples of 32
    outputs = model(**collator(model)([dataset[0], dataset[1]]))
    assert torch.isfinite(outputs.loss)
    found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=torch.tensor([[96, 128]] * 2))
    assert outputs.logits.shape[1] == 14 and len(found) == 2 and found[0]["labels"].max() < CLASSES


# ---- Training ----


def detection_trainer(family: str, tmp_path, model=None, **changes):
    """A trainer of a tiny detector, and the test of the patch."""
    peft_config = changes.pop("peft_config", None)
    model, processor = model or DETECTORS[family](), PROCESSORS[family](**FIXED)
    data, attack = annotated(SCENES), make_attack("object_patch")
    trainer = DetectionTrainer(
        model,
        FIPConfig(str(tmp_path), **{**SHORT, **changes}),
        train_dataset=DetectionDataset(data, processor),
        data_collator=collator(model),
        peft_config=peft_config,
    )
    test = DetectionTest(
        DetectionDataset(data, processor),
        DetectionDataset(trigger_objects(data, attack), processor),
        attack=attack,
        processor=processor,
        num_classes=CLASSES,
    )
    return trainer, test


@pytest.mark.parametrize("family", DETECTORS)
@pytest.mark.parametrize("changes", [{"eta_r": 1.0}, {"peft_config": SingularValueConfig(train_norms=True)}])
def test_a_detector_is_purified_and_measured(family, changes, tmp_path):
    trainer, test = detection_trainer(family, tmp_path, **changes)
    before = test.measure(trainer)
    assert before.keys() == {"map", "map_50", "asr", "ra"} and all(0 <= value <= 100 for value in before.values())
    trainer.train()
    logged = [row for row in trainer.state.log_history if "fisher_trace" in row]
    assert len(logged) == 2 and all(row["fisher_trace"] > 0 for row in logged)
    test.measure(trainer)
    assert len(test.answers["clean"]) == len(SCENES) and len(test.answers["triggered"]) == 4


def test_without_its_terms_it_is_the_plain_trainer(tmp_path):
    weights = []
    for trainer_class in (DetectionTrainer, FIPTrainer):
        model = yolos()
        trainer = trainer_class(
            model,
            FIPConfig(str(tmp_path), eta_f=0.0, **SHORT),
            train_dataset=DetectionDataset(annotated(SCENES), YolosImageProcessor(**FIXED)),
            data_collator=collator(model),
        )
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    whole, _ = detection_trainer("yolos", tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    wanted = torch.cat([p.flatten() for p in whole.model.parameters()])
    again, _ = detection_trainer("yolos", tmp_path, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(torch.cat([p.flatten() for p in again.model.parameters()]), wanted)


def test_a_test_on_a_part_has_at_most_so_many_images(tmp_path):
    trainer, test = detection_trainer("yolos", tmp_path)
    part = test.part(2)
    assert len(part.clean) == len(part.triggered) == 2
    assert part.measure(trainer).keys() == {"map", "map_50", "asr", "ra"}


def test_asr_and_ra_are_over_the_objects_under_attack():
    processor = YolosImageProcessor(**FIXED)
    data = annotated([[(0, A), (1, B)]])
    right, target = (1, *(16, 14, 28, 26), 0.9), (0, *(16, 14, 28, 26), 0.9)
    cases = {"misclassification": (make_attack("object_patch"), {right: (0, 100), target: (100, 0)})}
    gone = make_attack("object_patch", effect="disappearing", target_label=1)
    cases["disappearing"] = (gone, {right: (0, 100), target: (100, 0)})
    here = make_attack("clean_image", effect="appearing", size=1)
    here.load_tensors({"classes": np.array([1])})
    for attack, answers in cases.values():
        triggered = DetectionDataset(trigger_objects(data, attack), processor)
        test = DetectionTest(triggered, triggered, attack=attack, processor=processor, num_classes=CLASSES)
        for answer, expected in answers.items():
            hits = test._hits([objects(answer)])
            assert tuple(100 * np.mean(part) for part in hits) == expected
    triggered = DetectionDataset(trigger_objects(annotated([[(1, B)]]), here), processor)
    test = DetectionTest(triggered, triggered, attack=here, processor=processor, num_classes=CLASSES)
    assert test._hits([objects(right, target)]) == ([True], [True])  # seen beside what is there


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_multi_label_classifier_is_purified_and_measured(family, tmp_path):
    model, processor = CLASSIFIERS[family](), ViTImageProcessor(size=FIXED["size"])
    data = annotated(SCENES)
    dataset = LabelSetDataset(data, processor, CLASSES)
    assert dataset.labels.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]]
    trainer = FIPTrainer(model, FIPConfig(str(tmp_path), **SHORT), train_dataset=dataset)
    triggered = LabelSetDataset(trigger_objects(data, make_attack("object_patch")), processor, CLASSES)
    test = MultiLabelTest(dataset, triggered, np.ones(len(triggered), dtype=int), attack=make_attack("object_patch"))
    trainer.train()
    measured = test.measure(trainer)
    assert measured.keys() == {"map", "asr"} and trainer.state.log_history[0]["fisher_trace"] > 0
    with torch.no_grad():
        model.classifier[-1].bias.fill_(-50) if family == "resnet" else model.classifier.bias.fill_(-50)
    assert test.measure(trainer)["asr"] == 0
    assert len(test.part(2).clean) == 2 and test.part(2).measure(trainer)["asr"] == 0


# ---- Files ----


@pytest.mark.parametrize("family", DETECTORS)
def test_a_saved_detector_loads_as_it_was(family, tmp_path):
    model = DETECTORS[family]()
    model.save_pretrained(tmp_path)
    PROCESSORS[family](**FIXED).save_pretrained(tmp_path)
    again, processor = load_detector(str(tmp_path))
    pixels = torch.randn(1, 3, SIDE, SIDE)
    assert torch.equal(again.eval()(pixels).logits, model(pixels).logits)
    assert processor.post_process_object_detection


def test_what_is_no_detector_or_answers_one_class_is_refused(tmp_path):
    model = CLASSIFIERS["vit"]()
    model.save_pretrained(tmp_path / "labels")
    with pytest.raises(ValueError, match="lacks the head of a ...ForObjectDetection"):
        load_detector(str(tmp_path / "labels"))
    rt_detr().save_pretrained(tmp_path / "detector")
    with pytest.raises(ValueError, match="no image processor: set --image_processor_name"):
        load_detector(str(tmp_path / "detector"))
    ViTImageProcessor().save_pretrained(tmp_path / "detector")
    with pytest.raises(ValueError, match="not one of a detector"):
        load_detector(str(tmp_path / "detector"))
    model.config.problem_type = None
    model.save_pretrained(tmp_path / "one")
    ViTImageProcessor().save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="answers one class an image"):
        load_multi_label_classifier(str(tmp_path / "one"))


def test_the_picture_needs_an_example_and_takes_boxes_or_none(tmp_path):
    image = np.zeros((20, 30, 3), np.uint8)
    box = np.array([1.0, 2, 10, 12])
    boxes = {"clean": image, "triggered": image, "truth": [("cat", box)], "before": [("dog", box)], "after": []}
    labels = {"clean": image, "triggered": image, "truth": [("cat", None)], "answer": [("dog", None), ("cat", None)]}
    for name, rows in {"boxes": [boxes] * 2, "labels": [labels]}.items():
        path = plot_objects(rows, tmp_path / f"{name}.png", "dog", title="$a_b")
        assert Pillow.open(path).size[0] > 500
    with pytest.raises(ValueError, match="no example"):
        plot_objects([], tmp_path / "none.png", "dog")
