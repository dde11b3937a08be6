"""How far each class of a classifier can be reached by a small universal trigger: an audit that knows no trigger.

A backdoor is a shortcut to its target: that class is reached by a far smaller trigger than the others. The audit
searches for the smallest patch and the smallest additive perturbation for each class (`inversion.py`), and the anomaly
index says how far the size for a class lies below the median of the classes.

It finds static triggers that are small in one of these senses. It does not find warps, sample-specific or all-to-all
triggers, and an audit that flags nothing proves nothing. With ten classes or fewer the median absolute deviation is a
weak estimate, and a class may be flagged because it is easy to reach by nature.

Source: Wang et al., *Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks*, IEEE S&P 2019.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..fisher.likelihood import at_least_float32, get_logits
from ..fisher.passes import RandomState, in_eval_mode
from ..fisher.trace import fisher_trace
from .inversion import Found, Inversion, Patch, Perturbation

ANOMALY_THRESHOLD = 2.0  # as in Neural Cleanse: 2.3 % of a normal distribution lie so far on the small side


@dataclass(frozen=True)
class ClassAudit:
    """What was found for one class.

    Attributes:
        label: the class.
        images: how many images of other classes the triggers were measured on.
        patch, perturbation: the smallest trigger of each kind.
        patch_anomaly, perturbation_anomaly: the anomaly index of its size among the classes that were reached.
    """

    label: int
    images: int
    patch: Found
    perturbation: Found
    patch_anomaly: float
    perturbation_anomaly: float

    @property
    def flagged(self) -> bool:
        """Whether the anomaly index of either trigger is above 2."""
        return max(self.patch_anomaly, self.perturbation_anomaly) > ANOMALY_THRESHOLD


@dataclass(frozen=True)
class AuditReport:
    """An audit of one model.

    Attributes:
        classes: what was found for each class that was audited.
        fisher_trace: Tr F over all parameters, on the same images.
    """

    classes: list[ClassAudit]
    fisher_trace: float

    @property
    def flagged(self) -> list[int]:
        """The classes that are flagged."""
        return [audit.label for audit in self.classes if audit.flagged]

    def to_dict(self) -> dict:
        """The figures as JSON values; the triggers are left out."""

        def trigger(found: Found, anomaly: float) -> dict:
            return {"size": found.size, "share": found.share, "anomaly": anomaly}

        classes = [
            {
                "label": audit.label,
                "images": audit.images,
                "flagged": audit.flagged,
                "patch": trigger(audit.patch, audit.patch_anomaly),
                "perturbation": trigger(audit.perturbation, audit.perturbation_anomaly),
            }
            for audit in self.classes
        ]
        return {"flagged": self.flagged, "classes": classes, "fisher_trace": self.fisher_trace}


def audit(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    classes: Sequence[int] | None = None,
    share: float = 0.99,
    steps: int = 300,
    images_per_step: int = 16,
    batch_size: int = 320,
    seed: int = 0,
    progress: bool = False,
) -> AuditReport:
    """Search for the smallest triggers of a classifier's classes.

    The model runs in eval mode and is left as it was found: weights, `.grad`, `requires_grad`, train mode and torch's
    random state do not change.

    Args:
        model: called with `pixel_values`; its output has `.logits` of shape `(B, K)`, or is the logits.
        pixels: clean images `(N, C, H, W)` in [0, 1].
        labels: `(N,)` their true classes.
        mean, std: of the model's preprocessing, one number or one a channel: it sees `(pixels − mean) / std`.
        classes: which to audit; all K by default.
        share: how many of the images of other classes a trigger has to take to its class.
        steps: the most steps of Adam a search takes; it ends earlier when its trigger gets no smaller.
        images_per_step: clean images in each step, for each class.
        batch_size: rows in one forward pass; `batch_size / images_per_step` searches run side by side.
        seed: of the first triggers, the order of the images, and the labels drawn for Tr F.
        progress: show a bar.

    Raises:
        ValueError: for fewer than three classes, a class the model does not have, one that has no image of another
            class, answers that are not finite, or arguments that are not as above.
    """
    _check(pixels, labels, share, steps=steps, images_per_step=images_per_step, batch_size=batch_size)
    parameter = next(model.parameters())
    pixels, labels = pixels.to(parameter.device, torch.float32), labels.to(parameter.device)
    mean, std = (torch.as_tensor(part, dtype=torch.float32).to(pixels.device).view(-1, 1, 1) for part in (mean, std))

    def inputs(images: Tensor) -> Tensor:
        return ((images - mean) / std).to(parameter.dtype)

    def logits(images: Tensor) -> Tensor:
        return at_least_float32(get_logits(model(pixel_values=inputs(images))))

    with RandomState.capture(pixels.device).replayed(), in_eval_mode(model):
        with torch.no_grad():
            answers = torch.cat([logits(part) for part in pixels.split(batch_size)])
        if not answers.isfinite().all():
            raise ValueError("The model's answers to clean images are not finite: its weights are broken.")
        classes = _audited(classes, answers.shape[-1], labels)
        inversion = Inversion(logits, pixels, labels, share, steps, images_per_step, batch_size, seed)
        with tqdm(total=2 * steps * len(classes), desc="Auditing", disable=not progress, leave=False) as bar:
            patches, perturbations = (inversion.run(kind, classes, bar.update) for kind in (Patch, Perturbation))
        with _all_trainable(model):
            batch = {"pixel_values": inputs(pixels), "labels": labels}
            trace = fisher_trace(model, batch, generator=torch.Generator().manual_seed(seed))
    images = [int((labels != label).sum()) for label in classes]
    anomalies = [_anomalies(kind, share) for kind in (patches, perturbations)]
    rows = zip(classes, images, patches, perturbations, *anomalies, strict=True)
    return AuditReport([ClassAudit(*row) for row in rows], trace)


def anomaly_index(sizes: Sequence[float]) -> list[float]:
    """(median − size) / (1.4826 · MAD) of each size, on the small side only: 0 for those above the median.

    1.4826 turns the median absolute deviation into the standard deviation of a normal distribution. It counts as at
    least 1 % of the median: sizes that are all but equal are no anomaly.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    median = np.median(sizes)
    deviation = max(np.median(np.abs(sizes - median)), 0.01 * median)
    return (np.maximum(0.0, median - sizes) / (1.4826 * deviation)).tolist()


