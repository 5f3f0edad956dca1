"""Branches for CUDA that no test takes on the pretended device, each with its reason."""

INTERPRETER = "of Triton's interpreter, in which tests/kernels run"

NOT_TAKEN: dict[str, str] = {
    "kernels/common.py::check_dtypes: INTERPRETED and tensor.dtype == torch.bfloat16 and (not tensor.is_cuda) is never "
    "true": INTERPRETER,
    "deitfast/data/dali.py::gathered: device.type == 'cuda' is never false": "by tests/data/test_loaders.py, which "
    "compares the GPU's operators with the CPU's",
    "kernels/common.py::architecture: not x.is_cuda is never true": INTERPRETER,
}
