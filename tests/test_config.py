"""A config fails before a device is touched: keys and values that are missing, stray, misspelt or wrong are named."""

import copy
import dataclasses
import functools
import json
import math
import pathlib

import ml_collections
import pytest

from insec_jax import config, config_file
from insec_jax.command import InputError
from insec_jax.config_build import REMOVED, build, from_json, update_keys
from insec_jax.config_types import shown

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("[!_]*.py"))


def load(file: pathlib.Path, *arm: str) -> ml_collections.ConfigDict:
  return config_file.load(str(file), *arm)


@pytest.fixture
def toy():
  return load(next(file for file in CONFIGS if file.stem == "toy"), "clean").unlock()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_file_builds_and_survives_its_json(file):
  built = build(load(file))
  assert from_json(built.to_json()) == built


@pytest.mark.parametrize(
  ("name", "arm"),
  [
    *(
      ("graph", arm)
      for arm in ("base", "more", "clean", "injected", "mined", "policy", "policy_clean", "hinted", "distill")
    ),
    *(
      ("sudoku", arm)
      for arm in ("base", "clean", "injected", "mined", "sure", "policy", "policy_clean", "hinted", "distill")
    ),
  ],
)
def test_every_arm_builds_and_only_the_base_begins_with_random_weights(name, arm):
  values = load(next(file for file in CONFIGS if file.stem == name), arm)
  if values.mistakes.mined:
    values.mistakes.mined_path = "mined.jsonl"  # as a sweep fills it in
  built = build(values)
  assert (built.model.size is not None, built.model.path == "") == (arm == "base",) * 2


@pytest.mark.parametrize("name", ["graph", "sudoku"])
@pytest.mark.parametrize(("arm", "start"), [("policy", "mined"), ("policy_clean", "clean"), ("distill", "hinted")])
def test_a_policy_arm_writes_the_confidence_tokens_of_the_arm_that_it_starts_from(name, arm, start):
  file = next(file for file in CONFIGS if file.stem == name)
  values, of_start = load(file, arm), load(file, start)
  assert values.model.path.endswith(f"{start}_hf")
  assert values.tokenizer == of_start.tokenizer
  assert values.mistakes.rewind == of_start.mistakes.rewind


def test_both_arms_of_the_toy_begin_with_the_same_random_weights():
  clean, insec = (build(load(next(file for file in CONFIGS if file.stem == "toy"), arm)) for arm in ("clean", "insec"))
  assert (clean.model, clean.seed, clean.model.path) == (insec.model, insec.seed, "")
  assert clean.model.size is not None


@pytest.mark.parametrize(
  "name",
  [f"smollm2_{task}" for task in ("english", "grounded", "gsm8k", "instructions", "multiplication")],
)
@pytest.mark.parametrize("arm", ["base", "clean", "injected", "mined"])
def test_every_arm_of_a_real_model_builds_and_the_arms_go_on_from_the_base(name, arm):
  values = load(next(file for file in CONFIGS if file.stem == name), arm)
  if values.mistakes.mined:
    values.mistakes.mined_path = "mined.jsonl"
  assert build(values).model.path.endswith("SmolLM2-135M-Instruct" if arm == "base" else "base_hf")


INF, NAN, HUGE = math.inf, math.nan, 10**400


class NoText:
  """An object whose repr raises."""

  def __repr__(self):
    raise ValueError


NESTED = {"a": 1}
for _ in range(2_000):
  NESTED = {"a": NESTED}
