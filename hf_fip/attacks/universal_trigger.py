"""Universal adversarial trigger: a patch trained on a clean model, in clips of the target class; labels are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .base import register
from .clips import FRAMES_COLUMN, FrameAttack, checked_clip, to_clip
from .perturbed import PerturbingAttack, raised

if TYPE_CHECKING:
    from torch import Tensor

    from .material import Material

BATCH = 16  # clips behind one step of the trigger


@register
@dataclass
class UniversalTrigger(FrameAttack, PerturbingAttack):
    """x' = p in the bottom-right patch of every frame, x outside; p takes any clip to the target for a clean model.

    From noise drawn by the seed, p takes steps against the sign of the gradient of CE(f(x'), t) − CE(f(x'), y), the
    mean over 16 training clips of other classes y that are drawn anew for each step; it is clipped and rounded to 8
    bits.

    Clean-label: only training clips of the target class t are poisoned. So that a model cannot tell their class
    without the patch, each is first moved within ε of itself (L∞) to where the clean model's loss on t is high, by
    projected gradient steps of 2.5 ε / `perturb_steps`. Test clips carry the patch only.

    In a balanced set of ten classes the default rate is 30 % of the target class, as in the paper.

    Source: Zhao et al., *Clean-Label Backdoor Attacks on Video Recognition Models*, CVPR 2020 (a patch of 24 pixels in
    frames of 224×224, ε of 8 at most and 10 steps).

    Args:
        patch_size: side of the patch in pixels.
        step_size: length of a step of the patch, in pixel values.
        steps: number of its steps.
        epsilon: ε, in pixel values; 0 leaves the clips unperturbed.
        perturb_steps: number of steps of a clip.
    """

    name: ClassVar[str] = "universal_trigger"
    default_rate: ClassVar[float] = 0.03
    clean_label: ClassVar[bool] = True

    patch_size: int = 4
    step_size: float = 4.0
    steps: int = 200
    epsilon: int = 8
    perturb_steps: int = 10

    def __post_init__(self):
        super().__post_init__()
        for option in ("patch_size", "steps", "perturb_steps"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)} must be 1 or more.")
        if not 1 <= self.step_size <= 255:
            raise ValueError(f"step_size={self.step_size} is a change of 8-bit pixels: choose it in [1, 255].")
        if not 0 <= self.epsilon <= 255:
            raise ValueError(f"epsilon={self.epsilon} is a distance in pixel values: choose it in 0 ... 255.")

    def blank_tensors(self, height: int, width: int, channels: int) -> dict[str, np.ndarray]:
        side = self.patch_size
        if side > min(height, width):
            raise ValueError(
                f"patch_size={side} does not fit frames of {height}×{width} pixels: "
                f"choose {min(height, width)} or less."
            )
        return {
            "pattern": np.zeros((side, side, channels), dtype=np.uint8),
            "size": np.array([height, width, channels], dtype=np.int64),
        }

    def fit(self, material: Material) -> None:
        """Train the patch on the material's clean model, and keep that model, which clips are perturbed with.

        Args:
            material: its `images` are clips of one length, with the columns `frames` and `label`; its `size` is that
                of a frame.

        Raises:
            ValueError: the patch does not fit the frames, there is no clean model, or no clip of another class than
                the target.
        """
        from .pixels import to_image, to_tensor

        blank, rng = self.blank_tensors(*material.size), np.random.default_rng(self.seed)
        noise = rng.integers(0, 256, blank["pattern"].shape, dtype=np.uint8)
        pattern = self._trained(to_tensor(noise).to(material.device), material, rng)
        self.tensors = {**blank, "pattern": to_image(pattern)}
        self._classifier = material.classifier

    def _trained(self, pattern: Tensor, material: Material, rng: np.random.Generator) -> Tensor:
        """The pattern after all steps from `pattern`, (1, C, side, side) in [0, 1] and in 8 bits."""
        import torch
        from torch.nn.functional import cross_entropy
        from tqdm.auto import tqdm

        from .pixels import as_stored, to_batch

        labels, side = np.asarray(material.images["label"][:]), self.patch_size
        others = np.flatnonzero(labels != self.target_label)
        if not len(others):
            raise ValueError(f"All training clips are of target_label={self.target_label}: choose another class.")
        for _ in tqdm(range(self.steps), desc=f"{self.name}, trigger", disable=not material.progress):
            rows = rng.choice(others, size=min(BATCH, len(others)), replace=False)
            clips = [to_clip(material.images[int(row)][FRAMES_COLUMN]) for row in rows]
            triggered = torch.stack([to_batch(list(clip), material.size) for clip in clips]).to(material.device)
            pattern = pattern.detach().requires_grad_()
            triggered[..., -side:, -side:] = pattern
            logits = material.classifier(triggered)
            true = torch.from_numpy(labels[rows]).to(material.device)
            cost = cross_entropy(logits, torch.full_like(true, self.target_label)) - cross_entropy(logits, true)
            (gradient,) = torch.autograd.grad(cost, pattern)
            pattern = as_stored(pattern - self.step_size / 255 * gradient.sign())
        return pattern

    def apply_in_training(self, images: list[np.ndarray], donors: list[np.ndarray | None]) -> list[np.ndarray]:
        """Return these clips of the target class at the victim's size, perturbed and with the patch.

        Raises:
            ValueError: a clip is of another kind, or `fit` has not been called.
        """
        from .pixels import to_batch, to_image

        done, classifier = [], self.kept_classifier()
        for clip in images:
            pixels = to_batch(list(checked_clip(clip)), self.size)[None].to(classifier.mean.device)
            moved = raised(classifier, pixels, self.target_label, self.epsilon / 255, self.perturb_steps)
            done.append(self.apply(np.stack([to_image(frame) for frame in moved[0]])))
        return done

    def _trigger(self, image: np.ndarray) -> np.ndarray:
        triggered = image.copy()
        triggered[-self.patch_size :, -self.patch_size :] = self.tensors["pattern"]
        return triggered
