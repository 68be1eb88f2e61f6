from rodimus_lab.ops.conv_gate.dispatch import LowRankGate, conv_gate

__all__ = ["LowRankGate", "conv_gate"]
