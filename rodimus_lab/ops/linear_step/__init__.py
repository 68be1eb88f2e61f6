from rodimus_lab.ops.linear_step.dispatch import MAX_ROWS, linear_step
from rodimus_lab.ops.linear_step.rms import RMS

__all__ = ["MAX_ROWS", "RMS", "linear_step"]
