"""Branches for CUDA that no test takes on the pretended device, each with its reason."""

NOT_TAKEN: dict[str, str] = {
    "kernels/common.py::check_dtypes: INTERPRETED and tensor.dtype == torch.bfloat16 and (not tensor.is_cuda) is never "
    "true": "of Triton's interpreter, which tests/kernels run in",
    "kernels/common.py::architecture: not x.is_cuda is never true": "of Triton's interpreter, which tests/kernels run in",
}
