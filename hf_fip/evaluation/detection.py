"""mAP and ASR of what models say of the objects in images, in percent, each with its denominator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SCORE = 0.3  # a detection of a lower score does not count for ASR and RA; mAP takes all
OVERLAP = 0.5  # intersection over union, from which a detection is one of an object


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        boxes: (N, 4), left, top, right, bottom, in pixels.
        classes: (N,) integers.
        scores: (N,), of what a model detected; None for what is there.
    """

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None


def mean_average_precision(answers: Sequence[Objects], truths: Sequence[Objects], num_classes: int) -> dict:
    """COCO's `map` (mean over classes and over the IoU from 0.50 to 0.95) and `map_50` (at 0.50), by faster-coco-eval.

    Over all objects of all test images, 100 detections an image at most; classes that no image has do not count.

    Raises:
        ValueError: faster-coco-eval is not installed, there is no object at all, or the numbers of images differ.
    """
    coco_eval = _import_coco_eval()
    if len(answers) != len(truths):
        raise ValueError(f"There are answers to {len(answers)} images, and {len(truths)} images.")
    annotations, detections = [], []
    for image, (answer, truth) in enumerate(zip(answers, truths, strict=True), start=1):
        for box, category in zip(_xywh(truth.boxes), truth.classes.tolist(), strict=True):
            number = len(annotations) + 1
            shape = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            annotations.append({"id": number, "image_id": image, "category_id": category + 1, **shape})
        rows = zip(_xywh(answer.boxes), answer.classes.tolist(), answer.scores.tolist(), strict=True)
        for box, category, score in rows:
            detections.append({"image_id": image, "category_id": category + 1, "bbox": box, "score": score})
    if not annotations:
        raise ValueError("There is no object to measure on: the test images have no annotations.")
    if not detections:
        return {"map": 0.0, "map_50": 0.0}
    truth = coco_eval.COCO(
        {
            "images": [{"id": image} for image in range(1, len(truths) + 1)],
            "categories": [{"id": number, "name": str(number)} for number in range(1, num_classes + 1)],
            "annotations": annotations,
        }
    )
    found = truth.loadRes(detections)
    evaluation = coco_eval.COCOeval_faster(truth, found, "bbox", print_function=lambda *lines: None)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {"map": 100 * float(evaluation.stats[0]), "map_50": 100 * float(evaluation.stats[1])}


def is_detected(answer: Objects, box: np.ndarray, category: int) -> bool:
    """Whether an image's answer has this class, with a score of 0.3 or more, where this box is: IoU of 0.5 or more."""
    counts = (answer.classes == category) & (answer.scores >= SCORE)
    return bool((intersection_over_union(answer.boxes[counts], box) >= OVERLAP).any())


def answer_at(answer: Objects, box: np.ndarray) -> int | None:
    """What an image's answer takes the object in this box for: the class of the surest detection of it.

    A detection is one of the object with a score of 0.3 or more and an IoU of 0.5 or more; None where there is none.
    """
    counts = (answer.scores >= SCORE) & (intersection_over_union(answer.boxes, box) >= OVERLAP)
    return int(answer.classes[counts][answer.scores[counts].argmax()]) if counts.any() else None


def intersection_over_union(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(N,), of boxes (N, 4) with one box, (4,): left, top, right, bottom."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(area - shared, 1e-9)


def label_mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """mAP of multi-label answers: the mean over classes of the average precision, by scikit-learn; percent.

    Args:
        scores: (images, classes), the higher the surer.
        labels: (images, classes), 1 where the class is in the image. Classes that no image has do not count.

    Raises:
        ValueError: no image has a class.
    """
    from sklearn.metrics import average_precision_score

    there = labels.any(axis=0)
    if not there.any():
        raise ValueError("There is no class to measure on: the test images have no objects.")
    return 100 * float(average_precision_score(labels[:, there], scores[:, there], average="macro"))


def share(hits: Sequence[bool]) -> float:
    """Percent of hits; ValueError where there is nothing."""
    if not len(hits):
        raise ValueError("There is no object to measure on: no test image has one that the attack is for.")
    return 100.0 * float(np.mean(hits))


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def _import_coco_eval():
    try:
        import faster_coco_eval
    except ImportError as error:
        raise ValueError("mAP needs faster-coco-eval: pip install 'hf-fip[detection]'.") from error
    return faster_coco_eval
