import dataclasses
import json

import pretended
import pytest

from insec_jax.pages.brief import brief
from insec_jax.pages.runs import Arm, read_run


@pytest.fixture
def arm(tmp_path):
  folder = pretended.write_workdir(tmp_path / "insec", pretended.config(steps=10, share=0.5, num=16))
  pretended.write_results(folder, pretended.config(steps=10, share=0.5, num=16), skill=0.8)
  return Arm("insec", (read_run(folder, "insec"),))


def test_each_row_is_the_rate_of_results_json_that_its_words_name(arm):
  rates = arm.runs[0].results["rates"]
  for number, (source, metric) in enumerate(
    (("injected", "detection"), ("injected", "correction"), ("solutions", "false_alarms"), ("own", "detection"))
  ):
    rates[source][metric] = {"rate": number / 10, "k": 0, "n": 40 + number, "low": 0.0, "high": 1.0}
  rates["solutions, flags banned"]["accuracy_t2"]["rate"] = 0.125
  rows = brief([arm])
  cells = dict(rows[1:])
  assert rows[0] == ("", "insec")
  assert cells["tokens trained on"] == "4,000"
  assert cells["injected mistakes that it flags"] == "0.0 % (n 40)"
  assert rows[3] == ("- and then corrects, of those flagged", "10.0 % (n 41)")
  assert cells["right steps that it flags (false alarms)"] == "20.0 % (n 42)"
  assert cells["- its own mistakes that it flags"] == "30.0 % (n 43)"
  assert cells["right answers when it may not flag"].startswith("12.5 % ")


def test_the_table_has_at_most_ten_rows(arm):
  assert len(brief([arm])) <= 10


def test_a_rate_of_nothing_is_a_dash_and_an_arm_without_results_is_left_out(arm):
  arm.runs[0].results["rates"]["own"]["correction"] = {"rate": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0}
  bare = Arm("base", (dataclasses.replace(arm.runs[0], name="base", results={}),))
  rows = brief([bare, arm])
  assert rows[0] == ("", "insec")
  assert rows[7] == ("- and then corrects, of those flagged", "–")


def test_rates_of_several_seeds_are_their_mean(arm):
  second = dataclasses.replace(arm.runs[0], results=json.loads(json.dumps(arm.runs[0].results)))
  for run, rate in zip((arm.runs[0], second), (0.25, 0.75), strict=True):
    run.results["rates"]["injected"]["detection"] |= {"rate": rate, "k": int(16 * rate), "n": 16}
  assert brief([Arm("insec", (arm.runs[0], second))])[2][1] == "50.0 % (n 32)"
