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
from insec_jax.generation.loading import load_model
from insec_jax.generation.placement import one_device
from insec_jax.model import adapters, build, hf, hf_config, llama
from insec_jax.model.attention import XLA
from insec_jax.training import frozen as frozen_lib
from insec_jax.training import layout, optimizer, step
from insec_jax.training.checkpoint import Saver

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity
TEXT = "Natalia sold clips to 48 friends, and half as many in May. She sold 48/2 = 12<err> wrong number<fix> 48/2 = 24."


def save_run(workdir):
  """Write a workdir with random adapters and marker rows; return (model's config, frozen, trained tree, Lora)."""
  config = small_config(model__path=str(smollm2.folder()), model__size=None)
  config = dataclasses.replace(config, lora=LoraConfig(rank=8, alpha=16.0))
  marked = vocabulary.open_tokenizer(config)
  before = hf.read_config(smollm2.folder())
  model = dataclasses.replace(before, vocab_size=build.vocabulary_for(len(marked.tokenizer), before.vocab_size))
  lora = frozen_lib.part_of(config, marked.tokenizer)
  rng = np.random.default_rng(0)
  deviation = {"a": 0.02, "b": 0.02, "embed": 0.1}  # of the sizes that training gives them
  trained = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(rng.normal(size=leaf.shape) * deviation[path[-1].key], jnp.float32),
    adapters.unboxed_shapes(model, lora),
  )
  workdir.mkdir()
  (workdir / layout.CONFIG).write_text(config.to_json())
  (workdir / layout.MODEL).write_text(json.dumps(hf_config.config_to_json(model)))
  environment = {"commit": "abc123", "packages": {"jax": jax.__version__}}
  (workdir / "environment.json").write_text(json.dumps(environment))
  marked.tokenizer.save_pretrained(workdir / layout.TOKENIZER)
  frozen = frozen_lib.load(config, model, lora, one_device(), workdir)
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
  loaded = load_model(str(tmp_path / "run"), mesh="tensor:1")
  token_BT = np.array([loaded.tokenizer.encode(TEXT, add_special_tokens=False)], np.int32)
  assert set(lora.markers) <= set(token_BT[0])
  prompt = llama.forward_prompt(model, loaded.params, token_BT, np.zeros(1, np.int32), XLA, "float32")
  merged_BTV = llama.logits(loaded.params, model, prompt[0])

  def with_training(lora, trees):
    rest = (token_BT, np.arange(token_BT.size, dtype=np.int32)[None], np.ones_like(token_BT))
    return llama.Llama(model, "float32", "none", lora=lora).apply(trees, *rest)

  stream_BTD = with_training(lora, {"params": frozen, "adapters": trained})
  unmerged_BTV = llama.logits(loaded.params, model, stream_BTD)
  untuned_BTV = llama.logits(frozen, model, with_training(None, {"params": frozen}))
  there = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
  with torch.no_grad():
    theirs_BTV = there(torch.tensor(token_BT, dtype=torch.long)).logits.numpy()
  assert np.abs(theirs_BTV - untuned_BTV).max() > 1  # the adapters matter
  merged, unmerged = (np.abs(theirs_BTV - ours_BTV).max() for ours_BTV in (merged_BTV, unmerged_BTV))
  print(f"largest logit {theirs_BTV.max():.1f}; largest difference merged {merged:.1e}, unmerged {unmerged:.1e}")
  assert merged <= 2e-4
  assert unmerged <= 5e-4  # a sum in another order, in each of 30 layers


@pytest.mark.skipif(bool(smollm2.missing()), reason=smollm2.missing())
def test_peft_opens_the_adapters_and_the_pair_with_the_logits_of_the_merged_model(tmp_path):
  peft = pytest.importorskip("peft")
  from transformers import AutoModelForCausalLM

  model, *_ = save_run(tmp_path / "run")
  for form in ("peft", "pair"):
    flags = [f"--model={tmp_path / 'run'}", f"--output={tmp_path / form}", f"--format={form}"]
    ((code, _, said),) = run("export", flags, folder=tmp_path)
    assert code == 0, said
  loaded = load_model(str(tmp_path / "run"), mesh="tensor:1")
  token_BT = np.array([loaded.tokenizer.encode(TEXT, add_special_tokens=False)], np.int32)
  prompt = llama.forward_prompt(model, loaded.params, token_BT, np.zeros(1, np.int32), XLA, "float32")
  merged_BTV = llama.logits(loaded.params, model, prompt[0])
  for base, adapter in ((smollm2.folder(), "peft"), (tmp_path / "pair" / "base", "pair/adapter")):
    there = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    there.resize_token_embeddings(model.vocab_size)
    there = peft.PeftModel.from_pretrained(there, tmp_path / adapter).eval()
    with torch.no_grad():
      theirs_BTV = there(torch.tensor(token_BT, dtype=torch.long)).logits.numpy()
    known = slice(0, len(loaded.tokenizer))  # the other rows are no tokens; peft's are drawn
    assert np.abs(theirs_BTV - merged_BTV)[..., known].max() < 2e-4, adapter
