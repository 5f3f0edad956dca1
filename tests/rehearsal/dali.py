"""DALI's GPU graphs on the CPU's operators: their outputs arrive on the pretended device."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.rehearsal.memory import wrap  # before torch

import torch  # isort: skip


class OneTensor:
    """Plays DALI's TensorGPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def shape(self) -> list[int]:
        return list(self.tensor.shape)


class Output:
    """Plays DALI's TensorListGPU over an output that the CPU made."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def as_tensor(self) -> OneTensor:
        return OneTensor(torch.from_numpy(np.stack([np.asarray(self.output[i]) for i in range(len(self.output))])))


class Played:
    """A pipeline for the CPU in place of one for a GPU."""

    def __init__(self, real: Any, runner: Any) -> None:
        self.real, self.runner = real, runner

    def run(self, stream: Any = None) -> list[Output]:
        assert stream == torch.cuda.current_stream(self.runner.device), "DALI is given another than the current stream"
        return [Output(output) for output in self.real.run()]


def install() -> None:
    """Put all of this in place of DALI's GPU side, for the rest of the process."""
    import nvidia.dali.pipeline as theirs
    import nvidia.dali.plugin.pytorch as plugin

    from deitfast.data import dali as ours
    from deitfast.data import decoder, eval_loader, train_loader

    class Pipeline(theirs.Pipeline):
        def __init__(self, *args: Any, device_id: int | None, **kwargs: Any) -> None:
            assert device_id is None or device_id == torch.cuda.current_device()
            super().__init__(*args, device_id=None, **kwargs)

    build = ours.Runner._build

    def built(self: Any, *args: Any) -> Any:
        made = build(self, *args)
        return made if self._stream is None else Played(made, self)

    def feed(tensor: OneTensor, to: torch.Tensor, cuda_stream: Any = None) -> torch.Tensor:
        assert cuda_stream == torch.cuda.current_stream(to.device), "without a stream feed_ndarray waits for the device"
        return to.copy_(wrap(tensor.tensor, to.device.index))

    theirs.Pipeline = Pipeline
    plugin.feed_ndarray = feed
    ours.Runner._build = built  # type: ignore[method-assign]
    for module in (ours, decoder, train_loader, eval_loader):
        if hasattr(module, "decode_to_gpu"):
            module.decode_to_gpu = lambda encoded, where: ours.decode(encoded, "cpu")
