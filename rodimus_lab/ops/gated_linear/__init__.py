from rodimus_lab.ops.gated_linear.dispatch import gated_linear

__all__ = ["gated_linear"]