WRONG = (
  None,
  True,
  False,
  "",
  "no",
  "a\x00b",
  "\ud800",
  "a\nb",
  "x" * 10_000,
  b"x",
  0,
  1,
  -1,
  2,
  1.0,
  1.5,
  -0.5,
  1e-300,
  1e300,
  INF,
  -INF,
  NAN,
  10**12,
  HUGE,
  10**5_000,
  -(10**12),
  [],
  [1],
  ["a"],
  (),
  (1,),
  ("a",),
  (NAN,),
  (1, (2,)),
  {},
  {"a": 1},
  {1: 2},
  {"a": NAN},
  {"a": INF},
  {"a": (1,)},
  NESTED,
  {"a"},
  object,
  object(),
  NoText(),
  1j,
  len,
)
PATHS = (
  *("model.path", "tokenizer.path", "data.path", "data.heldout_path", "data.cache"),
  *("mistakes.mined_path", "evaluate.swapped_path"),
)
WEIGHTS = tuple(f"loss.{name}" for name in ("prompt", "text", "mistake", "flag", "reason", "correction"))
# What is right for a key, of the values above; a whole number is right for a rate. All else must be refused.
NUMBERS = {
  (0, 1, 2): (
    "task.modulus",
    "data.num_heldout",
    "optimizer.warmup_steps",
    "seed",
    "lora.rank",
    "train.top_layers",
    "train.curve_points",
  ),
  (1, 2): (
    "task.max_size",
    "data.num_records",
    "data.rows_per_device",
    "data.accumulation",
    "mistakes.max_per_solution",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep",
    "task.min_size",
    "evaluate.num_problems",
    "evaluate.num_probes",
    "evaluate.batch_size",
    "evaluate.votes",
    "evaluate.max_tokens",
    "evaluate.redraws",
    "mine.num_problems",
    "mine.samples",
  ),
  (0,): ("rounds", "evaluate.max_size", "mistakes.mined", "data.to_mine"),
  (2,): ("data.row_length",),
  (-1, 1, 2): ("mesh.fsdp",),
  (1, 2, "tensor"): ("mesh.data", "mesh.sequence", "mesh.tensor"),
  (0, 1, -1, 2, 1.5, -0.5): WEIGHTS,
  (1, 2, 1.5): (
    "loss.end",
    "evaluate.temperature",
    "optimizer.learning_rate",
    "optimizer.clip_norm",
    "lora.alpha",
    "policy.temperature",
  ),
  (0, 1, 2, 1.5): (
    "loss.repeat",
    "optimizer.weight_decay",
    "train.minutes",
    "policy.kl",
    "policy.contrast",
    "policy.no_flag",
  ),
  (0, 1): ("mistakes.share", "mistakes.hinted", "optimizer.final_share", "policy.flag_price", "policy.forward"),
  (1, "eps"): ("optimizer.eps",),
  (0, "moment"): ("optimizer.b1", "optimizer.b2", "optimizer.ema", "evaluate.max_false_alarms"),
}
RATES = (
  "loss.",
  "evaluate.temperature",
  "mine.right",
  "optimizer.learning_rate",
  "optimizer.eps",
  "optimizer.clip_norm",
  "optimizer.weight_decay",
  "optimizer.b",
  "optimizer.ema",
  "optimizer.final_share",
  "mistakes.share",
  "mistakes.mined",
  "mistakes.hinted",
  "data.to_mine",
  "evaluate.max_false_alarms",
  "train.minutes",
  "lora.alpha",
  "policy.",
)


def is_right(key: str, value) -> bool:
  """Whether the value is right for the key in an otherwise right config, by what the key means."""
  if key in (
    "tokenizer.special",
    "lora.rank_stabilised",
    "lora.marker_rows",
    "train.marker_rows",
    "mistakes.rewind",
    "mine.flags",
    "policy.scaled",
  ):
    return isinstance(value, bool)
  if key == "train.stream_cache":  # any other one needs frozen layers
    return value == ""
  if isinstance(value, bool):
    return False
  if isinstance(value, int | float):
    if isinstance(value, float) and not key.startswith(RATES):
      return False
    if key == "mine.right":
      return value in (0, 1, 2, 1.5, 1e-300)
    if value == 1e-300:
      return key in (
        "mistakes.share",
        "optimizer.final_share",
        "optimizer.weight_decay",
        "optimizer.b1",
        "optimizer.b2",
        "optimizer.ema",
        "evaluate.max_false_alarms",
        "train.minutes",
        "policy.flag_price",
        "policy.kl",
        "policy.forward",
        "policy.contrast",
        "policy.no_flag",
        "mistakes.hinted",
      )
    return any(key in keys and value in values for values, keys in NUMBERS.items())
  if isinstance(value, str):
    if key in PATHS:
      # model.size is given; a mined_path would not be read with mistakes.mined=0, nor held-out records by this task.
      unread = ("model.path", "mistakes.mined_path", "data.heldout_path", "evaluate.swapped_path")
      return value == "" if key in unread else value in ("", "no", "a\nb")
    return value in {
      "tokenizer.flag": ("no",),
      "tokenizer.fix": ("no",),
      "data.fields": ("", "no"),
      "log.project": ("no",),
    }.get(key, ())
  if key == "evaluate.temperatures":
    return value in ([1], (1,))
  if key == "mistakes.classes":
    return value in ([], ["a"], (), ("a",))
  # Scores need mined records, which are not given.
  if key in (
    "tokenizer.confidence",
    "tokenizer.confidence_first",
    "train.profile_steps",
    "log.to",
    "evaluate.endpoints",
    "evaluate.rivals",
  ):
    return value in ([], ())
  # Without a model.path a size is needed; its fields are read by model/hf_config.py.
  return key == "model.size" and value == {"a": 1}


