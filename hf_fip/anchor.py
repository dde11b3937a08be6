"""The pull to the received weights, (η_r / 2) Σ_i F̄_ii (θ_i − θ̄_i)²: θ̄ and diag F̄, and the file that keeps them.

Source: Karim et al., *Fisher Information guided Purification against Backdoor Attacks*, CCS 2024.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .fisher.sharded import any_sharded, whole

ANCHOR_NAME = "fip_anchor.safetensors"
SHARDED_ANCHOR_NAME = "fip_anchor_sharded"  # a folder, written by all processes


@dataclass(frozen=True)
class Anchor:
    """The received weights θ̄ and the diagonal F̄ of the Fisher there, by parameter name. Neither ever changes.

    Both are sharded as the parameters are.
    """

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
        return whole(0.5 * (gradient * moved).sum()), gradient

    def save(self, folder: str, write: bool) -> None:
        """Write both to `folder`, which is made when it is not there. To be called on all processes.

        Args:
            folder: a checkpoint's.
            write: whether this process writes what is the same on all of them.
        """
        if any_sharded(self.received.values()):
            from torch.distributed import checkpoint  # heavy

            checkpoint.save(_flat(self), checkpoint_id=os.path.join(folder, SHARDED_ANCHOR_NAME))
        elif write:
            os.makedirs(folder, exist_ok=True)
            save_file(_flat(self), os.path.join(folder, ANCHOR_NAME))

    @classmethod
    def load(cls, folder: str, parameters: dict[str, Tensor]) -> Anchor:
        """What `save` wrote, for the parameters of these names: on their devices, and sharded as they are.

        Raises:
            ValueError: when the folder has no such file, or one that was written with another sharding.
        """
        check_anchor(folder)
        sharded = any_sharded(parameters.values())
        if sharded != os.path.isdir(os.path.join(folder, SHARDED_ANCHOR_NAME)):
            raise ValueError(f"{folder} was written {'without' if sharded else 'with'} FSDP: resume it likewise.")
        if sharded:
            from torch.distributed import checkpoint  # heavy

            anchor = cls(*({name: torch.zeros_like(p.detach()) for name, p in parameters.items()} for _ in range(2)))
            checkpoint.load(_flat(anchor), checkpoint_id=os.path.join(folder, SHARDED_ANCHOR_NAME))
            return anchor
        device = next(iter(parameters.values())).device
        groups: dict[str, dict[str, Tensor]] = {"received": {}, "diagonal": {}}
        for key, tensor in load_file(os.path.join(folder, ANCHOR_NAME)).items():
            group, _, name = key.partition(".")
            groups[group][name] = tensor.to(device)
        return cls(**groups)


def _flat(anchor: Anchor) -> dict[str, Tensor]:
    groups = {"received": anchor.received, "diagonal": anchor.diagonal}
    return {f"{group}.{name}": t.contiguous() for group, named in groups.items() for name, t in named.items()}


def check_anchor(folder: str) -> None:
    """Raise a ValueError when a checkpoint does not have the received weights."""
    if not any(os.path.exists(os.path.join(folder, name)) for name in (ANCHOR_NAME, SHARDED_ANCHOR_NAME)):
        raise ValueError(
            f"{folder} has no {ANCHOR_NAME}, so the received weights are not known: it was written with eta_r=0 "
            "or save_only_model=True. Resume with eta_r=0, or start anew."
        )
