from rodimus_lab.ops.attention import attention, attention_step
from rodimus_lab.ops.backend import use_backend
from rodimus_lab.ops.conv_gate import conv_gate
from rodimus_lab.ops.cross_entropy import cross_entropy
from rodimus_lab.ops.delta_rule import delta_rule
from rodimus_lab.ops.diagonal_scan import diagonal_scan, selective_scan
from rodimus_lab.ops.gated_linear import gated_linear
from rodimus_lab.ops.gated_norm import gated_norm
from rodimus_lab.ops.linear_step import linear_step
from rodimus_lab.ops.rodimus_step import rodimus_step
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.short_conv import short_conv
from rodimus_lab.ops.ssd import ssd
from rodimus_lab.ops.tempered_selection import tempered_selection
from rodimus_lab.ops.wkv import wkv

__all__ = [
    "Segments",
    "attention",
    "attention_step",
    "conv_gate",
    "cross_entropy",
    "delta_rule",
    "diagonal_scan",
    "gated_linear",
    "gated_norm",
    "linear_step",
    "rodimus_step",
    "selective_scan",
    "short_conv",
    "ssd",
    "tempered_selection",
    "use_backend",
    "wkv",
]
