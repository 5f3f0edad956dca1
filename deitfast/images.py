"""The old path of `deitfast.use.images`."""

from deitfast.use.images import batches, centre_crop, find_images, open_image

__all__ = ["batches", "centre_crop", "find_images", "open_image"]
