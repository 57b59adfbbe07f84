"""vq: attention over vector-quantized keys: codebooks, scores, top-k, sparse attention (A²ATS, arXiv:2502.12665)."""

from .ops import vq_attend as attend
from .ops import vq_encode as encode
from .ops import vq_lut as lut
from .ops import vq_metric as metric
from .ops import vq_score as score
from .ops import vq_topk as topk
from .ops import vq_train as train
from .ops import vq_wrope as wrope

__all__ = ["attend", "encode", "lut", "metric", "score", "topk", "train", "wrope"]
