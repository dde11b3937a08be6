"""What the study runs: victims, purifiers with their settings, and the suites made of them.

Development victims, on which settings were found, have the seeds 100 and above: none of their rows is in a table. Of
those that others published, I-BAU's BadNets victim is one too, and stands in a table of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from study_run import RELEASED, Cell, Method, Victim

from hf_fip.config import FAST_FIP
from hf_fip.scripts.purify_image import ETA_F, FAST_FIP_SETTINGS, FIP_SETTINGS
from hf_fip.tasks.data import DIGITS

SEEDS = (1, 2, 3)
RELEASED_WEIGHTS = (0.5, 0.005)  # the released default, and what its author advises
RATES = (0.01, 0.05, 0.2)  # of plain fine-tuning with its own learning rate
ETAS_F, PAPER_ETAS_F, ETAS_R = (0.0, 0.3, 1.0), (0.001, 0.01), (0.1, 1.0, 10.0)  # beside the defaults
CLEAN_LABELS = {"fisher_labels": "empirical", "trace_estimator": "signed_sum"}  # the default one is of sampled labels
TAKEN_OTHERWISE = (CLEAN_LABELS, {"trace_interval": 1}, {"eta_f_schedule": "constant"})  # the trace
DISTURBED = ("ft", "ft_sam", "nad", "fst")  # baselines that are also given FIP's disturbances
OWN_RATE = "fine-tuning, own rate"
# BackdoorBench's configuration of NAD; its program makes 10 epochs, which are a few updates on so few images.
NAD = {"num_train_epochs": 100.0, "lr_scheduler_type": "cosine", "weight_decay": 1e-4}
FEW = ("FIP", "FIP, control (eta_f 0)", "Fast FIP", "ft", "ft, disturbed", "nad, disturbed")
BASELINES = ("ft", "ft_sam", "nad", "fst", "i_bau")
OTHERWISE = {"nad": NAD}  # arguments other than a baseline's defaults
OF_CHANNELS = ("nft", "clp", "anp", "rnp", "awm")  # mask the channels or kernels of convolutional networks
# What 8×8 pixels of gray need otherwise than the attacks' defaults (see benchmarks/attacks.py).
DIGITS_ATTACKS = {
    "badnets": (),
    "blend": (),
    "sig": (("attack_options", "delta=200,frequency=3"),),
    "wanet": (("attack_options", "strength=2.0,cover_rate=0.0"), ("poison_rate", "0.2")),
}
CIFAR_OPTIONS = (
    ("max_train_samples", "10000"),
    ("max_test_samples", "2000"),
    ("clean_samples", "1000"),
    ("num_train_epochs", "15"),
    ("augment", "true"),
)
PUBLISHED = ("ibau_smallvgg_cifar10_badnets_t8", "ibau_smallvgg_cifar10_trojan_wm_t2", "lth_resnet20_cifar10_rgb_t0")
PUBLISHED_BENIGN, PUBLISHED_DEVELOPMENT = "clean_resnet20_cifar10", PUBLISHED[0]


@dataclass(frozen=True)
class Places:
    """Where the user has what a suite needs."""

    cifar10: str | None = None
    victims: str | None = None
    released_code: str | None = None


def fip(family: str, **arguments) -> dict:
    """The arguments of FIP: the recipes' defaults."""
    settings = {name: value for name, value in FIP_SETTINGS.items() if name != "disturb"}
    return settings | {"eta_f": ETA_F[family]} | arguments


def fast_fip(family: str, **arguments) -> dict:
    """The arguments of Fast FIP: the recipes' defaults."""
    settings = {name: value for name, value in FAST_FIP_SETTINGS[family].items() if name != "adapter_relative"}
    return fip(family) | FAST_FIP | settings | arguments


def adapter(family: str) -> dict:
    """The arguments of Fast FIP's adapter: the recipes' defaults."""
    return {"train_norms": True, "relative": FAST_FIP_SETTINGS[family].get("adapter_relative", True)}


