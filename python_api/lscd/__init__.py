"""lscd: load-as-sparse, compute-as-dense matmul for pruned weights (Flash-LLM, VLDB 2023)."""

from .ops import lscd_linear as linear
from .ops import lscd_pack as pack
from .ops import lscd_unpack as unpack

__all__ = ["linear", "pack", "unpack"]
