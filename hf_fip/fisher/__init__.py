"""The Fisher information of a model: Tr F, its gradient, and its diagonal."""

from .diagonal import fisher_diagonal
from .likelihood import Categorical, Likelihood, MultiLabel, TokenSequence, infer_likelihood
from .matched_queries import MatchedQueries
from .scores import per_sample_scores
from .trace import TraceEstimator, fisher_trace

__all__ = [
    "Categorical",
    "Likelihood",
    "MatchedQueries",
    "MultiLabel",
    "TokenSequence",
    "TraceEstimator",
    "fisher_diagonal",
    "fisher_trace",
    "infer_likelihood",
    "per_sample_scores",
]