def purifiers(places: Places, family: str, augment: bool) -> list[Method]:
    """All purifiers and the controls of FIP: each baseline with the settings of its paper.

    Args:
        places: with a clone of the released code, that is one more, for the ResNets: it cannot train a ViT, whose
            attention has no second derivative.
        family: `vit` or `resnet`.
        augment: shift (and mirror) the clean images, for every method.
    """
    shared = {"augment": augment}
    ours = {**shared, "disturb": True}
    purifiers = [
        Method("FIP", arguments=fip(family), **ours),
        Method("FIP, control (eta_f 0)", arguments=fip(family, eta_f=0.0), **ours),
        Method("FIP, undisturbed", arguments=fip(family), **shared),
        Method("control, undisturbed", arguments=fip(family, eta_f=0.0), **shared),
        Method(OWN_RATE, arguments=fip(family, eta_f=0.0), learning_rates=RATES, **shared),
        Method("Fast FIP", arguments=fast_fip(family), adapter=adapter(family), **ours),
        Method("Fast FIP, control (eta_f 0)", arguments=fast_fip(family, eta_f=0.0), adapter=adapter(family), **ours),
        *(Method(name, name, OTHERWISE.get(name, {}), **shared) for name in BASELINES),
        Method("nad, 10 epochs", "nad", **shared),
        *(Method(name, name, **shared) for name in OF_CHANNELS if family == "resnet"),
        *(Method(f"{name}, disturbed", name, OTHERWISE.get(name, {}), **ours) for name in DISTURBED),
    ]
    if places.released_code and family == "resnet":
        for weight in RELEASED_WEIGHTS:
            arguments = {"clone": places.released_code, "reg_F": weight}
            purifiers.append(Method(f"released code, {weight}", RELEASED, arguments, **shared))
    return purifiers


def digits(places: Places) -> list[Cell]:
    """Handwritten digits, 8×8, a ViT and a ResNet of 78,000 parameters: four attacks, all purifiers, relearning."""
    return [
        Cell(Victim(DIGITS, family, attack, seed, options), method, relearn=True)
        for family in ("resnet", "vit")
        for method in purifiers(places, family, augment=False)
        for attack, options in DIGITS_ATTACKS.items()
        for seed in SEEDS
    ]


def digits_benign(places: Places) -> list[Cell]:
    """What purification costs models of the digits that never had a backdoor."""
    return [
        Cell(Victim(DIGITS, family, "none", seed), method)
        for family in ("resnet", "vit")
        for method in _few(purifiers(places, family, augment=False), OWN_RATE)
        for seed in SEEDS
    ]


def digits_clean(places: Places) -> list[Cell]:
    """Fewer clean images: 10, 30, 90 of the digits' 1,347 training images (0.7 %, 2.2 %, 6.7 %), and all 269."""
    return [
        Cell(Victim(DIGITS, family, "badnets", seed), method, clean_samples=count)
        for family in ("resnet", "vit")
        for method in _few(purifiers(places, family, augment=False))
        for count in (10, 30, 90)
        for seed in SEEDS
    ]


def digits_poison(places: Places) -> list[Cell]:
    """Other shares of poisoned images: 1 % and 5 % (0.1 % is one image of the digits)."""
    return [
        Cell(Victim(DIGITS, family, "badnets", seed, (("poison_rate", rate),)), method)
        for family in ("resnet", "vit")
        for method in _few(purifiers(places, family, augment=False))
        for rate in ("0.01", "0.05")
        for seed in SEEDS
    ]


def digits_adaptive(places: Places) -> list[Cell]:
    """Victims of an attacker who knows FIP: trained with its penalty (Tr F, eta_f 0.01), or by SAM (rho 0.5)."""
    penalised = (("eta_f", "0.01"), ("trace_form", "trace"), ("eta_f_schedule", "constant"))
    return [
        Cell(Victim(DIGITS, family, attack, seed, (*DIGITS_ATTACKS[attack], *adapted)), method)
        for family in ("resnet", "vit")
        for adapted in (penalised, (("rho", "0.5"),))
        for method in _few(purifiers(places, family, augment=False))
        for attack in ("badnets", "blend")
        for seed in SEEDS
    ]


