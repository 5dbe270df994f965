"""Package metadata. Lower bounds are the versions that the tests ran with; constraints.txt pins a whole environment."""

from pathlib import Path

from setuptools import find_packages, setup

# sentencepiece: what converted tokenizers are compared with.
TEST = ["pytest>=9.2", "pytest-xdist>=3.8", "hypothesis>=6.170", "ruff>=0.17.6", "import-linter>=2.17",
        "sentencepiece>=0.2.3"]
# How attacks can be searched for, beside drawing them at random.
SEARCH = ["optuna>=5.0"]
# Data compressed by Zstandard, before Python 3.14.
ZSTD = ["zstandard>=0.25"]
# lm-evaluation-harness, with which models can be asked its tasks.
LM_EVAL = ["lm_eval>=0.4.13"]
# What models and gradients are compared with. Nothing in the package imports either.
PARITY = ["torch>=2.13", "peft>=0.21.2"]

setup(
    name="jaxvaccine",
    version="0.1.0",
    description="Alignment-stage defenses against harmful fine-tuning of language models, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["jaxvaccine", "jaxvaccine.*"]),
    # The small world's base.
    package_data={"jaxvaccine": ["cards/*.textproto"], "jaxvaccine.world": ["*.json", "*.safetensors"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.5",
        "datasets>=5.2",
        "flax>=0.12.8",
        "fsspec>=2026.9",
        "gguf>=0.19",
        "huggingface_hub>=2.4",
        "jax>=0.10.2",
        "jinja2>=3.1",  # chat templates
        "matplotlib>=3.11",
        "ml_dtypes>=0.6",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pandas>=3.1",
        "pyarrow>=26.0",
        "safetensors>=0.8",
        "scipy>=1.17",
        "tokenizers>=0.23.3",
        "tqdm>=4.70",
        "transformers>=5.23",
    ],
    entry_points={"console_scripts": ["jaxvaccine = jaxvaccine.cli:main"]},
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10.2"],
        "cuda13": ["jax[cuda13]>=0.10.2"],
        "parity": PARITY,
        "search": SEARCH,
        "zstd": ZSTD,
        "lm_eval": LM_EVAL,
        "test": TEST + SEARCH + ZSTD,
        "dev": TEST + SEARCH + ZSTD + PARITY,
    },
)