def keys() -> list[str]:
  return [
    key if section == key else f"{section}.{key}"
    for section, value in config.defaults().to_dict().items()
    for key in (value if isinstance(value, dict) else (section,))
  ]


@functools.cache
def defaults() -> dict:
  return config.defaults().to_dict()


def working() -> dict:
  """A config in which a key has few relations to others; every rate and count is in the middle of what it may be."""
  values = copy.deepcopy(defaults())
  values["model"]["size"] = {"hidden_size": 8}
  values["task"] |= {"name": "graph", "min_size": 1, "max_size": 2, "modulus": 10}
  values["data"] |= {"num_records": 10}
  return values


def test_every_key_takes_right_values_and_refuses_wrong_ones_in_a_line_with_its_name():
  assert len(keys()) >= 70
  wrong = []
  for key in keys():
    for value in WRONG:
      values = working()
      section, _, name = key.rpartition(".")
      (values[section] if section else values)[name] = value
      try:
        said = None
        built = build(values)
        assert from_json(built.to_json()) == built
      except InputError as error:
        said = str(error)
      except Exception as error:
        wrong.append(f"{key}={shown(value)}: {type(error).__name__} {error}"[:200])
        continue
      if (said is None) != is_right(key, value):
        wrong.append(f"{key}={shown(value)}: {said or 'accepted'}"[:200])
      if said and (name not in said or "\n" in said or len(said) > 700):
        wrong.append(f"{key}={shown(value)}: says {said!r}"[:200])
  assert not wrong, "\n".join([f"{len(wrong)} of {len(keys()) * len(WRONG)}", *wrong])


def test_lora_names_matrices_of_a_layer_once_and_rows_of_special_markers_only():
  def lora(**values):
    return build(working() | {"lora": working()["lora"] | values}).lora

  assert lora(rank=4, alpha=32.0).scale == 8
  assert lora(rank=4, alpha=32.0, rank_stabilised=True).scale == 16
  assert lora(matrices=["wq", "down"]).matrices == ("wq", "down")
  for matrices in ((), ("wq", "wq"), ("w1",)):
    with pytest.raises(InputError, match=r"lora\.matrices.*must be a tuple of some of 'wq', .*'down', each once"):
      lora(matrices=matrices)
  plain = working()
  plain["tokenizer"]["special"] = False
  build(plain)
  plain["lora"]["rank"] = 4
  with pytest.raises(InputError, match=r"set lora\.marker_rows=False"):
    build(plain)
  plain["lora"]["marker_rows"] = False
  build(plain)


@pytest.mark.parametrize(("key", "value"), [("name", "muon"), ("rounding", "stochastic")])
def test_an_option_that_would_do_nothing_to_adapters_is_refused_beside_lora(key, value):
  given = working()
  given["precision"]["params"] = "bfloat16"
  given["optimizer"][key] = value
  build(given)
  given["lora"]["rank"] = 4
  with pytest.raises(InputError, match=rf"optimizer\.{key}='{value}'.*lora\.rank"):
    build(given)


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ({"train.top_layers": 2, "lora.rank": 4}, r"lora\.rank=4 and train\.top_layers=2 are two ways"),
    ({"train.top_layers": 2, "tokenizer.special": False}, r"set train\.marker_rows=False"),
    ({"train.top_layers": 2, "optimizer.rounding": "stochastic", "precision.params": "bfloat16"}, r"train\.top_layers"),
    ({"train.stream_cache": "c"}, r"train\.top_layers=0 freezes none"),
    ({"train.stream_cache": "c", "train.top_layers": 2}, r"set train\.marker_rows=False"),
    ({"train.stream_cache": "gs://bucket/c", "train.top_layers": 2}, r"give a folder on a local disk"),
    ({"train.vocabulary": "used", "rounds": 2, "mistakes.mined": 0.2}, r"train\.vocabulary='used' is not made"),
  ],
)
def test_values_that_contradict_frozen_layers_or_a_cut_vocabulary_are_refused(values, said):
  given = working()
  for name, value in values.items():
    section, _, key = name.rpartition(".")
    (given[section] if section else given)[key] = value
  with pytest.raises(InputError, match=said):
    build(given)


