from rodimus_lab.ops.attention.cache import KVCache
from rodimus_lab.ops.attention.softmax import attention
from rodimus_lab.ops.attention.step import attention_step, sink_attention_step

__all__ = ["KVCache", "attention", "attention_step", "sink_attention_step"]
