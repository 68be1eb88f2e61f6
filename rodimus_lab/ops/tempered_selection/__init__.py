from rodimus_lab.ops.tempered_selection.dispatch import tempered_selection

__all__ = ["tempered_selection"]