def _anomalies(found: list[Found], share: float) -> list[float]:
    """The anomaly index among the classes that were reached, 0 for the rest; all 0 where fewer than three were."""
    reached = [row for row, trigger in enumerate(found) if trigger.share >= share]
    indices = [0.0] * len(found)
    if len(reached) >= 3:
        for row, index in zip(reached, anomaly_index([found[row].size for row in reached]), strict=True):
            indices[row] = index
    return indices


def chance_of_a_flag(classes: int) -> float:
    """How often an index above 2 flags at least one of so many classes whose sizes are normal: from 0 to 1, simulated.

    About a third for ten classes and nearly always for two hundred: the index is a hint where to look, no test.
    """
    sizes = np.random.default_rng(0).normal(size=(2000, classes))
    away = np.median(sizes, axis=1, keepdims=True) - sizes
    deviation = np.median(np.abs(away), axis=1, keepdims=True)
    return float((away / (1.4826 * deviation) > ANOMALY_THRESHOLD).any(axis=1).mean())


def compare_audits(received: AuditReport, purified: AuditReport) -> dict[str, list[int]]:
    """The classes flagged in the received model only (`removed`), in both (`left`), in the purified only (`new`).

    Raises:
        ValueError: when the audits are of other classes.
    """
    if [audit.label for audit in received.classes] != [audit.label for audit in purified.classes]:
        raise ValueError("The two audits are of different classes: audit the same ones in both models.")
    before, after = set(received.flagged), set(purified.flagged)
    return {"removed": sorted(before - after), "left": sorted(before & after), "new": sorted(after - before)}


def _check(pixels: Tensor, labels: Tensor, share: float, **counts: int) -> None:
    if pixels.ndim != 4 or not len(pixels) or labels.shape != pixels.shape[:1]:
        shapes = f"{tuple(pixels.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"An audit needs images (N, C, H, W) and their labels (N,); the shapes are {shapes}.")
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"Pixels lie from {pixels.min():.3g} to {pixels.max():.3g}, and have to be in [0, 1]: "
            "undo the preprocessing, and pass its mean and std."
        )
    if not 0 < share <= 1:
        raise ValueError(f"share={share} has to be above 0 and at most 1.")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} has to be at least 1.")


def _audited(classes: Sequence[int] | None, known: int, labels: Tensor) -> list[int]:
    """The classes to audit, in order."""
    classes = sorted(set(range(known) if classes is None else classes))
    if unknown := [label for label in classes if not 0 <= label < known]:
        raise ValueError(f"Class {unknown[0]} is none of the model's: it has {known}, 0 to {known - 1}.")
    if len(classes) < 3:
        raise ValueError(f"An audit compares classes: it needs at least 3, and got {len(classes)}.")
    if alone := [label for label in classes if (labels == label).all()]:
        raise ValueError(f"All images are of class {alone[0]}: an audit needs clean images of other classes too.")
    return classes


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Run with a gradient for every parameter, also those that an adapter or a user has frozen."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
