"""Workers: any number of processes, on any number of machines, that evaluate one search in a database."""

from hf_elastic.workers.problem import Problem, problem_of
from hf_elastic.workers.worker import WorkerOptions, work

__all__ = ["Problem", "WorkerOptions", "problem_of", "work"]
