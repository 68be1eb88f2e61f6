from rodimus_lab.ops.attention import attention, attention_step
from rodimus_lab.ops.backend import use_backend
from rodimus_lab.ops.cross_entropy import cross_entropy
from rodimus_lab.ops.gated_linear import gated_linear
from rodimus_lab.ops.linear_step import linear_step
from rodimus_lab.ops.rodimus_step import rodimus_step
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.short_conv import short_conv

__all__ = [
    "Segments",
    "attention",
    "attention_step",
    "cross_entropy",
    "gated_linear",
    "linear_step",
    "rodimus_step",
    "short_conv",
    "use_backend",
]
