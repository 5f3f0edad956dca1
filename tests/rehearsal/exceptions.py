"""Branches for CUDA that no test takes on the pretended device, each with its reason."""

INTERPRETER = "of Triton's interpreter, in which tests/kernels run"

NOT_TAKEN: dict[str, str] = {
    "kernels/common.py::check_dtypes: INTERPRETED and tensor.dtype == torch.bfloat16 and (not tensor.is_cuda) is never "
    "true": INTERPRETER,
    "kernels/common.py::architecture: not x.is_cuda is never true": INTERPRETER,
}
