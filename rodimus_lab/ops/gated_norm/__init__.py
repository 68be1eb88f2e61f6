from rodimus_lab.ops.gated_norm.dispatch import gated_norm

__all__ = ["gated_norm"]