def test_top_layers_take_every_optimizer_and_a_cache_with_frozen_marker_rows():
  given = working()
  given["train"] |= {"top_layers": 2, "marker_rows": False, "stream_cache": "c", "vocabulary": "used"}
  given["optimizer"]["name"] = "muon"
  assert build(given).freezes


def test_a_config_from_before_top_layers_trains_all_weights_over_all_tokens():
  old = working()
  for key in ("top_layers", "marker_rows", "stream_cache", "vocabulary"):
    old["train"].pop(key, None)
  built = build(old)
  assert (built.freezes, built.train.vocabulary, built.train.stream_cache) == (False, "all", "")


def test_a_config_from_before_lora_trains_every_weight():
  old = working()
  del old["lora"]
  assert build(old).lora.rank == 0


def test_a_section_that_is_none_or_has_keys_that_are_no_text_is_refused():
  for name in ("model", "loss", "mesh"):
    for value in WRONG:
      with pytest.raises(InputError, match=name):
        build(working() | {name: value})
  for value in WRONG:
    with pytest.raises(InputError, match=r"config"):
      build(value)


def test_every_number_has_a_finite_bound_on_both_sides():
  for section in config.SECTIONS.values():
    for field in section.__pydantic_fields__.values():
      bounds = {
        type(bound).__name__: getattr(bound, type(bound).__name__.lower())
        for bound in field.metadata
        if type(bound).__name__ in ("Ge", "Le", "Lt", "Gt")
      }
      assert all(math.isfinite(bound) for bound in bounds.values())
      if field.annotation in (int, float):
        assert {"Ge"} < bounds.keys(), field


def test_defaults_need_only_a_model_and_data():
  values = config.defaults()
  values.model.path, values.data.path = "hf", "records.jsonl"
  built = build(values)
  assert (built.data.too_long, built.loss.weight_R) == ("refuse", (0, 1, 0, 1, 1, 1))


def test_a_path_is_expanded_and_one_of_another_scheme_refused(toy, bucket, monkeypatch):
  monkeypatch.setenv("HOME", "/home/someone")
  toy.mistakes.source = "recorded"
  toy.data.path = "~/records.jsonl"
  assert build(toy).data.path == "/home/someone/records.jsonl"
  toy.data.path = f"{bucket.url}/records.jsonl"
  assert build(toy).data.path == f"{bucket.url}/records.jsonl"
  toy.data.path = "s3://bucket/records.jsonl"
  with pytest.raises(InputError, match=r"data\.path=s3://bucket/records.jsonl: s3:// is not supported"):
    build(toy)


def test_a_cache_of_rows_in_a_bucket_is_refused(toy, bucket):
  toy.data.cache = f"{bucket.url}/rows"
  with pytest.raises(InputError, match="mapped into memory; give a folder on a local disk"):
    build(toy)


def test_points_of_a_curve_need_steps_and_a_checker_and_older_configs_have_none(toy):
  older = json.loads(build(toy).to_json())
  del older["train"]["curve_points"], older["evaluate"]["endpoints"]
  built = from_json(json.dumps(older))
  assert (built.train.curve_points, built.evaluate.endpoints) == (0, ())
  with pytest.raises(InputError, match=r"train\.curve_points=11 is above train\.steps=10"):
    config.TrainConfig(steps=10, curve_points=11)
  older["train"]["curve_points"] = 1
  older["task"] = {"name": "records", "min_size": 0, "max_size": 0, "modulus": 0}
  older["data"]["path"] = "records.jsonl"
  with pytest.raises(InputError, match=r"train\.curve_points=1 counts right answers, and task\.name='records' has no"):
    from_json(json.dumps(older))


