"""lora: many adapters at once, merged into the weights or applied token by token (LoRA-Switch, arXiv:2405.17741)."""

from .adapters import Adapter
from .modules import AdapterBank, Router
from .ops import lora_apply as apply
from .ops import lora_merge_ as merge_
from .ops import lora_switch_ as switch_
from .ops import lora_unmerge_ as unmerge_
from .selector import Selector

__all__ = ["Adapter", "AdapterBank", "Router", "Selector", "apply", "merge_", "switch_", "unmerge_"]
