"""generate with a server: the file of the weights, going on after an end in the middle, and what is refused."""

import json
import math
import shutil
import socket

import datakit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datakit import write_lines
from modelkit import run, save_model
from served import serving

from insec_jax.command import InputError
from insec_jax.generation import engine, http_json, loading
from insec_jax.generation.loading import load_model
from insec_jax.generation.server import Server
from insec_jax.model import build, llama
from insec_jax.model.markings import MARKERS

# Chunks of eight prompts; failures last for a short time only.
PROGRAM = """
from insec_jax import generate
from insec_jax.generation import http_json, server
generate.PROMPTS_PER_CHUNK = 8
http_json.FIRST_DELAY_SECONDS, http_json.PATIENCE_SECONDS, server.START_SECONDS = 0.01, 0.1, 0.1
"""
KEY = "sk-0123456789"
NUM = 24  # prompts
MARKED = {"flag": "<|spare_0|>", "fix": "<|spare_1|>", "special": True, "unit": "line", "template": "plain"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with models and prompts; `weightless` lacks its weights."""
  folder = tmp_path_factory.mktemp("served")
  tokenizer = datakit.bpe_tokenizer()
  save_model(folder / "whole", tokenizer)
  (folder / "whole" / MARKERS).write_text(json.dumps(MARKED))
  shutil.copytree(folder / "whole", folder / "weightless", ignore=shutil.ignore_patterns("*.safetensors*"))
  shutil.copytree(folder / "weightless", folder / "rewinding")
  (folder / "rewinding" / MARKERS).write_text(json.dumps(MARKED | {"rewind": True}))
  write_lines(folder / "p.jsonl", [{"prompt": f"{number} + 30 = "} for number in range(NUM)])
  return folder


def model_of(folder):
  """The log p after every token, by one full pass."""
  config = loading.hf.read_config(folder)
  params = build.init(config, jax.random.key(0), "float32")  # as save_model's

  @jax.jit
  def full_pass(token_1T):
    model = llama.Llama(config, "float32", "none")
    position_1T = jnp.arange(token_1T.shape[1])[None]
    stream_1TD = model.apply({"params": params}, token_1T, position_1T, jnp.ones_like(token_1T))
    return jax.nn.log_softmax(llama.logits(params, config, stream_1TD))

  def logprobs_after(token_T):
    token_1T = np.zeros((1, 128), np.int32)
    token_1T[0, : len(token_T)] = token_T
    return np.asarray(full_pass(token_1T))[0, : len(token_T)]

  return logprobs_after


def closed_port() -> int:
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    return unused.getsockname()[1]


class Breaking:
  """Faults of a server that breaks after some draws, and is mended when a program begins again."""

  def __init__(self, parts):
    self.parts, self.draws_left, self.chunks_then = parts, 12, ""

  def __call__(self, _, body):
    if body is None and self.draws_left == 0:  # the list of models: a program begins
      self.chunks_then, self.draws_left = self.parts.read_text(), math.inf
    if body is None or "seed" not in body:
      return None
    self.draws_left = max(0, self.draws_left - 1)
    return None if self.draws_left else "500"


@pytest.fixture(scope="module")
def done(home):
  """(exit code, stdout, stderr) of each run, in order; the server breaks in the middle of one of them."""
  breaking = Breaking(home / "broken.jsonl.parts" / "0.jsonl")
  with serving(model_of(home / "whole"), datakit.bpe_tokenizer(), faults=breaking) as server:
    right = ["--model=weightless", f"--server={server.url}/v1", "--prompts=p.jsonl", "--max_tokens=8", "--logprobs"]
    broken = [*right, "--output=broken.jsonl", "--temperature=1", "--server_requests=2"]
    lines = {
      "here": [*right[2:], "--model=whole", "--output=here.jsonl"],
      "there": [*right, "--output=there.jsonl"],
      "flag_above": [*right, "--flag_above=1", "--output=bad.jsonl"],
      "mesh": [*right, "--mesh=data:1", "--output=bad.jsonl"],
      "rewind": [*right, "--model=rewinding", "--output=bad.jsonl"],
      "no server": [*right[2:], "--model=whole", "--server_model=toy", "--output=bad.jsonl"],
      "no such model": [*right, "--server_model=other", "--output=bad.jsonl"],
      "nobody": [*right[:1], f"--server=http://127.0.0.1:{closed_port()}", *right[2:], "--output=bad.jsonl"],
      "broken": broken,
      "resumed": broken,
      "drawn": [*broken, "--output=drawn.jsonl"],
    }
    found = dict(zip(lines, runs(home, *lines.values()), strict=True))
  return found | {"keys": set(server.keys), "parts": breaking.chunks_then}


def runs(home, *lines: list[str]) -> list[tuple[int, str, str]]:
  """As modelkit.run, with the settings of PROGRAM and a key."""
  return run("generate", *lines, folder=home, before=PROGRAM, **{http_json.API_KEY: KEY})


def written(home, name) -> list[dict]:
  return [json.loads(line) for line in (home / name).read_text().splitlines()]


def test_the_file_is_that_of_the_weights_which_are_not_read(home, done):
  for name in ("here", "there"):
    assert done[name][0] == 0, done[name][2]
  for ours, theirs in zip(written(home, "here.jsonl"), written(home, "there.jsonl"), strict=True):
    np.testing.assert_allclose(theirs.pop("logprobs"), ours.pop("logprobs"), atol=1e-4)
    assert theirs == ours


def test_a_run_whose_server_breaks_ends_in_one_line_and_goes_on_where_it_was(home, done):
  code, out, err = done["broken"]
  assert (code, out) == (1, ""), err
  assert "500 Internal Server Error" in err.splitlines()[-1]
  assert err.splitlines()[-1].startswith("error: http://127.0.0.1:")
  assert '"model": "toy on a server, ' in done["parts"].splitlines()[0]
  num_chunks = len(done["parts"].splitlines()) - 1
  assert num_chunks == 1  # of 8 prompts; it broke at the twelfth
  code, _, err = done["resumed"]
  assert code == 0, err
  assert f"{num_chunks} of {NUM // 8} chunks were made before" in err
  assert done["drawn"][0] == 0
  assert (home / "broken.jsonl").read_bytes() == (home / "drawn.jsonl").read_bytes()
  assert (home / "broken.jsonl").read_bytes() != (home / "there.jsonl").read_bytes()


REFUSED = {
  "flag_above": (2, "--flag_above=1.0: a server cannot force flags"),
  "mesh": (2, "--mesh=data:1 places weights on devices"),
  "rewind": (2, "rewinding was trained with mistakes.rewind, and a server lets what follows a correction read"),
  "no server": (2, "--server_model is for a server"),
  "no such model": (2, "has no model 'other'; it has toy"),
  "nobody": (1, "Connection refused, after"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_ends_in_one_line_and_writes_nothing(home, done, name):
  code, out, err = done[name]
  assert (code, out) == (REFUSED[name][0], "")
  assert REFUSED[name][1] in err
  assert err.splitlines()[-1].startswith("error: ")
  assert not list(home.glob("bad*"))


def test_the_key_of_the_environment_is_sent_and_never_told(done):
  assert done["keys"] == {f"Bearer {KEY}"}
  assert not any(KEY in text for _, *texts in (done[name] for name in (*REFUSED, "broken", "there")) for text in texts)


def test_a_folder_without_weights_opens_as_the_whole_one_but_for_them(home):
  whole = load_model(str(home / "whole"))
  here = load_model(str(home / "weightless"), weights=False)
  assert (here.params, here.mesh) == (None, None)
  assert here[3:][2:] == whole[3:][2:]
  assert here.config == whole.config
  with pytest.raises(InputError):
    load_model(str(home / "weightless"))


def test_markers_that_the_served_vocabulary_has_no_rows_for_are_refused(home):
  plain = load_model(str(home / "weightless"), weights=False)._replace(markers=None, flag_id=None)
  served = plain._replace(server=Server(http_json.Client("http://127.0.0.1"), "toy"))
  spare = datakit.config(tokenizer__flag="<|spare_0|>", tokenizer__fix="<|spare_1|>")
  assert loading.with_markers(served, spare, "here").flag_id is not None
  with pytest.raises(InputError, match="the markers of the config need"):
    loading.with_markers(served, datakit.config(tokenizer__flag="<err>", tokenizer__fix="<ok>"), "here")


def test_what_is_stored_of_a_model_says_whether_it_rewinds(home):
  whole = load_model(str(home / "whole"))
  assert engine.identity(whole._replace(rewind=True)) != engine.identity(whole)


def test_what_is_stored_of_a_server_names_its_model_and_how_it_is_read(home):
  served = load_model(str(home / "weightless"), weights=False)._replace(
    server=Server(http_json.Client("http://127.0.0.1:1"), "toy")
  )
  other_url = served._replace(server=Server(http_json.Client("http://127.0.0.1:2"), "toy"))
  assert engine.identity(served) == engine.identity(other_url)
  renamed = served._replace(server=Server(http_json.Client("http://127.0.0.1:1"), "toy2"))
  names = {engine.identity(model) for model in (served, renamed, served._replace(template="chat"))}
  assert len(names) == 3
