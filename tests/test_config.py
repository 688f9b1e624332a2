"""A config file fails before a device is touched: missing, stray, misspelt and contradicting keys are named."""

import importlib.util
import pathlib

import ml_collections
import pytest

from insec_jax import config
from insec_jax.command import InputError

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def load(file: pathlib.Path, *arm: str) -> ml_collections.ConfigDict:
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*arm)


@pytest.fixture
def toy():
  return load(next(file for file in CONFIGS if file.stem == "toy"), "base").unlock()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_file_builds_and_survives_its_json(file):
  built = config.build(load(file))
  assert config.from_json(built.to_json()) == built


@pytest.mark.parametrize(("name", "arm"), [
  *(("toy", arm) for arm in ("base", "clean", "insec")),
  *(("graph", arm) for arm in ("base", "more", "clean", "injected", "mined")),
  *(("sudoku", arm) for arm in ("base", "clean", "injected", "mined", "sure"))])
def test_every_arm_builds_and_only_the_base_begins_with_random_weights(name, arm):
  values = load(next(file for file in CONFIGS if file.stem == name), arm)
  if values.mistakes.mined:
    values.mistakes.mined_path = "mined.jsonl"  # as a sweep fills it in
  built = config.build(values)
  assert (built.model.size is not None, built.model.path == "") == (arm == "base",) * 2


@pytest.mark.parametrize("name", ["smollm2_gsm8k", "smollm2_multiplication"])
@pytest.mark.parametrize("arm", ["base", "clean", "injected", "mined"])
def test_every_arm_of_a_real_model_builds_and_the_arms_go_on_from_the_base(name, arm):
  values = load(next(file for file in CONFIGS if file.stem == name), arm)
  if values.mistakes.mined:
    values.mistakes.mined_path = "mined.jsonl"
  assert config.build(values).model.path.endswith("SmolLM2-135M-Instruct" if arm == "base" else "base_hf")


def test_a_misspelt_key_is_answered_with_the_right_one(toy):
  toy.optimizer.learning_rat = 1e-3
  with pytest.raises(InputError, match=r"no key optimizer\.learning_rat; did you mean optimizer\.learning_rate\?"):
    config.build(toy)


def test_a_missing_key_is_named(toy):
  del toy.loss.flag
  with pytest.raises(InputError, match=r"misses loss\.flag"):
    config.build(toy)


@pytest.mark.parametrize(("key", "value", "message"), [
  ("model.path", "somewhere", "not both or neither"),
  ("tokenizer.fix", "", "must be two texts"),
  ("task.name", "gsm8k", "give --config.data.path"),
  ("task.min_size", 99, "above task.max_size"),
  ("data.row_length", 1, "at least 2"),
  ("data.template", "xml", "must be one of 'plain', 'chat'"),
  ("mistakes.share", 1.5, "between 0 and 1"),
  ("mistakes.source", "mined", "reads records that mine wrote"),
  ("mistakes.mined", 1.5, "between 0 and 1"),
  ("mistakes.mined", 0.3, "give --config.mistakes.mined_path=FILE.jsonl, or --config.rounds=R"),
  ("mistakes.mined_path", "m.jsonl", "would be read by nobody with mistakes.mined=0"),
  ("mine.temperature", 0.0, "would all be the same"),
  ("mine.samples", 0, "at least 1"),
  ("loss.end", 0.0, "never learns to stop"),
  ("optimizer.warmup_steps", 10**9, "is above train.steps"),
  ("optimizer.b2", 1.0, "must be below 1"),
  ("train.steps", 0, "at least 1"),
  ("loss.repeat", -0.5, "at least 0"),
  ("mesh.fsdp", 0, "at most one -1"),
  ("precision.compute", "float8", "must be one of"),
  ("evaluate.temperature", 0.0, "is greedy, which is measured in any case"),
  ("evaluate.max_false_alarms", 0.5, "must be below 0.5"),
  ("evaluate.votes", 0, "at least 1"),
  ("evaluate.max_size", -1, "at least 0"),
])
def test_a_bad_value_is_refused_in_one_line(toy, key, value, message):
  section, name = key.split(".")
  with toy.ignore_type():
    toy[section][name] = value
  with pytest.raises(InputError, match=message) as caught:
    config.build(toy)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rounds", "changes", "message"), [
  (2, {}, "rounds=2 with mistakes.mined=0 would mine records that nobody reads"),
  (2, {"mined": 0.5, "mined_path": "m.jsonl"}, "leave mistakes.mined_path='m.jsonl' empty, or set rounds=0"),
  (10**6, {"mined": 0.5}, "is above train.steps"),
  (-1, {}, "must be a whole number of at least 0"),
  (1.5, {}, "must be a whole number of at least 0"),
])
def test_rounds_that_make_no_sense_are_refused_in_one_line(toy, rounds, changes, message):
  with toy.ignore_type():
    toy.rounds = rounds
  toy.mistakes.update(changes)
  with pytest.raises(InputError, match=message) as caught:
    config.build(toy)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("task", "message"), [
  ({}, "must be above task.max_size=3, or 0 for none"),
  ({"name": "gsm8k", "min_size": 0, "max_size": 0, "modulus": 0, "unneeded": 0}, "have no sizes; set it to 0"),
])
def test_problems_larger_than_those_trained_on_must_be_larger_and_have_sizes(toy, task, message):
  toy.evaluate.max_size = 3
  toy.task.update(task)
  toy.data.path = "r.jsonl"
  with pytest.raises(InputError, match=message) as caught:
    config.build(toy)
  assert "\n" not in str(caught.value)


def test_rounds_need_a_checker(toy):
  toy.rounds, toy.mistakes.mined = 2, 0.5
  toy.task = {"name": "records", "min_size": 0, "max_size": 0, "modulus": 0, "unneeded": 0}
  toy.data.path = "r.jsonl"
  with pytest.raises(InputError, match="'records' has no checker"):
    config.build(toy)


def test_all_weights_zero_is_refused(toy):
  toy.loss = dict.fromkeys(("prompt", "text", "mistake", "flag", "reason", "correction", "repeat"), 0.0) | {"end": 1.0}
  with pytest.raises(InputError, match="nothing would be trained"):
    config.build(toy)


@pytest.mark.parametrize(("sizes", "shape"), [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2))])
def test_a_mesh_fills_in_what_remains(sizes, shape):
  data, fsdp, tensor = sizes
  assert config.MeshConfig(data=data, fsdp=fsdp, tensor=tensor).shape(8) == shape


def test_a_mesh_that_does_not_divide_the_devices_is_refused():
  with pytest.raises(InputError, match="does not divide 8 devices"):
    config.MeshConfig(data=3, fsdp=-1, tensor=1).shape(8)
