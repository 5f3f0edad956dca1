"""The old path of `deitfast.use.export`."""

from deitfast.use.export import export

__all__ = ["export"]
