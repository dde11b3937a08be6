"""Clean-label attacks that make their training samples hard to tell without the trigger, with a clean model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .learned import LearnedAttack

if TYPE_CHECKING:
    from torch import Tensor

    from .pixels import PixelClassifier


class PerturbingAttack(LearnedAttack):
    """An attack whose `fit` keeps the material's clean model in `_classifier`: poisoning perturbs samples with it."""

    fits_every_run: ClassVar[bool] = True  # the clean model, which files do not keep

    _classifier = None

    def kept_classifier(self) -> PixelClassifier:
        """The clean model.

        Raises:
            ValueError: `fit` has not been called.
        """
        if self._classifier is None:
            raise ValueError(
                f"poisoning with {self.name} needs the clean model that `fit` keeps, and files do not: "
                "call `fit` first."
            )
        return self._classifier


def raised(
    classifier: PixelClassifier, inputs: Tensor, label: int, epsilon: float, steps: int, step: float | None = None
) -> Tensor:
    """`inputs`, (B, …) in [0, 1], moved within ε (L∞) to where the classifier's loss on one label is high.

    Args:
        step: length of a step; 2.5 ε / `steps` when left out.

    Source: Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018 (from the inputs
    themselves).
    """
    import torch

    step = 2.5 * epsilon / steps if step is None else step
    labels = torch.full((len(inputs),), label, device=inputs.device)
    moved = inputs
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(classifier(moved), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        change = (moved + step * gradient.sign() - inputs).clamp(-epsilon, epsilon)
        moved = (inputs + change).clamp(0, 1)
    return moved.detach()