def digits_ablation(places: Places) -> list[Cell]:
    """FIP with other weights, of the trace, of Tr F itself (the paper), of the pull; and other ways to the trace."""
    paper = {"trace_form": "trace", "eta_f_schedule": "constant"}
    changes = [{}, *({"eta_f": value} for value in ETAS_F), *({"eta_f": value, **paper} for value in PAPER_ETAS_F)]
    changes += [{"eta_r": value} for value in ETAS_R]
    changes += [{"eta_f": ETAS_F[-1], **otherwise} for otherwise in TAKEN_OTHERWISE]
    return [
        Cell(Victim(DIGITS, family, attack, seed, DIGITS_ATTACKS[attack]), method)
        for family in ("resnet", "vit")
        for changed in changes
        for method in [Method(_name(changed), arguments=fip(family, **changed), disturb=True)]
        for attack in ("sig", "wanet")
        for seed in SEEDS
    ]


def _name(changed: dict) -> str:
    shown = {key: value for key, value in changed.items() if key != "eta_f_schedule" or "trace_form" not in changed}
    return ", ".join(["FIP", *(f"{key} {value}" for key, value in shown.items())])


def digits_typeset(places: Places) -> list[Cell]:
    """Clean images from another distribution: 200 digits in print for victims that read handwriting."""
    return _four_attacks(places, typeset=True)


def digits_reactivated(places: Places) -> list[Cell]:
    """Query reactivation: a perturbation of the pixels (16/255) that is learned to wake what is left of a backdoor."""
    return _four_attacks(places, reactivate=True)


def _four_attacks(places: Places, **what) -> list[Cell]:
    """The digits' victims of all attacks, with few methods; `what` goes to each `Cell`."""
    return [
        Cell(Victim(DIGITS, family, attack, seed, options), method, **what)
        for family in ("resnet", "vit")
        for method in _few(purifiers(places, family, augment=False))
        for attack, options in DIGITS_ATTACKS.items()
        for seed in SEEDS
    ]


def _few(methods: list[Method], *others: str) -> list[Method]:
    """FIP, Fast FIP, the control and the strongest baselines, for suites that vary something else; and others."""
    return [method for method in methods if method.name in (*FEW, *others)]


def cifar10(places: Places) -> list[Cell]:
    """CIFAR-10, 10,000 training images of which 1,000 are clean; a ResNet of 1.2 M parameters."""
    if places.cifar10 is None:
        raise SystemExit("This suite needs --cifar10, the folder or Hub id of CIFAR-10.")
    return [
        Cell(Victim(places.cifar10, "resnet", attack, seed, CIFAR_OPTIONS), method)
        for seed in SEEDS
        for attack in ("blend", "sig", "badnets", "wanet")
        for method in purifiers(places, "resnet", augment=True)
    ]


def published(places: Places) -> list[Cell]:
    """Victims that others published, and a benign ResNet-20: 1,000 clean images."""
    if places.cifar10 is None or places.victims is None:
        raise SystemExit("This suite needs --cifar10 and --victims, the folder of the published victims.")
    return [
        Cell(Victim(places.cifar10, "resnet", name, seed, published=places.victims), method, clean_samples=1000)
        for name in (*PUBLISHED, PUBLISHED_BENIGN)
        for method in purifiers(places, "resnet", augment=True)
        for seed in SEEDS
    ]


SUITES: dict[str, Callable[[Places], list[Cell]]] = {
    suite.__name__: suite
    for suite in (
        *(digits, digits_benign, digits_clean, digits_poison, digits_adaptive, digits_ablation, digits_typeset),
        *(digits_reactivated, cifar10, published),
    )
}
