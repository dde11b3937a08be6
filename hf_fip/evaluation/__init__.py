"""How good a model is and how much of the backdoor is left."""

from .metrics import accuracy, attack_success_rate, defense_effectiveness_rating, robust_accuracy

__all__ = ["accuracy", "attack_success_rate", "defense_effectiveness_rating", "robust_accuracy"]
