import json

import pretended
import pytest

from insec_jax.command import InputError
from insec_jax.files.reading import folder_to_read
from insec_jax.pages.brief import brief
from insec_jax.pages.runs import Arm, read_run
from insec_jax.pages.side_effects import FOLDER, Score, in_rows, read_scores


def write(workdir, time, value, *, task="gsm8k"):
  """A file as lm-eval 0.4 writes it."""
  values = {"alias": task, "sample_len": 40, "exact_match,strict-match": value, "exact_match_stderr,strict-match": 0.1}
  values |= {"acc,none": 0.5, "acc_stderr,none": "N/A"}
  found = {"results": {task: values}, "n-samples": {task: {"original": 50, "effective": 40}}, "configs": {}}
  path = workdir / FOLDER / "__models__insec" / f"results_2026-11-{time}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(found))
  return path


def test_the_newest_score_of_each_task_is_read_with_its_filter_and_no_error_bars(tmp_path):
  assert read_scores(tmp_path) == {}
  write(tmp_path, "02T10", 0.25)
  write(tmp_path, "01T10", 0.75)
  write(tmp_path, "01T11", 1.0, task="arc")
  assert read_scores(tmp_path) == {
    "gsm8k: exact_match (strict-match)": Score(0.25, 40),
    "gsm8k: acc": Score(0.5, 40),
    "arc: exact_match (strict-match)": Score(1.0, 40),
    "arc: acc": Score(0.5, 40),
  }


def test_scores_of_a_workdir_in_a_bucket_are_fetched_and_no_samples_beside_them(tmp_path, bucket):
  write(tmp_path, "02T10", 0.25)
  write(tmp_path, "01T11", 1.0, task="arc").with_name("samples_arc_2026.jsonl").write_text("{}")
  bucket.upload(tmp_path, "runs/a")
  workdir = folder_to_read(f"{bucket.url}/runs/a", "--workdirs")
  assert read_scores(workdir) == read_scores(tmp_path) != {}
  assert not [path for path in workdir.rglob("*") if path.name.startswith("samples")]
  bucket.write(f"runs/a/{FOLDER}/m/results_2026-12.json", b"{}")
  with pytest.raises(InputError, match=rf"^{bucket.url}/runs/a/{FOLDER}/m/results_2026-12.json has no results"):
    read_scores(workdir)


def test_a_row_is_the_mean_over_seeds_and_a_dash_for_an_arm_without_it():
  arms = [[{"a: acc": Score(0.25, 40)}, {"a: acc": Score(0.75, 40)}, {}], [{"b: acc": Score(0.5, 0)}]]
  assert in_rows(arms, "-") == [("a: acc", "0.500 (n 80)", "-"), ("b: acc", "-", "0.500")]


def test_the_table_of_a_run_ends_with_its_scores_of_lm_eval(tmp_path):
  config = pretended.config(steps=10, share=0.5, num=16)
  folder = pretended.write_workdir(tmp_path / "insec", config)
  pretended.write_results(folder, config, skill=0.8)
  write(folder, "02T10", 0.25)
  rows = brief([Arm("insec", (read_run(folder, "insec"),))])
  assert rows[-2:] == [("gsm8k: exact_match (strict-match)", "0.250 (n 40)"), ("gsm8k: acc", "0.500 (n 40)")]


@pytest.mark.parametrize("content", ["{}", '{"results": 3}', '{"results": {"a": {"acc,none": 1}}}'])
def test_a_file_that_lm_eval_did_not_write_is_named(tmp_path, content):
  write(tmp_path, "02T10", 0.25).write_text(content)
  with pytest.raises(InputError, match=r"results_2026-11-02T10\.json has no results of lm-eval"):
    read_scores(tmp_path)
