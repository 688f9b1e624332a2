import dataclasses

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.data.packing import fill
from insec_jax.data.tokens import Example


def example(token_T, role_T=None, weight_T=None, negative_T=None):
  num = len(token_T)
  return Example(
    np.array(token_T, np.int32),
    np.array([1] * num if role_T is None else role_T, np.int8),
    np.array([1.0] * num if weight_T is None else weight_T, np.float32),
    np.array([-1] * num if negative_T is None else negative_T, np.int32),
    "here",
    0,
    1,
  )


def pack(examples, row_length):
  """Rows in memory."""
  lengths = [len(example.token_T) for example in examples]
  return fill(lengths, examples, row_length, lambda _, shape, value, dtype: np.full(shape, value, dtype))


def random_examples(num=200, longest=30):
  rng = np.random.default_rng(0)
  return [example(rng.integers(1, 100, length)) for length in rng.integers(1, longest + 1, num)]


def test_a_row_is_the_one_in_the_docstring():
  rows = pack([example([7, 8, 9], [0, 1, 5], [0, 1, 1], [-1, -1, 8]), example([5, 6], [0, 1], [0, 1])], 6)
  np.testing.assert_array_equal(rows.token_BT, [[7, 8, 9, 5, 6, 0]])
  np.testing.assert_array_equal(rows.segment_BT, [[1, 1, 1, 2, 2, 0]])
  np.testing.assert_array_equal(rows.position_BT, [[0, 1, 2, 0, 1, 0]])
  np.testing.assert_array_equal(rows.role_BT, [[0, 1, 5, 0, 1, -1]])
  np.testing.assert_array_equal(rows.weight_BT, [[0, 1, 1, 0, 1, 0]])
  np.testing.assert_array_equal(rows.negative_BT, [[-1, -1, 8, -1, -1, -1]])
  assert rows.until_BT is None
  assert [value_BT.dtype for value_BT in rows.fields().values()] == [
    np.int32,
    np.int32,
    np.int32,
    np.int8,
    np.float32,
    np.int32,
  ]


def test_every_example_stands_whole_in_exactly_one_row():
  examples = random_examples()
  rows = pack(examples, 32)
  found = [
    tuple(token_T[segment_T == segment].tolist())
    for token_T, segment_T in zip(rows.token_BT, rows.segment_BT, strict=True)
    for segment in range(1, segment_T.max() + 1)
  ]
  assert sorted(found) == sorted(tuple(some.token_T.tolist()) for some in examples)


def test_each_example_goes_to_the_first_row_that_has_room():
  free, expected = [], []
  examples = random_examples()
  for some in examples:
    row = next((row for row, room in enumerate(free) if room >= len(some.token_T)), len(free))
    if row == len(free):
      free.append(32)
    free[row] -= len(some.token_T)
    expected.append(row)
  rows = pack(
    [dataclasses.replace(some, token_T=np.full_like(some.token_T, number + 1)) for number, some in enumerate(examples)],
    32,
  )
  found = [int(np.flatnonzero((rows.token_BT == number + 1).any(1))[0]) for number in range(len(examples))]
  assert found == expected


def test_an_example_longer_than_a_row_is_refused():
  with pytest.raises(InputError, match="9 tokens does not fit in a row of 8"):
    pack([example(range(9))], 8)


def test_no_examples_give_no_rows():
  assert pack([], 8).token_BT.shape == (0, 8)


def test_row_minus_one_is_padding_only():
  rows = pack([example([7, 8, 9])], 3)
  taken = rows.of(np.array([[0, -1]]))
  assert taken["token"].shape == (1, 2, 3)
  np.testing.assert_array_equal(taken["token"][0], [[7, 8, 9], [0, 0, 0]])
  assert (taken["role"][0, 1] == -1).all()
  assert not taken["segment"][0, 1].any()
  assert not taken["weight"][0, 1].any()
  assert (taken["negative"][0, 1] == -1).all()
