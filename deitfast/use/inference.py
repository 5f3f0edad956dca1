"""Fast inference: uint8 images in, logits out, by the fused blocks in bf16 or fp16 and one CUDA graph a batch size.

On a GPU a batch is padded to the next power of two and the model, normalisation included, replayed as the graph of
that size, captured at its first use. On a CPU the model runs in eager PyTorch.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from deitfast.compiler import check_compiler
from deitfast.data import normalise
from deitfast.errors import DeitfastError
from deitfast.model.deit import DeiT
from deitfast.model.factory import as_loaded
from deitfast.model.fused import fuse, question_about
from deitfast.model.preprocessing import Preprocessing
from deitfast.use.graphs import LARGEST_GRAPH, Graphed, graph_size
from deitfast.verification.verify import FUSED_OPS, trust

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is CUDA where there is one. Raises DeitfastError for CUDA where it, or a C compiler for it, is missing."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise DeitfastError(f"device {str(device)!r} unknown. Use auto, cuda, cuda:1 or cpu") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise DeitfastError("no CUDA device here. Give --device cpu")
    if where.type == "cuda":
        check_compiler()
    return where


class Predictor:
    """Logits of a model in evaluation mode.

    device: `auto`, or what torch.device takes. precision: bf16, fp16 or fp32; auto is bf16 on a GPU, fp32 on a CPU. The
    model given is left as it is where another device or precision is wanted. graphs: CUDA graphs; without effect on a
    CPU. preprocessing: whose mean and std images are normalised by; None: what the model's weights stated. `how` says
    in words how it runs.
    """

    def __init__(
        self,
        model: DeiT,
        device: str | torch.device = "auto",
        precision: str = "auto",
        graphs: bool = True,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.device = pick_device(device)
        on_gpu = self.device.type == "cuda"
        if precision == "auto":
            precision = "bf16" if on_gpu else "fp32"
        if precision not in PRECISIONS:
            raise DeitfastError(f"precision {precision!r} unknown. Use {', '.join(PRECISIONS)} or auto")
        self.dtype = PRECISIONS[precision]
        parameter = next(model.parameters())
        if parameter.dtype != self.dtype or parameter.device.type != self.device.type or model.training:
            model = copy.deepcopy(model).to(self.device, self.dtype).eval()
        if on_gpu:
            model = fuse(model, on_cpu=False)
        self.model, self.image_size = model, model.image_size
        self.preprocessing = preprocessing or as_loaded(model).preprocessing
        self._graphed = Graphed(self._run, self.device, on=graphs)
        self._trusted = not on_gpu
        if on_gpu:
            self.how = f"{precision}, fused blocks, {'a CUDA graph a batch size' if graphs else 'no CUDA graphs'}"
        else:
            self.how = f"{precision}, eager PyTorch: fused blocks and CUDA graphs need a GPU"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (m, S, S, 3), RGB, on any device, to logits (m, classes) in fp32 on this device."""
        if images.dtype != torch.uint8 or images.shape[1:] != (self.image_size, self.image_size, 3):
            raise DeitfastError(
                f"images are {tuple(images.shape)} of {images.dtype}, "
                f"the model takes uint8 (m, {self.image_size}, {self.image_size}, 3)"
            )
        if not self._trusted:
            self._trust(min(len(images), LARGEST_GRAPH))
        return self._graphed(images)

    def _trust(self, count: int) -> None:
        """Have the ops verified on this GPU before the first image runs through them."""
        size, ops = graph_size(max(count, 1)), ("patch_embed", *FUSED_OPS)
        question = question_about(self.model, ops, size, self.dtype, backward=False, without=("path_scale",))
        trust(question, self.device)
        self._trusted = True

    def _run(self, images: Tensor) -> Tensor:
        wants = self.preprocessing
        return self.model(normalise(images, wants.mean, wants.std, dtype=self.dtype)).float()
