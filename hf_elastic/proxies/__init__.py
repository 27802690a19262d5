"""Zero-cost proxies: scores of architectures without training, and how well they rank."""

from hf_elastic.proxies.ranking import Correlation, correlation, fitted_alpha, label_free_alpha
from hf_elastic.proxies.readers import (
    BenchmarkRows,
    Setting,
    read_benchmark,
    read_csv,
    read_flexibert,
    read_lts,
)
from hf_elastic.proxies.roles import Roles, roles_of
from hf_elastic.proxies.scoring import BASELINES, DATA_FREE, ON_DATA, PROXIES, score
from hf_elastic.proxies.shapes import SHAPE_BASELINES, ShapeBatch
from hf_elastic.proxies.stored import checkpoint_table
from hf_elastic.proxies.subject import Subject
from hf_elastic.proxies.weight import zerolm_parts
from hf_elastic.proxies.zerolm_table import ZeroLMTable, matrix_score

__all__ = [
    "BASELINES",
    "BenchmarkRows",
    "Correlation",
    "DATA_FREE",
    "ON_DATA",
    "PROXIES",
    "Roles",
    "SHAPE_BASELINES",
    "Setting",
    "ShapeBatch",
    "Subject",
    "ZeroLMTable",
    "checkpoint_table",
    "correlation",
    "fitted_alpha",
    "label_free_alpha",
    "matrix_score",
    "read_benchmark",
    "read_csv",
    "read_flexibert",
    "read_lts",
    "roles_of",
    "score",
    "zerolm_parts",
]
