"""DALI's operators as this project uses them: decode as PIL does, and everything else by parameters from the host."""

from __future__ import annotations

from typing import Any


def decode(encoded: Any, decoder: str) -> Any:
    """Graph node: whole images, RGB. decoder: gpu (nvJPEG, images on the GPU) or cpu (images on the CPU)."""
    from nvidia.dali import fn

    # Fancy upsampling makes nvJPEG's chroma agree with libjpeg's.
    device = "mixed" if decoder == "gpu" else "cpu"
    return fn.decoders.image(encoded, device=device, adjust_orientation=False, jpeg_fancy_upsampling=True)


def decode_to_gpu(encoded: Any, decoder: str) -> Any:
    """Graph node: whole images, RGB, on the GPU, decoded by `decoder` (gpu or cpu)."""
    images = decode(encoded, decoder)
    return images if decoder == "gpu" else images.gpu()


def decode_crop(encoded: Any, start: Any, shape: Any) -> Any:
    """Graph node: one rectangle of each image, on the CPU, decoding little else."""
    from nvidia.dali import fn

    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], adjust_orientation=False)


def crop(images: Any, start: Any, shape: Any) -> Any:
    """Graph node: the rectangle at `start` (top, left) of `shape` (height, width), pixels."""
    from nvidia.dali import fn

    return fn.slice(images, start=start, shape=shape, axes=[0, 1])


def resize(images: Any, size: Any) -> Any:
    """Graph node: to `size` (height, width), integers; cubic with antialiasing, as PIL's bicubic."""
    from nvidia.dali import fn, types

    if not isinstance(size, list):
        size = fn.cast(size, dtype=types.DALIDataType.FLOAT)  # DALI takes sizes as floats
    return fn.resize(images, size=size, interp_type=types.DALIInterpType.INTERP_CUBIC, antialias=True)


def flip(images: Any, mirrored: Any) -> Any:
    """Graph node: mirrored left to right where `mirrored` is 1."""
    from nvidia.dali import fn

    return fn.flip(images, horizontal=mirrored)
