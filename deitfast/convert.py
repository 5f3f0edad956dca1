"""The old path of `deitfast.model.convert`."""

from deitfast.model.convert import to_huggingface, to_mmpretrain, to_ours

__all__ = ["to_huggingface", "to_mmpretrain", "to_ours"]
