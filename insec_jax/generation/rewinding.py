"""Rewinding while decoding: entries of the cache that nothing reads any more, and positions that go back.

The rule is that of method/rewind.py, and numbers of tokens are their slots. Entries are not moved: all rows write the
same slot (decoding.py), so a row that has dropped some has no use for their places until it is filled again.

Letters as in decoding.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from insec_jax.method import rewind


class Rewound(NamedTuple):
  """State of the rule in each row, and whether the token at each place is hidden from all that follow."""

  state: rewind.State
  hidden_BS: jax.Array


def kinds_for(kind_V: np.ndarray | None, vocab_size: int) -> np.ndarray | None:
  """Return the kinds of a tokenizer's tokens for a model whose vocabulary is larger; None stays None."""
  return None if kind_V is None else np.pad(kind_V, (0, vocab_size - len(kind_V)), constant_values=rewind.WORD)


def of_prompts(token_RP: np.ndarray, start_R: np.ndarray, kind_V: np.ndarray | None) -> rewind.Visibility | None:
  """Return what later tokens read of prompts that begin at slot `start_R` of P; None without kinds: all of it."""
  if kind_V is None:
    return None
  is_token_RP = np.arange(token_RP.shape[1])[None] >= start_R[:, None]
  return rewind.visibility(np.where(is_token_RP, kind_V[token_RP], rewind.PADDING))


def begin(rows: int, slots: int) -> Rewound:
  """Return the state of rows that hold nothing."""
  return Rewound(rewind.begin(jnp, rows), jnp.full((rows, slots), False))


def after_prompts(seen: rewind.Visibility, slot) -> Rewound:
  """Return the state, [R] and [R, P], after prompts that end before `slot`."""
  P = seen.until_BT.shape[1]
  state = seen.state
  moved = state._replace(step=state.step + (slot - P), mistake=state.mistake + (slot - P))
  return Rewound(moved, seen.until_BT < P)


def advance(rewound: Rewound, kind_B, slot) -> Rewound:
  """Return the state after one more token, at `slot`, in each row."""
  S = rewound.hidden_BS.shape[1]
  state, (first_B, stop_B) = rewind.advance(jnp, rewound.state, kind_B, jnp.full(kind_B.shape, slot))
  slot_1S = (slot - (slot - jnp.arange(S)) % S)[None]  # the newest at each place, this token's included
  hides_BS = (slot_1S >= first_B[:, None]) & (slot_1S < stop_B[:, None])
  # A place that is written anew is not hidden: `decoding.resize` fills new places with copies of others.
  return Rewound(state, (rewound.hidden_BS & (slot_1S != slot)) | hides_BS)