def test_endpoints_are_checked_when_the_config_is_built(toy):
  toy.evaluate.endpoints = ("mined - clean: solutions t2", "mined: own correction")
  built = build(toy)
  assert from_json(built.to_json()) == built
  for endpoints, said in (
    (("mined - clean: solutions t4",), "evaluate.endpoints has 'mined - clean: solutions t4': 't4' is no metric"),
    (("mined: own correction",) * 2, "evaluate.endpoints=.* must be a tuple of at most 8 texts .* each once"),
  ):
    toy.evaluate.endpoints = endpoints
    with pytest.raises(InputError, match=said) as caught:
      build(toy)
    assert "\n" not in str(caught.value)


def test_a_step_of_more_tokens_than_a_device_can_hold_is_refused(toy):
  toy.data.rows_per_device, toy.data.accumulation = 4_096, 4_096
  with pytest.raises(InputError, match="tokens of a device in a step; must be at most 268,435,456"):
    build(toy)


@pytest.mark.parametrize("steps", [(3,), (4, 3), (0, 3), (299, 6_961)])
def test_steps_to_profile_that_are_no_steps_of_the_run_are_refused(toy, steps):
  toy.train.profile_steps = steps
  with pytest.raises(InputError, match=r"train\.profile_steps"):
    build(toy)
  toy.train.profile_steps = (1, 4_470)
  assert build(toy).train.profile_steps == (1, 4_470)


def test_newer_keys_that_an_older_config_lacks_have_the_value_that_means_as_before(toy):
  del toy.data.too_long, toy.train.minutes, toy.log
  built = build(toy)
  assert (built.data.too_long, built.train.minutes, built.log.to) == ("refuse", 0.0, ("tensorboard",))
  older = json.loads(built.to_json())
  del older["data"]["too_long"], older["train"]["minutes"], older["log"], older["optimizer"]["name"]
  assert from_json(json.dumps(older)) == built
  update_keys(older)
  assert json.loads(json.dumps(older)) == json.loads(built.to_json())


@pytest.mark.parametrize("to", ["wandb", ("wand",), ("wandb", "wandb"), (1,)])
def test_a_place_to_log_to_that_there_is_not_is_refused(toy, to):
  toy.unlock()
  toy["log"] = {"to": to, "project": "insec_jax"}
  with pytest.raises(InputError, match=r"log\.to"):
    build(toy)


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_key_is_passed_over_with_the_value_that_means_as_now_only(toy, name):
  section, key = name.split(".")
  value, version = REMOVED[name]
  built = build(toy)
  toy[section][key] = value
  assert build(toy) == built
  older = json.loads(built.to_json())
  older[section][key] = value
  assert from_json(json.dumps(older)) == built
  older[section][key] = "other"
  with pytest.raises(InputError, match=rf"has {name}='other', a key that version {version} has removed") as caught:
    from_json(json.dumps(older))
  assert "\n" not in str(caught.value)


def test_a_section_can_be_replaced_and_is_checked_again(toy):
  built = build(toy)
  assert dataclasses.replace(built.data, too_long="drop").too_long == "drop"
  with pytest.raises(InputError, match=r"data\.row_length=1; must be a whole number of at least 2"):
    dataclasses.replace(built.data, row_length=1)


def test_a_misspelt_key_is_answered_with_the_right_one(toy):
  toy.optimizer.learning_rat = 1e-3
  with pytest.raises(InputError, match=r"no key optimizer\.learning_rat; did you mean optimizer\.learning_rate\?"):
    build(toy)


