from rodimus_lab.ops.short_conv.conv import short_conv

__all__ = ["short_conv"]
