"""Prompt files are read whole, or refused with file and line; output files are whole, or as they were."""

import pytest
from datakit import write_lines

from insec_jax.command import InputError
from insec_jax.generation.prompts import read_prompts


def test_prompts_are_read_in_order_with_what_stands_beside_them(tmp_path):
  path = write_lines(tmp_path / "p.jsonl", [{"prompt": "2+3=", "id": 7}, {"tokens": [3, 1]}, {"prompt": "é\n"}])
  read = read_prompts(path)
  assert [(one.text, one.tokens, one.carried) for one in read] == [
    ("2+3=", None, {"id": 7}),
    (None, [3, 1], {}),
    ("é\n", None, {}),
  ]
  assert [one.where for one in read] == [f"{path}:{k}" for k in (1, 2, 3)]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "not JSON at"),
    ("", "the line is empty"),
    (b'{"prompt": "\xff"}', "is not UTF-8"),
    ("[1]", "holds list"),
    ({"promt": "2"}, 'keys are promt; needed is either "prompt" or "tokens"'),
    ({}, "keys are none"),
    ({"prompt": "2", "tokens": [2]}, "either"),
    ({"prompt": 3}, '"prompt" is 3; must be text'),
    ({"tokens": []}, '"tokens" is []; must be a list of token ids'),
    ({"tokens": [1, "2"]}, "must be a list of token ids"),
    ({"tokens": [True]}, "must be a list of token ids"),
    ({"tokens": [-1]}, '"tokens" holds -1, which no vocabulary has'),
    ({"tokens": [2**31]}, '"tokens" holds 2147483648'),
    ('{"tokens": [1e400]}', "too large"),
    ('{"tokens": [%s]}' % ("1" * 5000), "digits"),
    ('{"prompt": %s' % ("[" * 100_000), "nested too deeply"),
    ('{"prompt": "2", "id": NaN}', "NaN is no JSON number"),
    ('{"prompt": "2", "id": "\\ud800"}', "half a surrogate pair"),
    ({"prompt": "2", "text": "3"}, "the key 'text' is one that the output uses; rename it"),
  ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, message):
  path = write_lines(tmp_path / "p.jsonl", [{"prompt": "2+3="}, line])
  with pytest.raises(InputError) as error:
    read_prompts(path)
  assert message in str(error.value)
  assert str(error.value).startswith(f"{path}:2: ")
  assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_empty_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"--prompts: cannot read .*p\.jsonl"):
    read_prompts(str(tmp_path / "p.jsonl"))
  with pytest.raises(InputError, match="is empty"):
    read_prompts(write_lines(tmp_path / "p.jsonl", []))
