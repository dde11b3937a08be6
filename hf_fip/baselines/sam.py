"""FT-SAM: fine-tuning with sharpness-aware minimisation, its ascent step adapted to the size of each weight.

Source: Zhu et al., *Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization*, ICCV 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..sharpness import SharpnessAware
from .fine_tuning import FineTuningConfig, FineTuningTrainer


@dataclass
class FTSAMConfig(FineTuningConfig):
    """Arguments of [`FTSAMTrainer`], with the defaults of BackdoorBench's `ft-sam`: those of `ft`, and the ones below.

    Label smoothing is that of `Trainer`: over all classes, where BackdoorBench spreads it over all but the label's.
    The cosine falls to zero over the run; BackdoorBench steps one of length 100 at every update, so that its rate goes
    down and up again every 200 updates.

    Raises:
        ValueError: `rho` is not positive and finite.
    """

    rho: float = field(default=2.0, metadata={"help": "Length of the ascent step, in units of the weights."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Share of a label that all classes get."})

    def check(self) -> None:
        super().check()
        if not 0 < self.rho < math.inf:
            raise ValueError(
                f"rho={self.rho} has to be positive, and finite: without an ascent step, the method is ft."
            )


class FTSAMTrainer(SharpnessAware, FineTuningTrainer):
    """
    Fine-tunes by sharpness-aware minimisation, see [`SharpnessAware`].

    Dropout draws new masks in the second pass, as in the public code. Nothing in it depends on the architecture.

    Raises:
        FloatingPointError: (from `train`) when the loss at the perturbed weights is NaN or infinite.
    """

    _config_class = FTSAMConfig
