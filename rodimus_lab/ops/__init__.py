from rodimus_lab.ops.attention import attention
from rodimus_lab.ops.backend import use_backend
from rodimus_lab.ops.cross_entropy import cross_entropy
from rodimus_lab.ops.gated_linear import gated_linear
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.short_conv import short_conv

__all__ = ["Segments", "attention", "cross_entropy", "gated_linear", "short_conv", "use_backend"]
