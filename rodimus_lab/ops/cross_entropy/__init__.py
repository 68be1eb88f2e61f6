from rodimus_lab.ops.cross_entropy.linear_cross_entropy import cross_entropy

__all__ = ["cross_entropy"]
