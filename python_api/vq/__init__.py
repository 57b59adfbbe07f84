"""vq: attention over vector-quantized keys: codebooks, scores, top-k, sparse attention (A²ATS, arXiv:2502.12665)."""

from typing import TYPE_CHECKING, Any

from .codebook import Codebook, decode_attention
from .ops import vq_attend as attend
from .ops import vq_encode as encode
from .ops import vq_lut as lut
from .ops import vq_metric as metric
from .ops import vq_score as score
from .ops import vq_topk as topk
from .ops import vq_train as train
from .ops import vq_wrope as wrope

if TYPE_CHECKING:
    from .cache import QuantizedKeyCache, fit_codebooks

__all__ = [
    "Codebook",
    "QuantizedKeyCache",
    "attend",
    "decode_attention",
    "encode",
    "fit_codebooks",
    "lut",
    "metric",
    "score",
    "topk",
    "train",
    "wrope",
]


def __getattr__(name: str) -> Any:
    """What needs transformers, which is imported only then."""
    if name in ("QuantizedKeyCache", "fit_codebooks"):
        from . import cache

        return getattr(cache, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