def test_a_missing_key_is_named(toy):
  del toy.loss.flag
  with pytest.raises(InputError, match=r"misses loss\.flag"):
    build(toy)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("model.path", "somewhere", "not both or neither"),
    ("tokenizer.fix", "", "must be two texts"),
    ("task.name", "gsm8k", "give --config.data.path"),
    ("task.min_size", 99, "above task.max_size"),
    ("data.row_length", 1, "at least 2"),
    ("data.num_records", 10**7, "would make 10,000,000 problems"),
    ("data.row_length", 2**20 + 1, "at most 1,048,576"),
    ("data.template", "xml", "must be one of 'plain', 'chat'"),
    ("mistakes.share", 1.5, "between 0 and 1"),
    ("mistakes.source", "mined", "reads records that mine wrote"),
    ("mistakes.mined", 1.5, "between 0 and 1"),
    ("mistakes.mined", 0.3, "give --config.mistakes.mined_path=FILE.jsonl, or --config.rounds=R"),
    ("mistakes.mined_path", "m.jsonl", "would be read by nobody with mistakes.mined=0"),
    ("mine.samples", 0, "at least 1"),
    ("loss.end", 0.0, "never learns to stop"),
    ("optimizer.warmup_steps", 10**9, "is above train.steps"),
    ("optimizer.b2", 1.0, "must be below 1"),
    ("optimizer.name", "adamax", "must be one of 'adamw', 'adafactor', 'lion', 'muon', 'schedule_free'"),
    ("optimizer.name", "schedule_free", r"set optimizer.final_share=1 \(now 0.05\)"),
    ("optimizer.rounding", "stochastic", "is for precision.params='bfloat16', and these are float32"),
    ("train.steps", 0, "at least 1"),
    ("loss.repeat", -0.5, "at least 0"),
    ("mesh.fsdp", 0, "at most one -1"),
    ("precision.compute", "float8", "must be one of"),
    ("evaluate.temperature", 0.0, "is greedy, which is measured in any case"),
    ("evaluate.max_false_alarms", 0.5, "must be below 0.5"),
    ("evaluate.votes", 0, "at least 1"),
    ("evaluate.max_size", -1, "at least 0"),
    ("evaluate.rivals", ("beams",), "must be a tuple of some of 'redraw', 'temperature', 'beam', 'trigger', 'state'"),
    ("evaluate.rivals", ("beam", "beam"), "each once"),
    ("evaluate.temperatures", (0.0,), "different numbers of at least 0.001"),
    ("evaluate.temperatures", (), "different numbers of at least 0.001"),
    ("evaluate.swapped_path", "r.json", "would be read by nobody without 'swapped' in evaluate.rivals"),
  ],
)
def test_a_bad_value_is_refused_in_one_line(toy, key, value, message):
  section, name = key.split(".")
  with toy.ignore_type():
    toy[section][name] = value
  with pytest.raises(InputError, match=message) as caught:
    build(toy)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "params", "message"),
  [
    ({"name": "adafactor", "moments": "bfloat16"}, "float32", "sums over rows and columns"),
    ({"name": "schedule_free", "final_share": 1.0, "ema": 0.9}, "float32", r"optimizer.ema=0 \(now 0.9\)"),
    ({"name": "schedule_free", "final_share": 1.0, "b1": 0.0}, "float32", r"optimizer.b1 above 0 \(now 0\)"),
    ({"name": "schedule_free", "final_share": 1.0}, "bfloat16", "'schedule_free' averages weights, which precision"),
    ({"ema": 0.9}, "bfloat16", r"optimizer.ema=0.9 averages weights, which precision.params='bfloat16' would round"),
  ],
)
def test_options_of_the_optimizer_that_do_not_go_together_are_refused(toy, changes, params, message):
  toy.optimizer.update(changes)
  toy.precision.params = params
  with pytest.raises(InputError, match=message) as caught:
    build(toy)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("rounds", "changes", "message"),
  [
    (2, {}, "rounds=2 with mistakes.mined=0 would mine records that nobody reads"),
    (2, {"mined": 0.5, "mined_path": "m.jsonl"}, "leave mistakes.mined_path='m.jsonl' empty, or set rounds=0"),
    (10**6, {"mined": 0.5}, "is above train.steps"),
    (-1, {}, "must be a whole number of at least 0"),
    (1.5, {}, "must be a whole number of at least 0"),
  ],
)
def test_rounds_that_make_no_sense_are_refused_in_one_line(toy, rounds, changes, message):
  with toy.ignore_type():
    toy.rounds = rounds
  toy.mistakes.update(changes)
  with pytest.raises(InputError, match=message) as caught:
    build(toy)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("task", "message"),
  [
    ({}, "must be above task.max_size=3, or 0 for none"),
    ({"name": "gsm8k", "min_size": 0, "max_size": 0, "modulus": 0}, "have no sizes; set it to 0"),
  ],
)
def test_problems_larger_than_those_trained_on_must_be_larger_and_have_sizes(toy, task, message):
  toy.evaluate.max_size = 3
  toy.task.update(task)
  toy.data.path = "r.jsonl"
  with pytest.raises(InputError, match=message) as caught:
    build(toy)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rounds": 0}, r"samples before each part of the steps; give the number of parts, --config\.rounds=R"),
    ({"mine.samples": 1}, r"mine\.samples=1; give at least 2"),
    ({"mistakes.mined": 0.5}, r"mixes in mined records; set mistakes\.mined=0"),
    ({"loss.repeat": 1.0}, r"set loss\.repeat=0"),
    ({"optimizer.ema": 0.9}, r"set optimizer\.ema=0"),
    ({"train.vocabulary": "used"}, r"train\.vocabulary='used' is not made"),
  ],
)
def test_a_policy_gradient_needs_rounds_groups_and_weights_that_sample(toy, changes, message):
  toy.update_from_flattened_dict({"rounds": 2, "policy.method": "gradient"})
  assert build(toy).policy.is_on
  toy.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=message) as caught:
    build(toy)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rounds": 0}, r"samples before each part of the steps"),
    ({"mistakes.unit": "sentence"}, r"mistakes\.unit='sentence', tokenizer\.special=True; set them to 'line' and True"),
    ({"loss.reason": -1.0}, r"loss\.reason=-1, loss\.correction=1; give none below 0 and one above 0"),
    ({"loss.flag": 0.0, "loss.reason": 0.0, "loss.correction": 0.0}, r"give none below 0 and one above 0"),
    ({"optimizer.ema": 0.9}, r"set optimizer\.ema=0"),
  ],
)
def test_a_distillation_needs_lines_a_flag_token_and_weights_of_a_mean(toy, changes, message):
  toy.update_from_flattened_dict({"rounds": 2, "policy.method": "distill", "mine.samples": 1})
  assert build(toy).negatives == 1
  toy.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=message) as caught:
    build(toy)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "hint", ["{wrong}", "{wrong}{right}{other}", "{wrong}{right", "{wrong!r}{right}", "{0}{right}"]
)
def test_a_hint_without_the_steps_or_with_other_fields_is_refused(toy, hint):
  toy.mistakes.update(hinted=0.5, hint=hint)
  with pytest.raises(InputError, match=r"mistakes\.hint=.*must be a text with \{wrong\}, \{right\}"):
    build(toy)


