"""moe: routing and the GEMMs of many experts, grouped or dense, on one device or many (EPS-MoE, arXiv:2410.12247)."""

from . import overlap
from .experts import replace_experts_
from .modules import MoEMLP
from .ops import moe_combine as combine
from .ops import moe_grouped_gemm as grouped_gemm
from .ops import moe_grouped_wgrad as grouped_wgrad
from .ops import moe_mlp as mlp
from .ops import moe_mlp_ as mlp_
from .ops import moe_mlp_ep as mlp_ep
from .ops import moe_mlp_ep_backward as mlp_ep_backward
from .ops import moe_route as route
from .ops import moe_sort as sort
from .selector import calibrate
from .selector import load as _load

_load()

__all__ = [
    "MoEMLP",
    "calibrate",
    "combine",
    "grouped_gemm",
    "grouped_wgrad",
    "mlp",
    "mlp_",
    "mlp_ep",
    "mlp_ep_backward",
    "overlap",
    "replace_experts_",
    "route",
    "sort",
]
