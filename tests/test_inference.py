"""The predictor: the model's own logits on a CPU, and on a GPU the same through graphs of every batch size."""

from __future__ import annotations

import pytest
import torch

from deitfast.data import normalise
from deitfast.errors import DeitfastError
from deitfast.use.graphs import LARGEST_GRAPH, graph_size
from deitfast.use.inference import Predictor, pick_device
from tests.test_weights import small


def pixels(batch: int, size: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (batch, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("distilled", [False, True])
def test_cpu_gives_the_models_logits(distilled: bool) -> None:
    model = small(distilled=distilled)
    predictor = Predictor(model, "cpu")
    assert predictor.how == "fp32, eager PyTorch: fused blocks and CUDA graphs need a GPU"
    assert predictor.model is model
    with torch.no_grad():
        torch.testing.assert_close(predictor(pixels(3)), model(normalise(pixels(3))), rtol=0, atol=0)
    assert predictor(pixels(0)).shape == (0, 5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_leave_the_model_alone(precision: str) -> None:
    model = small().train()
    predictor = Predictor(model, "cpu", precision)
    logits = predictor(pixels(4))
    assert logits.dtype == torch.float32
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        exact = model.eval()(normalise(pixels(4)))
    tolerance = {"bf16": 2.0**-5, "fp16": 2.0**-8}[precision]
    assert (logits - exact).norm() < tolerance * exact.norm()


def test_wrong_input_is_named() -> None:
    predictor = Predictor(small(), "cpu")
    with pytest.raises(DeitfastError, match=r"images are \(1, 16, 16, 3\) of torch.uint8, the model takes uint8"):
        predictor(pixels(1, 16))
    with pytest.raises(DeitfastError, match=r"of torch\.float32"):
        predictor(pixels(1).float())
    with pytest.raises(DeitfastError, match="precision 'int8' unknown"):
        Predictor(small(), "cpu", "int8")
    with pytest.raises(DeitfastError, match="device 'gpu' unknown"):
        pick_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(DeitfastError, match="no CUDA device here"):
        pick_device("cuda")


def test_graph_sizes_are_powers_of_two() -> None:
    assert [graph_size(n) for n in (1, 2, 3, 8, 9, 255, 256)] == [1, 2, 4, 8, 16, 256, 256]
    assert graph_size(LARGEST_GRAPH) == LARGEST_GRAPH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_graphs_give_what_eager_gives(precision: str) -> None:
    model = small(distilled=True, image_size=32, patch_size=8)
    exact = Predictor(model, "cpu", "fp32")
    eager = Predictor(model, "cuda", precision, graphs=False)
    graphed = Predictor(model, "cuda", precision)
    tolerance = {"bf16": 2.0**-5, "fp16": 2.0**-8, "fp32": 2.0**-8}[precision]  # fp32 products may use TF32
    for batch in (1, 3, 8, 300, 2, 1):
        images = pixels(batch, 32)
        expected, first, second = exact(images), eager(images).cpu(), graphed(images).cpu()
        assert (second - expected).norm() <= tolerance * expected.norm()
        torch.testing.assert_close(second, first, rtol=1e-2, atol=1e-2)
    assert set(graphed._graphed.captured) == {1, 2, 4, 8, 64, 256}