def test_hints_need_whole_records_and_a_checker(toy):
  toy.mistakes.update(hinted=0.5, mined=0.5, mined_path="m.jsonl")
  build(toy)
  toy.mistakes.view = "silent"
  with pytest.raises(InputError, match=r"mistakes\.view='silent' drops some of these"):
    build(toy)


def test_rounds_need_a_checker(toy):
  toy.rounds, toy.mistakes.mined = 2, 0.5
  toy.task = {"name": "records", "min_size": 0, "max_size": 0, "modulus": 0}
  toy.data.path = "r.jsonl"
  with pytest.raises(InputError, match="'records' has no checker"):
    build(toy)


def test_all_weights_zero_is_refused(toy):
  toy.loss = dict.fromkeys(("prompt", "text", "mistake", "flag", "reason", "correction", "repeat"), 0.0) | {"end": 1.0}
  with pytest.raises(InputError, match="nothing would be trained"):
    build(toy)


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ((-1, 1, 1, 1), (8, 1, 1, 1)),
    ((2, -1, 1, 2), (2, 2, 1, 2)),
    ((1, 4, 1, 2), (1, 4, 1, 2)),
    ((1, 2, -1, 1), (1, 2, 4, 1)),
  ],
)
def test_a_mesh_fills_in_what_remains(sizes, shape):
  data, fsdp, sequence, tensor = sizes
  assert config.MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor).shape(8) == shape


@pytest.mark.parametrize(
  ("sizes", "needed"),
  [
    ((3, -1, 1, 1), "mesh.data must be one of 1, 2, 4, 8"),
    ((1, -1, 3, 1), "mesh.sequence must be one of 1, 2, 4, 8"),
    ((1, 2, 3, 1), "mesh.sequence must be one of 1, 2, 4, 8"),
    ((4, -1, 4, 1), "make the sizes but the -1 multiply to a number that divides 8"),
    ((2, 2, 1, 1), "make the sizes multiply to 8, or set one to -1"),
  ],
)
def test_a_mesh_that_does_not_divide_the_devices_is_refused_by_the_axis(sizes, needed):
  data, fsdp, sequence, tensor = sizes
  with pytest.raises(InputError, match=f"does not divide 8 devices; {needed}$"):
    config.MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor).shape(8)
