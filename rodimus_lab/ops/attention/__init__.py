from rodimus_lab.ops.attention.cache import KVCache
from rodimus_lab.ops.attention.softmax import attention

__all__ = ["KVCache", "attention"]
