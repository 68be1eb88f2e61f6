from rodimus_lab.ops.wkv.dispatch import wkv

__all__ = ["wkv"]
