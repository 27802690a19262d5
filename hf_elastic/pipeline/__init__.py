"""``compress``: the whole path from a checkpoint to a smaller one, in one call."""

from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.run import CompressResult, CompressRun, compress

__all__ = ["CompressOptions", "CompressResult", "CompressRun", "compress"]
