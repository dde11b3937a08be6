"""What a singular-value adapter is asked to be."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from peft import PeftConfig

ALL = "all"


class SingularValueType(str, enum.Enum):
    """The name of this method among PEFT's, which has a closed list of its own."""

    SINGULAR_VALUE = "SINGULAR_VALUE"


@dataclass
class SingularValueConfig(PeftConfig):
    """
    This is the configuration class of a [`SingularValueModel`], the adapter of Fast FIP.

    Each targeted weight W = U diag(σ) Vᵀ becomes W' = U diag(ReLU(σ + s ∘ δ)) Vᵀ. U, σ and V are frozen; the shift δ,
    zero at the start, is trained: as many numbers as the weight has singular values. Its unit s is `scale` · σ, so
    that δ is a share of what is there, or, as in the paper, `scale` alone.

    Source: Karim et al., *Fisher Information guided Purification against Backdoor Attacks*, CCS 2024, Fast FIP.

    Args:
        target_modules (`Union[list[str], str]`, *optional*, defaults to `"all"`):
            `"all"` for every supported layer (Linear, Conv1d/2d/3d, Embedding, transformers' Conv1D and
            MultiheadAttention) whose weight is its own; or names, or a regular expression.
        rank (`int`, *optional*):
            Shift only so many of the largest singular values of each layer. All of them when left out. With `"all"`, a
            layer that has fewer shifts all of its own.
        scale (`float`, *optional*, defaults to 1.0):
            Factor of δ; with SGD a step of the shift grows with its square.
        relative (`bool`, *optional*, defaults to `True`):
            Whether δ is a share of each singular value. One learning rate then serves layers and models whose weights
            are of another size; a singular value of zero stays zero. `False` is the paper's form.
        floor (`float`, *optional*, defaults to 0.1):
            The share of σ below which `FIPTrainer` lets no singular value fall. At zero it would have no gradient,
            by the ReLU, and stay there, which makes training brittle. 0 turns this off, as in the paper.
        train_norms (`bool`, *optional*, defaults to `False`):
            Train the norm layers' weights and biases too, and save them with the adapter (with the running statistics
            of BatchNorm, which otherwise stand still).
        rank_pattern (`dict[str, int]`, *optional*):
            Layer names or regular expressions and the rank they get instead of `rank`.
        save_basis (`bool`, *optional*, defaults to `False`):
            Save U and V with the adapter. Without them a file holds two numbers a singular value (σ and δ) and is
            loaded by decomposing the same weights again, which gives the same function on any machine. With them it is
            about twice as large as the model, and loads without decomposing when `low_cpu_mem_usage=True`.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Names, or a regular expression, of layers to leave out.
        modules_to_save (`list[str]`, *optional*):
            Modules besides, trained and saved whole.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Adapt only blocks of these indexes, as in `LoraConfig`.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of the list of blocks, when it is not the first numbered one.
        init_weights (`bool`, *optional*, defaults to `True`):
            `False` draws a random δ, for tests: the adapted model then differs from the received one.
    """

    target_modules: list[str] | str | None = field(
        default=ALL,
        metadata={"help": "'all' for every supported layer, a list of names, or a regular expression."},
    )
    rank: int | None = field(default=None, metadata={"help": "Shift so many of the largest singular values; all."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the shift."})
    relative: bool = field(default=True, metadata={"help": "Whether the shifts are shares of the singular values."})
    floor: float = field(
        default=0.1, metadata={"help": "Share of each singular value that training leaves, so that it can come back."}
    )
    train_norms: bool = field(default=False, metadata={"help": "Train the norm layers too."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Names or regular expressions of layers, and the rank they get."}
    )
    save_basis: bool = field(default=False, metadata={"help": "Save U and V with the adapter."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the shift starts at zero."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = SingularValueType.SINGULAR_VALUE
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` needs `target_modules` to be a list of names.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`.")
        for where, rank in (("rank", self.rank), *(self.rank_pattern or {}).items()):
            if rank is not None and not (isinstance(rank, int) and rank >= 1):
                raise ValueError(f"{where}={rank!r}: a rank is a whole number of at least 1.")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale} has to be positive, and finite.")
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor={self.floor} has to be at least 0 and below 1.")
