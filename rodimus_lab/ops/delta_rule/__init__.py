from rodimus_lab.ops.delta_rule.dispatch import delta_rule

__all__ = ["delta_rule"]
