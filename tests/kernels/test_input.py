"""The input kernel against a definition in float64 and against itself: unmixed rows, other rows, other blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from deitfast.data import philox
from deitfast.kernels import input as input_op
from deitfast.kernels.common import INTERPRETED
from deitfast.kernels.input import NOISE, input_patches, input_patches_reference, noise_words
from tests.kernels.tolerance import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
eager_only = pytest.mark.skipif(INTERPRETED, reason="says nothing about the kernel, and the interpreter is slow")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPOCH, SEED = 3, 2**40 + 17


@dataclass(frozen=True)
class Sample:
    """Tensors of a batch, and its patch size."""

    images: Tensor
    erase: Tensor
    mix_box: Tensor
    lam: Tensor
    index: Tensor
    view: Tensor
    epoch: Tensor
    patch_size: int
    mixes: bool

    def run(self, function: Any = input_patches, dtype: torch.dtype = torch.float32, seed: int = SEED) -> Tensor:
        options = {"seed": seed, "mean": MEAN, "std": STD, "dtype": dtype}
        return function(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **options)

    def rows(self, rows: list[int]) -> Sample:
        names = ("images", "erase", "mix_box", "lam", "index", "view")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows].contiguous() for name in names})


def make(
    device: torch.device,
    size: tuple[int, int],
    patch: int,
    erase: list[tuple[int, ...]],
    mix: list[tuple[int, ...] | float] | None = None,
) -> Sample:
    """A row for each rectangle of `erase`; `mix` gives each row a rectangle or a lambda, None mixes nothing."""
    m = len(erase)
    generator = torch.Generator().manual_seed(0)
    none, how = (0, 0, 0, 0), [1.0] * m if mix is None else mix
    tensors = {
        "images": torch.randint(0, 256, (m, *size, 3), dtype=torch.uint8, generator=generator),
        "erase": torch.tensor(erase, dtype=torch.int64).view(m, 4),
        "mix_box": torch.tensor([none if isinstance(x, float) else x for x in how], dtype=torch.int64).view(m, 4),
        "lam": torch.tensor([x if isinstance(x, float) else 0.123 for x in how], dtype=torch.float32),
        "index": torch.arange(m) + 2**33 + 5,
        "view": torch.arange(m) % 3,
        "epoch": torch.tensor([EPOCH]),
    }
    return Sample(**{k: v.to(device) for k, v in tensors.items()}, patch_size=patch, mixes=mix is not None)


def definition(sample: Sample, seed: int = SEED) -> Tensor:
    """Written out in float64: noise from the host's Philox, rectangles by slices, patches by torch's im2col."""
    images = sample.images.cpu().double().permute(0, 3, 1, 2) / 255
    x = (images - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    size = x.shape[2:]
    for i, (top, left, height, width) in enumerate(sample.erase.tolist()):
        u = philox.uniforms(philox.NOISE, int(sample.index[i]), EPOCH, int(sample.view[i]), seed, x[i, 0].numel())
        red, green = philox.normal_pair(u[:, 0, 0], u[:, 1, 0])
        blue, _ = philox.normal_pair(u[:, 2, 0], u[:, 3, 0])
        part = (slice(None), slice(top, top + height), slice(left, left + width))
        x[i][part] = torch.from_numpy(np.stack([red, green, blue])).view(3, *size)[part]
    mixed = x.clone()
    for i, (top, left, height, width) in enumerate(sample.mix_box.tolist() if sample.mixes else []):
        lam, part = float(sample.lam[i]), (slice(None), slice(top, top + height), slice(left, left + width))
        mixed[i] = x[i] if height * width else lam * x[i] + (1 - lam) * x[i ^ 1]
        mixed[i][part] = x[i ^ 1][part]
    return F.unfold(mixed, sample.patch_size, stride=sample.patch_size).transpose(1, 2)


NONE = (0, 0, 0, 0)
CASES: dict[str, Any] = {
    "mixup at 224": ((224, 224), 16, [(30, 17, 100, 90), NONE], [0.3, 0.3]),
    "cutmix at 224": ((224, 224), 16, [NONE, (100, 100, 60, 123)], [(90, 110, 70, 114), (90, 110, 70, 114)]),
    "patch 4": ((24, 24), 4, [(2, 3, 10, 20), NONE, NONE, (0, 0, 23, 23)], [0.7, 0.7, (3, 10, 9, 14), (3, 10, 9, 14)]),
    "patch 14, not square": ((28, 42), 14, [(1, 2, 20, 30), (27, 41, 1, 1)], [0.25, 0.25]),
    "odd batch": ((32, 32), 16, [NONE, (5, 6, 7, 8), NONE], None),
    "one image": ((48, 32), 16, [(0, 0, 47, 31)], None),
    "nothing erased": ((32, 32), 8, [NONE] * 4, [0.6, 0.6, 1.0, 0.0]),
    "cutmix at borders": (
        (32, 32),
        8,
        [(30, 30, 2, 2), (0, 0, 3, 3)] * 3,
        [(0, 0, 9, 5), (0, 0, 9, 5), (20, 31, 12, 1), (20, 31, 12, 1), (0, 0, 32, 32), (0, 0, 32, 32)],
    ),
    "rows of a pair differ": ((32, 32), 16, [(4, 4, 20, 9), (9, 9, 20, 20)], [(3, 3, 8, 8), 0.4]),
}


@pytest.fixture(params=CASES)
def sample(request: pytest.FixtureRequest, device: torch.device) -> Sample:
    return make(device, *CASES[request.param])


def test_matches_float64(sample, dtype):
    actual, eager = (sample.run(function, dtype) for function in (input_patches, input_patches_reference))
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert_close_to_float64("patches", actual, definition(sample), eager, 2)


@pytest.mark.parametrize("case", ["patch 4", "patch 14, not square", "one image"])
def test_tiles_of_the_gpu(case, device, monkeypatch):
    """The interpreter usually takes an image in one tile; here in those of a GPU, the last of which is not full."""
    sample = make(device, *CASES[case])
    whole = sample.run()
    monkeypatch.setattr(input_op, "INTERPRETED", False)
    assert torch.equal(sample.run(), whole)


def test_philox_words_are_the_hosts(device):
    """tl.philox takes seed and counter in the order of the data package, to the bit."""
    if not (INTERPRETED or device.type == "cuda"):
        pytest.skip("no Triton kernel runs here")
    assert NOISE == philox.NOISE
    for seed in (0, 1, SEED, 2**63 - 1):
        for index, epoch, view in ((0, 0, 0), (5, 2, 1), (2**33 + 7, 300, 2)):
            scalars = torch.tensor([index, epoch, view], device=device)
            words = torch.empty(4, 64, dtype=torch.int64, device=device)
            words_kernel[(1,)](words, scalars, seed, 17, COUNT=64)
            pixel = np.arange(17, 17 + 64, dtype=np.int64)
            counters = (np.array([value], dtype=np.int64) for value in (index, epoch, view))
            expected = philox.philox4x32(*counters, philox.counter(philox.NOISE, pixel), seed)
            assert np.array_equal(words.cpu().numpy(), np.stack(np.broadcast_arrays(*expected)))


@triton.jit
def words_kernel(words, scalars, seed, first, COUNT: tl.constexpr):
    pixel = first + tl.arange(0, COUNT)
    index, epoch, view = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    w0, w1, w2, w3 = noise_words(seed, index, epoch, view, pixel)
    column = tl.arange(0, COUNT)
    tl.store(words + column, w0.to(tl.int64))
    tl.store(words + COUNT + column, w1.to(tl.int64))
    tl.store(words + 2 * COUNT + column, w2.to(tl.int64))
    tl.store(words + 3 * COUNT + column, w3.to(tl.int64))


def test_the_partner_is_erased_before_it_is_mixed_in(device):
    """Cutmix takes the partner's noise, to the bit, and nothing else of the partner."""
    sample = make(device, (32, 32), 8, [NONE, (4, 4, 20, 20)], [(8, 0, 16, 32)] * 2)
    plain = dataclasses.replace(sample, mixes=False).run()
    mixed = sample.run()
    taken = torch.zeros(4, 4, dtype=torch.bool)
    taken[1:3] = True  # rows 8 to 23 are two rows of patches
    taken = taken.flatten()
    assert torch.equal(mixed[:, ~taken], plain[:, ~taken])
    assert torch.equal(mixed[:, taken], plain.flip(0)[:, taken])


