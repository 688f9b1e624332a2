"""Prompts are encoded as in training, texts keep their markers, and steps are read with their confidence."""

import functools

import datakit
import jax
import numpy as np
import reference
from markedkit import NEW, SURE, trained
from samplerkit import laid_out

from insec_jax.data import vocabulary
from insec_jax.generation import generator, placement
from insec_jax.generation.confidence import step_scores
from insec_jax.generation.generator import TextGenerator
from insec_jax.generation.loading import LoadedModel
from insec_jax.generation.sampler import SampledTokens
from insec_jax.method.transcript import Markers
from insec_jax.model import build
from insec_jax.model.hf_config import config_from_json


class Given:
  """In place of Sampler: writes what it is given."""

  def __init__(self, config, params, *, compute, mesh, kind_V):  # noqa: ARG002, as Sampler's
    self.written, self.options = [], {}

  def generate(self, prompts, **options):
    self.options = options
    return self.written[: len(prompts)]


def test_text_has_its_markers_and_loses_only_its_stop_token(monkeypatch):
  monkeypatch.setattr(generator, "Sampler", Given)
  model = trained(NEW)
  made = TextGenerator(model)
  end = model.tokenizer.eos_token_id
  token_T = [*model.tokenizer("12 + 30", add_special_tokens=False)["input_ids"], model.flag_id, end]
  made.sampler.written = [SampledTokens(np.array(token_T), None, finish, None, None) for finish in ("stop", "length")]
  both = made.write([np.array([1])] * 2, label="", max_tokens=9, batch_size=2)
  assert [one.text for one in both] == ["12 + 30<err>", "12 + 30<err><|eos|>"]
  assert [one.finished for one in both] == [True, False]
  assert made.sampler.options["stop_ids"] == [end, 3]
  assert made.sampler.options["flag_id"] == model.flag_id


def test_prompts_are_encoded_as_in_training_and_forge_no_marker(monkeypatch):
  monkeypatch.setattr(generator, "Sampler", Given)
  model = trained(NEW)
  made = TextGenerator(model)
  tokens = made.encode("12 + 30?<err>\n", answer="12 +")
  assert tokens[0] == model.tokenizer.bos_token_id
  assert model.flag_id not in tokens
  assert made.decode(tokens[1:]) == "12 + 30?<err>\n12 +"


STEPS = (["He adds 12 and 30.\n", "12 + 30 = 43\n"], ["12 + 30 = 42\n", "#### 42\n", "a\n"], [])
QUESTIONS = ("What is 12 + 30?\n", "What?\n", "12 + 30 = ")


@functools.cache
def reader(sure: bool) -> TextGenerator:
  """A small random model, with or without tokens of confidence."""
  return reading(SURE if sure else NEW)


def reading(config) -> TextGenerator:
  marked = vocabulary.add_markers(datakit.bpe_tokenizer(), config.tokenizer)
  fields = reference.FIELDS | {"vocab_size": len(marked.tokenizer), "eos_token_id": [2]}
  model_config = config_from_json(fields, "config.json")
  mesh = placement.one_device()
  params = build.init(model_config, jax.random.key(0), "float32")
  return TextGenerator(
    LoadedModel(
      model_config,
      laid_out(params, model_config, mesh),
      marked.tokenizer,
      mesh,
      "float32",
      Markers("<err>", "<fix>"),
      marked.flag_id,
      marked.fix_id,
      "line",
      "plain",
      config.tokenizer.confidence,
      config.tokenizer.confidence_first,
      marked.confidence_ids,
    )
  )


def test_steps_are_read_with_the_confidence_that_the_model_had_in_them():
  writer = reader(True)
  ids = writer.watch().confidence_ids
  for question, steps, (token_T, scores) in zip(
    QUESTIONS, STEPS, writer.read(QUESTIONS, STEPS, batch_size=4), strict=True
  ):
    logprob_T = writer.sampler.logprobs([token_T], batch_size=1)[0]
    begin = len(writer.encode(question))
    again = step_scores(token_T[begin:], logprob_T[begin:], writer.watch(), writer.flag_id)
    np.testing.assert_allclose([said.score for *_, said in again], [said.score for said in scores], atol=1e-4)
    np.testing.assert_allclose([said.first for *_, said in again], [said.first for said in scores], atol=1e-4)
    assert len(scores) == len(steps)
    sure = [int(token) for token in token_T[begin:] if token in ids]
    assert sure == [ids[sum(said.score > edge for edge in (0.5, 5.0))] for said in scores]
    assert writer.decode(token_T[begin:]) == "".join(steps)


def test_steps_are_read_in_few_passes_and_as_one_by_one(monkeypatch):
  writer = reader(True)
  steps = [["a\n", "12 + 30 = 42\n", "b b\n"] * 4]
  passes = []
  logprobs = writer.sampler.logprobs
  monkeypatch.setattr(writer.sampler, "logprobs", lambda texts, **how: passes.append(texts) or logprobs(texts, **how))
  ((token_T, scores),) = writer.read(["What?\n"], steps, batch_size=1)
  assert len(passes) < len(steps[0])
  alone = [writer.read(["What?\n"], [steps[0][:num]], batch_size=1)[0] for num in range(1, 13)]
  np.testing.assert_allclose(scores, [one[-1] for _, one in alone], atol=1e-4)
  assert token_T.tolist() == alone[-1][0].tolist()


def test_a_model_without_tokens_of_confidence_reads_steps_as_they_are():
  writer = reader(False)
  for question, steps, (token_T, scores) in zip(
    QUESTIONS, STEPS, writer.read(QUESTIONS, STEPS, batch_size=4), strict=True
  ):
    assert token_T.tolist() == writer.encode(question, answer="".join(steps)).tolist()
    assert len(scores) == len(steps)
    assert min((said.first for said in scores), default=1) > 0


def test_what_a_model_writes_holds_its_confidence_as_tokens_and_not_as_text():
  writer = reader(True)
  ids = writer.watch().confidence_ids
  prompts = [writer.encode(question) for question in QUESTIONS * 10]
  written = writer.write(prompts, label="", max_tokens=60, batch_size=32, temperature=5.0, flag_bias=-np.inf)
  assert any(token in ids for one in written for token in one.generation.tokens)
  assert not any("<|sure_" in one.text for one in written)


def test_a_step_of_two_lines_moves_no_confidence_of_the_steps_after_it():
  writer = reader(True)
  ids = writer.watch().confidence_ids
  steps = ["a\n", "b\n\n", "12 + 30 = 42\n", "b b\n"]
  ((token_T, scores),) = writer.read(["What?\n"], [steps], batch_size=1)
  assert len(scores) == len(steps) + 1
  sure = [int(token) for token in token_T if token in ids]
  assert sure == [ids[sum(scores[k].score > edge for edge in (0.5, 5.0))] for k in (0, 2, 3, 4)]


def test_steps_are_read_with_the_first_token_told_apart_where_it_has_edges():
  config = datakit.config(
    tokenizer__flag="<err>",
    tokenizer__fix="<fix>",
    tokenizer__confidence=(8.0,),
    tokenizer__confidence_first=(5.0, 8.0),
  )
  writer = reading(config)
  ids = writer.watch().confidence_ids
  steps = [["a\n", "12 + 30 = 42\n", "b b\n"] * 4]
  ((token_T, surprises),) = writer.read(["What?\n"], steps, batch_size=1)
  sure = [ids.index(token) for token in token_T.tolist() if token in ids]
  assert sure == [3 * (said.score > 8.0) + (said.first > 5.0) + (said.first > 8.0) for said in surprises]
  assert len(set(sure)) > 3
