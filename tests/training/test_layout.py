"""Workdirs: a run resumes only in the folder of its own experiment."""

import dataclasses

import datakit
import pytest

from insec_jax.command import InputError
from insec_jax.training import layout


def test_a_run_that_mines_as_it_goes_keeps_the_length_of_what_it_mines(tmp_path):
  rounds, longer = (
    datakit.config(
      rounds=2,
      train__steps=2,
      mistakes__mined=0.5,
      task__name="graph",
      task__min_size=1,
      task__max_size=2,
      task__modulus=10,
      data__num_records=1,
      evaluate__max_tokens=num,
    )
    for num in (8, 9)
  )
  (tmp_path / layout.CONFIG).write_text(rounds.to_json())
  with pytest.raises(InputError, match=r"another config: evaluate\.max_tokens=9"):
    layout.check_workdir(tmp_path, longer)


def test_a_run_on_what_was_mined_before_keeps_how_it_was_mined(tmp_path):
  one, other = (
    datakit.config(mistakes__mined=0.5, mistakes__mined_path="mined.jsonl", mine__samples=num) for num in (2, 3)
  )
  (tmp_path / layout.CONFIG).write_text(one.to_json())
  with pytest.raises(InputError, match=r"another config: mine\.samples=3 \(was 2\)"):
    layout.check_workdir(tmp_path, other)


@pytest.mark.parametrize(
  ("was", "now", "shown"),
  [
    ({"num_problems": 8}, {"num_problems": 9}, r"evaluate.num_problems=9 \(was 8\)"),
    ({"num_problems": 99}, {"num_problems": 500}, r"evaluate.num_problems=500 \(was 99\)"),
    ({"num_problems": 100}, {"num_problems": 500}, None),  # a point has 100 in both
    ({"max_tokens": 8}, {"max_tokens": 9}, r"evaluate.max_tokens=9 \(was 8\)"),
    ({"batch_size": 8}, {"batch_size": 9}, r"evaluate.batch_size=9 \(was 8\)"),
    ({"votes": 3}, {"votes": 4}, None),
  ],
)
def test_a_run_with_a_learning_curve_keeps_what_its_points_depend_on(tmp_path, was, now, shown):
  made, given = (
    dataclasses.replace(
      datakit.config(
        train__steps=4,
        task__name="graph",
        task__min_size=1,
        task__max_size=2,
        task__modulus=10,
        data__num_records=1,
        **{f"evaluate__{key}": value for key, value in values.items()},
      ),
      train=dataclasses.replace(datakit.config().train, steps=4, curve_points=2),
    )
    for values in (was, now)
  )
  (tmp_path / layout.CONFIG).write_text(made.to_json())
  if shown is None:
    layout.check_workdir(tmp_path, given)
    return
  with pytest.raises(InputError, match=f"another config: {shown};"):
    layout.check_workdir(tmp_path, given)


@pytest.mark.parametrize(
  ("change", "shown"),
  [
    ({"train__steps": 3}, "train.steps=3 (was 2)"),
    ({"seed__": 1}, "seed=1 (was 0)"),
    ({"optimizer__b1": 0.8, "loss__text": 2.0}, "loss.text=2.0 (was 1.0), optimizer.b1=0.8 (was 0.9)"),
    ({"optimizer__name": "lion"}, "optimizer.name='lion' (was 'adamw')"),
    (
      {"mesh__fsdp": 8, "mesh__sequence": 2, "train__log_every": 7, "data__accumulation": 2, "evaluate__votes": 7},
      None,
    ),
    ({"evaluate__max_tokens": 9, "mine__samples": 3}, None),
  ],
)
def test_a_workdir_of_another_config_is_refused_with_every_key_that_matters(tmp_path, change, shown):
  (tmp_path / layout.CONFIG).write_text(datakit.config().to_json())
  given = dataclasses.replace(datakit.config(), seed=1) if "seed__" in change else datakit.config(**change)
  if shown is None:
    layout.check_workdir(tmp_path, given)
    return
  with pytest.raises(InputError) as error:
    layout.check_workdir(tmp_path, given)
  assert f"another config: {shown};" in str(error.value)


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match="is a file"):
    layout.check_workdir(tmp_path / "file", datakit.config())
  layout.check_workdir(tmp_path, datakit.config())
  (tmp_path / "metrics.jsonl").touch()
  with pytest.raises(InputError, match=r"holds metrics.jsonl but no config.json"):
    layout.check_workdir(tmp_path, datakit.config())
  (tmp_path / layout.CONFIG).write_text('{"model_type": "llama"}')
  with pytest.raises(InputError, match="not the config of a run"):
    layout.check_workdir(tmp_path, datakit.config())


def test_keys_on_which_no_result_depends_are_free_unless_the_work_holds_them():
  keys = layout.flat(datakit.config()).keys()
  free = {key for key in keys if layout.is_free(key, ("evaluate.",))}
  assert {"data.cache", "data.rows_per_device", "train.minutes", "log.to"} <= free
  read = ("task.", "data.", "mistakes.", "tokenizer.", "evaluate.")  # by evaluate
  assert {key for key in free if key.startswith(read)} == {"data.cache", "data.rows_per_device", "data.accumulation"}
  assert layout.is_free("evaluate.votes", layout.MINING)
  assert not layout.is_free("evaluate.max_tokens", layout.MINING)
