"""lscd: load-as-sparse, compute-as-dense matmul for pruned weights (Flash-LLM, VLDB 2023)."""

from .modules import Record, SparseLinear, prepare_, sparsify_
from .ops import lscd_linear as linear
from .ops import lscd_pack as pack
from .ops import lscd_unpack as unpack

__all__ = ["Record", "SparseLinear", "linear", "pack", "prepare_", "sparsify_", "unpack"]