def test_noise_belongs_to_the_sample_not_to_its_row(device):
    sample = make(device, (32, 32), 16, [(2, 3, 20, 12)] * 4)
    whole = sample.run()
    rows = [3, 1]
    assert torch.equal(sample.rows(rows).run(), whole[rows])
    later = dataclasses.replace(sample, epoch=sample.epoch + 1)
    for other in (later.run(), sample.run(seed=SEED + 2**32)):
        changed = (other != whole).flatten(1).sum(1)
        assert (changed == 3 * 20 * 12).all(), "every erased value changes and no other"


def test_runs_the_kernel_exactly_where_it_should(device, monkeypatch):
    launches = []
    kernel = input_op.input_patches_kernel

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(input_op, "input_patches_kernel", Spy())
    make(device, (32, 32), 16, [NONE] * 2, [0.5, 0.5]).run()
    assert len(launches) == int(INTERPRETED or device.type == "cuda")


def test_an_empty_batch(device):
    assert make(device, (32, 32), 16, [], []).run().shape == (0, 4, 768)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 32, 32)}, ValueError, r"images have shape \(2, 3, 32, 32\), expected \(m, H, W"),
        ({"images": torch.zeros(2, 32, 32, 3)}, TypeError, "images is torch.float32, expected torch.uint8"),
        ({"patch_size": 12}, ValueError, "images of 32 x 32 pixels do not divide into patches of 12; resize"),
        ({"erase": torch.zeros(3, 4).long()}, ValueError, r"erase has shape \(3, 4\), expected \(2, 4\)"),
        ({"lam": torch.ones(2).double()}, TypeError, "lam is torch.float64, expected torch.float32"),
        ({"epoch": torch.tensor(3)}, ValueError, r"epoch has shape \(\), expected \(1,\)"),
        ({"view": torch.zeros(4).long()[::2]}, ValueError, r"view has strides \(2,\); call .contiguous\(\)"),
        ({"seed": -1}, ValueError, r"seed -1 is not in \[0, 2\*\*63\)"),
        ({"dtype": torch.float64}, TypeError, "dtype torch.float64; supported are"),
        ({"std": (1.0,)}, ValueError, r"mean .* and std \(1.0,\) need a value for each of the three channels"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    sample = make(torch.device("cpu"), (32, 32), 16, [NONE] * 2, [0.5, 0.5])
    arguments = {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)}
    arguments |= {"seed": SEED, "mean": MEAN, "std": STD, "dtype": torch.float32}
    with pytest.raises(error, match=f"input_patches: {message}"):
        input_patches(**arguments | change)


def test_an_odd_batch_is_not_mixed(device):
    with pytest.raises(ValueError, match="3 images do not make pairs to mix; take an even number"):
        make(device, (32, 32), 16, [NONE] * 3, [0.5] * 3).run()


@eager_only
def test_opcheck(device):
    sample = make(device, (16, 16), 8, [(1, 2, 5, 6), NONE], [0.3, (2, 2, 7, 7)])
    tensors = [getattr(sample, f.name) for f in dataclasses.fields(sample)][:7]
    torch.library.opcheck(
        torch.ops.deitfast.input_patches.default, (*tensors, 5, 8, list(MEAN), list(STD), torch.float16, True)
    )


@eager_only
def test_compiles_as_one_graph_and_reads_the_epoch(device):
    torch._dynamo.reset()
    sample = make(device, (16, 16), 8, [(1, 2, 5, 6), NONE], [0.3, 0.3])
    compiled = torch.compile(lambda s: s.run() + 1, fullgraph=True, backend="aot_eager")
    for epoch in (EPOCH, EPOCH + 1):
        one = dataclasses.replace(sample, epoch=torch.tensor([epoch], device=device))
        assert torch.equal(compiled(one), one.run() + 1)
