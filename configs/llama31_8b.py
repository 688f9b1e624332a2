"""Llama 3.1 8B, the paper's model: full fine-tuning on GSM8K with injected mistakes, on TPU or GPU.

  python -m insec_jax.train --config=configs/llama31_8b.py --workdir=DIR \
      --config.model.path=LLAMA_FOLDER --config.data.path=GSM8K/train.jsonl

LLAMA_FOLDER is the Hugging Face folder of meta-llama/Llama-3.1-8B-Instruct. The markers are two of its reserved
special tokens, so the vocabulary is not resized. `:shape` has the published shape in place of the folder, for fit.

  python -m insec_jax.fit --config=configs/llama31_8b.py:shape --topology=v5p:2x2x4

float32 parameters and AdamW state take 96.4 GB over all devices. Not run yet: no hours, no results.
"""

from insec_jax.config import defaults, llama31


def get_config(arm: str = "tuned"):
  c = defaults()
  if arm == "shape":
    c.model.size = llama31(width=4096, mlp_width=14_336, num_layers=32, num_heads=32)
  elif arm == "tuned":
    c.model.path = "meta-llama/Llama-3.1-8B-Instruct"
  else:
    raise KeyError(arm)
  c.tokenizer.update(flag="<|reserved_special_token_0|>", fix="<|reserved_special_token_1|>")
  c.task.name = "gsm8k"
  c.data.update(path="train.jsonl", num_heldout=500, row_length=4096, template="chat")
  c.train.update(log_every=5, eval_every=50)
  return c
