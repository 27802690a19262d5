"""Search a space of subnets: Optuna samplers, exhaustive or exact; hard limits, many processes on one storage.

Needs neither torch nor transformers: an objective is any function of an architecture.
"""

from hf_elastic.search.engine import search_subnets
from hf_elastic.search.limits import Limit
from hf_elastic.search.objective import AdditiveTable, Objective
from hf_elastic.search.results import Evaluation, Failure, SearchResult

__all__ = [
    "AdditiveTable",
    "Evaluation",
    "Failure",
    "Limit",
    "Objective",
    "SearchResult",
    "search_subnets",
]
