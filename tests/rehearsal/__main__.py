"""python -m tests.rehearsal [pytest's arguments]: run what lies beside this on a pretended CUDA device.

Without arguments everything is run, and then every branch for CUDA of deitfast and kernels must have been taken.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.rehearsal import branches

PACKAGES = ("deitfast", "kernels")


def main(arguments: list[str]) -> int:
    branches.instrument(PACKAGES)
    from tests.rehearsal import cuda, dali, kernels, products

    cuda.install()
    kernels.install()
    dali.install()
    products.install()
    here = os.path.dirname(__file__)
    status = int(pytest.main([*(arguments or [here]), "-p", "no:cacheprovider", "-p", "no:xdist"]))
    if status or arguments:
        return status
    from tests.rehearsal.exceptions import NOT_TAKEN

    missing = branches.not_taken()
    problems = [line for line in missing if line not in NOT_TAKEN]
    stale = [f"listed, but taken or gone: {line}" for line in NOT_TAKEN if line not in missing]
    print("\n".join(problems + stale))
    return 1 if problems or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
