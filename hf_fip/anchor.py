"""The pull to the received weights, (η_r / 2) Σ_i F̄_ii (θ_i − θ̄_i)²: θ̄ and diag F̄, and the file that keeps them.

Source: Karim et al., *Fisher Information guided Purification against Backdoor Attacks*, CCS 2024.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ANCHOR_NAME = "fip_anchor.safetensors"


@dataclass(frozen=True)
class Anchor:
    """The received weights θ̄ and the diagonal F̄ of the Fisher there, by parameter name. Neither ever changes."""

    received: dict[str, Tensor]
    diagonal: dict[str, Tensor]

    def pull(self, name: str, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """One parameter's share of the term, without η_r: ½ Σ_i F̄_ii (θ_i − θ̄_i)² and its gradient F̄ (θ − θ̄).

        Raises:
            ValueError: when the received value is not known.
        """
        if name not in self.received:
            raise ValueError(
                f"eta_r > 0, and the received value of {name} is not known: freeze and unfreeze parameters before "
                "`train`, and resume only from a checkpoint of the same model."
            )
        moved = parameter.detach() - self.received[name]
        gradient = self.diagonal[name] * moved
        return 0.5 * (gradient * moved).sum(), gradient

    def save(self, folder: str) -> None:
        """Write both to `folder`, which is made when it is not there."""
        os.makedirs(folder, exist_ok=True)
        tensors = {f"received.{name}": tensor.contiguous() for name, tensor in self.received.items()}
        tensors |= {f"diagonal.{name}": tensor.contiguous() for name, tensor in self.diagonal.items()}
        save_file(tensors, os.path.join(folder, ANCHOR_NAME))

    @classmethod
    def load(cls, folder: str, device: torch.device) -> Anchor:
        """What `save` wrote.

        Raises:
            ValueError: when the folder has no such file.
        """
        path = os.path.join(folder, ANCHOR_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"{folder} has no {ANCHOR_NAME}, so the received weights are not known: it was written with eta_r=0 "
                "or save_only_model=True. Resume with eta_r=0, or start anew."
            )
        groups: dict[str, dict[str, Tensor]] = {"received": {}, "diagonal": {}}
        for key, tensor in load_file(path).items():
            group, _, name = key.partition(".")
            groups[group][name] = tensor.to(device)
        return cls(**groups)
