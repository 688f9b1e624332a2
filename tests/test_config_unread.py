"""A value that nothing reads because of another one is refused; workdirs that were made with one still open."""

import dataclasses
import json

import datakit
import pytest

from insec_jax import config, config_unread
from insec_jax.command import InputError
from insec_jax.config_build import build, from_json
from insec_jax.training import layout

RECORDS = {"task.name": "records", "data.path": "r.jsonl"}
GRAPH = {
  "task.name": "graph",
  "task.min_size": 1,
  "task.max_size": 2,
  "task.modulus": 10,
  "data.num_records": 10,
  "data.path": "",
}
RECORDED = {"mistakes.source": "recorded", "data.path": "r.jsonl"}
# key, a value, what leaves it unread, what makes something read it
CASES = [
  ("task.max_size", 2, RECORDS, GRAPH),
  ("task.modulus", 10, RECORDS, GRAPH),
  ("data.path", "r.jsonl", GRAPH, {"mistakes.source": "recorded"}),
  ("data.fields", "question=q", GRAPH, RECORDED),
  ("train.marker_rows", False, GRAPH, {"train.top_layers": 1}),
  ("lora.alpha", 16.0, GRAPH, {"lora.rank": 4}),
  ("lora.matrices", ("wq",), GRAPH, {"lora.rank": 4}),
  ("lora.marker_rows", False, GRAPH | {"train.top_layers": 1}, {"train.top_layers": 0, "lora.rank": 4}),
  ("policy.temperature", 0.5, GRAPH, {"policy.method": "gradient", "rounds": 2}),
  ("policy.kl", 1.0, GRAPH | {"policy.method": "distill", "rounds": 2}, {"policy.method": "gradient"}),
  ("policy.contrast", 1.0, GRAPH | {"policy.method": "gradient", "rounds": 2}, {"policy.method": "distill"}),
  ("mistakes.hint", "{wrong} {right}", GRAPH, {"mistakes.hinted": 0.5}),
  ("log.project", "mine", GRAPH, {"log.to": ("wandb",)}),
  ("evaluate.temperatures", (0.5,), GRAPH | {"evaluate.rivals": ("beam",)}, {"evaluate.rivals": ("temperature",)}),
]


def given(*changes):
  values = config.defaults()
  values.model.size = {"vocab_size": 64}
  for change in changes:
    values.update_from_flattened_dict(change)
  return values


@pytest.mark.parametrize(("key", "value", "unread", "read"), CASES)
def test_a_value_that_nothing_reads_is_refused_until_something_reads_it(key, value, unread, read):
  build(given(unread | ({key: config.defaults().to_dict()[key.split(".")[0]][key.split(".")[1]]})))
  with pytest.raises(InputError, match=rf"^{key}=.* would be read by nobody: .*; .*, or leave it at ") as caught:
    build(given(unread, {key: value}))
  assert "\n" not in str(caught.value)
  build(given(unread, read, {key: value}))


def test_each_key_that_may_be_unread_is_one_of_the_config_and_has_a_case():
  for key in config_unread.unread(build(given(RECORDS))) | config_unread.unread(build(given(GRAPH))):
    assert key in layout.flat(build(given(GRAPH)))
  tried = {key for key, *_ in CASES}
  assert all(tried & set(group.keys) for group in config_unread.DEPENDENT)


def test_a_workdir_with_a_value_that_nothing_read_opens_and_goes_on_without_it(tmp_path):
  made = datakit.config(train__marker_rows=False)
  assert from_json(made.to_json()) == made
  (tmp_path / layout.CONFIG).write_text(made.to_json())
  layout.check_workdir(tmp_path, datakit.config())
  (tmp_path / layout.CONFIG).write_text(datakit.config().to_json())
  layout.check_files(tmp_path, {"step": 1, "files": {}, "config": json.loads(made.to_json())})
  lora = dataclasses.replace(made, train=dataclasses.replace(made.train, top_layers=1))
  (tmp_path / layout.CONFIG).write_text(lora.to_json())
  with pytest.raises(InputError, match=r"train.marker_rows=True \(was False\)"):
    layout.check_workdir(tmp_path, dataclasses.replace(lora, train=datakit.config(train__top_layers=1).train))
