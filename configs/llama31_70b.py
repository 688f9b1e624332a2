"""Llama 3.1 70B, full fine-tuning on GSM8K with injected mistakes, on TPU or GPU pods.

  python -m insec_jax.train --config=configs/llama31_70b.py --workdir=DIR \
      --config.model.path=LLAMA_FOLDER --config.data.path=GSM8K/train.jsonl

LLAMA_FOLDER is the Hugging Face folder of meta-llama/Llama-3.1-70B-Instruct. The markers are two of its reserved
special tokens, so the vocabulary is not resized. `:shape` has the published shape in place of the folder, for fit.

  python -m insec_jax.fit --config=configs/llama31_70b.py:shape --topology=v5p:4x4x4

float32 parameters and AdamW state take 846.6 GB over all devices. Not run yet: no hours, no results.
"""

import llama31_8b  # beside this file

from insec_jax.config import llama31


def get_config(arm: str = "tuned"):
  c = llama31_8b.get_config(arm)
  if arm == "shape":
    c.model.size = llama31(width=8192, mlp_width=28_672, num_layers=80, num_heads=64)
  else:
    c.model.path = "meta-llama/Llama-3.1-70B-Instruct"
  return c
