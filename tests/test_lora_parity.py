"""The export of a LoRA run of a real model, in transformers: the logits are those of the unmerged arithmetic here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2
from datakit import config as small_config
from modelkit import run

from insec_jax.config import LoraConfig
from insec_jax.data import vocabulary
from insec_jax.generation.placement import one_device
from insec_jax.model import adapters, build, hf, hf_config, llama
from insec_jax.training import frozen as frozen_lib
from insec_jax.training import layout, optimizer, step
from insec_jax.training.checkpoint import Saver

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def save_run(workdir):
  """Write a workdir with random adapters and marker rows; return (model's config, frozen, trained tree, Lora)."""
  config = small_config(model__path=str(smollm2.folder()), model__size=None)
  config = dataclasses.replace(config, lora=LoraConfig(rank=8, alpha=16.0))
  marked = vocabulary.open_tokenizer(config)
  before = hf.read_config(smollm2.folder())
  model = dataclasses.replace(before, vocab_size=build.vocabulary_for(len(marked.tokenizer), before.vocab_size))
  lora = frozen_lib.lora_of(config, marked.tokenizer)
  rng = np.random.default_rng(0)
  trained = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.05, jnp.float32), adapters.unboxed_shapes(model, lora)
  )
  workdir.mkdir()
  (workdir / layout.CONFIG).write_text(config.to_json())
  (workdir / layout.MODEL).write_text(json.dumps(hf_config.config_to_json(model)))
  environment = {"commit": "abc123", "packages": {"jax": jax.__version__}}
  (workdir / "environment.json").write_text(json.dumps(environment))
  marked.tokenizer.save_pretrained(workdir / layout.TOKENIZER)
  frozen = frozen_lib.load(config, model, one_device(), workdir)
  state = step.new_state(trained, optimizer.make(config.optimizer, 1))
  with Saver(workdir, keep=1) as saver:
    saver.save(1, state, config=config, facts={}, totals=[], base=frozen.origin)
  return model, frozen.params, trained, lora


@pytest.mark.skipif(bool(smollm2.missing()), reason=smollm2.missing())
def test_transformers_gives_a_merged_export_the_logits_of_the_unmerged_model(tmp_path):
  from transformers import AutoModelForCausalLM

  model, frozen, trained, lora = save_run(tmp_path / "run")
  ((code, _, said),) = run("export", [f"--model={tmp_path / 'run'}", f"--output={tmp_path / 'hf'}"], folder=tmp_path)
  assert code == 0, said
  token_BT = np.random.default_rng(1).integers(0, 49_000, (2, 48)).astype(np.int32)
  token_BT[:, 5::9], token_BT[:, 7::11] = lora.markers
  position_BT = np.broadcast_to(np.arange(48, dtype=np.int32), (2, 48))
  module = llama.Llama(model, "float32", "none", lora=lora)
  stream_BTD = module.apply({"params": frozen, "adapters": trained}, token_BT, position_BT, np.ones_like(token_BT))
  embed_VD = jnp.asarray(frozen["embed"]).at[jnp.asarray(lora.markers)].set(trained["rows"]["embed"])
  ours_BTV = llama.logits({"embed": embed_VD}, model, stream_BTD)
  there = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
  with torch.no_grad():
    theirs_BTV = there(torch.tensor(token_BT, dtype=torch.long)).logits.numpy()
  untuned_BTV = llama.logits(
    frozen,
    model,
    llama.Llama(model, "float32", "none").apply({"params": frozen}, token_BT, position_BT, np.ones_like(token_BT)),
  )
  assert np.abs(theirs_BTV - untuned_BTV).max() > 1  # the adapters matter
  difference = np.abs(theirs_BTV - ours_BTV).max()
  print(f"largest difference of the logits: {difference:.2e}")
  assert difference <= 2e-4
