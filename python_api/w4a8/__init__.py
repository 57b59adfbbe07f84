"""w4a8: two-step int8 matmul with 4-bit and 8-bit output features side by side (MixLLM, arXiv:2412.14590)."""

from .calibrate import measure_salience
from .modules import Linear, Record, prepare_, quantize_
from .ops import w4a8_accumulate as accumulate
from .ops import w4a8_linear as linear
from .ops import w4a8_pack as pack
from .ops import w4a8_quantize as quantize
from .ops import w4a8_salience as salience
from .ops import w4a8_unpack as unpack
from .reference import Packed, pack_integers

__all__ = [
    "Linear",
    "Packed",
    "Record",
    "accumulate",
    "linear",
    "measure_salience",
    "pack",
    "pack_integers",
    "prepare_",
    "quantize",
    "quantize_",
    "salience",
    "unpack",
]
