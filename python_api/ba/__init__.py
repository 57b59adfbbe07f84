"""ba: bundle adjustment and global positioning, matrix-free and with the points eliminated (InstantSfM, 2025)."""

from .models import INTRINSICS
from .ops import ba_backsubstitute as backsubstitute
from .ops import ba_build as build
from .ops import ba_cost as cost
from .ops import ba_jacobian as jacobian
from .ops import ba_pcg as pcg
from .ops import ba_residual as residual
from .ops import ba_retract as retract
from .ops import ba_schur as schur
from .ops import ba_schur_mv as schur_mv
from .problem import Problem
from .scenes import generate
from .solve import Summary, position_globally, solve

__all__ = [
    "INTRINSICS",
    "Problem",
    "Summary",
    "backsubstitute",
    "build",
    "cost",
    "generate",
    "jacobian",
    "pcg",
    "position_globally",
    "residual",
    "retract",
    "schur",
    "schur_mv",
    "solve",
]
