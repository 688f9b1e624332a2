"""Calls of an engine are kept and shared: none is computed again after a kill, and every process gets the same."""

import concurrent.futures
import json
import math

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.generation import journal
from insec_jax.generation.journal import journaled
from insec_jax.generation.sampler import SampledTokens

HEADER = {"the weights": "ab"}
PROMPTS = [np.arange(length, dtype=np.int32) for length in (3, 1, 4, 1, 5, 9, 2)]


class KilledError(Exception):
  """Stands for the death of the process."""


class Engine:
  """Writes tokens that depend on the prompt, the seed and the prompt's number; dies after so many calls."""

  config = "the config"

  def __init__(self, calls=math.inf):
    self.left, self.asked, self.reserved = calls, [], []

  def reserve(self, max_tokens):
    self.reserved.append(max_tokens)

  def generate(self, prompts, *, seed, max_tokens, first=0, progress=None):  # noqa: ARG002, as Sampler's
    self._call("generate", prompts)
    written = []
    for index, prompt in enumerate(prompts):
      rng = np.random.default_rng((seed, first + index, *prompt))
      token_T = rng.integers(0, 99, 1 + first + index).astype(np.int32)
      logprob_T, flag_T = rng.normal(size=(2, len(token_T))).astype(np.float32)
      written.append(
        SampledTokens(token_T, logprob_T, "stop" if (first + index) % 2 else "length", flag_T, flag_T + np.inf)
      )
      if progress is not None:
        progress(index + 1, sum(len(one.tokens) for one in written))
    return written

  def logprobs(self, texts, *, batch_size):  # noqa: ARG002, as Sampler's
    self._call("logprobs", texts)
    return [np.sqrt(text, dtype=np.float32) for text in texts]

  def _call(self, name, prompts):
    if self.left <= 0:
      raise KilledError
    self.left -= 1
    self.asked.append((name, len(prompts)))


def work(engine):
  """What a program asks for; a later call depends on the result of an earlier one."""
  one = engine.generate(PROMPTS, max_tokens=9, seed=1)
  two = engine.logprobs([sampled.tokens for sampled in one], batch_size=4)
  three = engine.generate([one[2].tokens], max_tokens=9, seed=2)
  return (
    one,
    two,
    three,
    engine.generate(PROMPTS[:2], max_tokens=9, seed=3, first=5),
    engine.generate([], max_tokens=9, seed=4),
  )


def run(output, engine, process=0, num_processes=1, header=HEADER, do=work):
  """(what the work gave, whether this process wrote the output)."""
  kept = journaled(engine, str(output), header, process=process, num_processes=num_processes)
  return do(kept), kept.join(lambda: output.write_text("written"))


def test_a_process_reserves_room_for_calls_that_it_need_not_compute(tmp_path):
  engines = [Engine(), Engine()]
  for engine in engines:  # the second finds all of it
    kept = journaled(engine, str(tmp_path / "o"), HEADER, process=0, num_processes=1)
    work(kept)
  assert engines[0].asked
  assert not engines[1].asked
  assert engines[0].reserved == engines[1].reserved == [9] * 4


def run_all(output, engines, **options):
  """What `run` gave in each of the processes, which run at once."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    runs = [
      pool.submit(run, output, engine, process=process, num_processes=len(engines), **options)
      for process, engine in enumerate(engines)
    ]
  return [one.result() for one in runs]


def plain(value):
  """The value with every array as its dtype and bytes."""
  if isinstance(value, np.ndarray):
    return value.dtype.str, value.tobytes()
  if isinstance(value, SampledTokens):
    return plain([vars(value)[name] for name in ("tokens", "logprobs", "finish", "flag_logprobs", "margins")])
  return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture
def output(tmp_path):
  return tmp_path / "results.json"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
  monkeypatch.setattr(journal, "PROMPTS_PER_CHUNK", 3)
  monkeypatch.setattr(journal, "POLL_SECONDS", 0.01)


def test_a_call_in_chunks_gives_to_the_bit_what_the_undivided_call_gives(output):
  engine = Engine()
  found, wrote = run(output, engine)
  assert plain(found) == plain(work(Engine()))
  assert wrote
  assert [num for _, num in engine.asked] == [2, 2, 3] * 2 + [1, 2]  # at most three at a time


def test_one_process_leaves_no_parts(output):
  run(output, Engine())
  assert [path.name for path in output.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("calls", range(8))
def test_killed_and_run_again_it_computes_only_what_was_not_finished(output, calls, capsys):
  with pytest.raises(KilledError):
    run(output, Engine(calls))
  assert not output.exists()
  engine = Engine()
  found, wrote = run(output, engine)
  assert plain(found) == plain(work(Engine()))
  assert wrote
  assert len(engine.asked) == 8 - calls
  assert (f"{calls} chunks were made before" in capsys.readouterr().err) == bool(calls)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_each_call_and_all_get_the_same(output, num_processes):
  engines = [Engine() for _ in range(num_processes)]
  runs = run_all(output, engines)
  expected = plain(work(Engine()))
  assert [plain(found) for found, _ in runs] == [expected] * num_processes
  assert sorted(wrote for _, wrote in runs) == [False] * (num_processes - 1) + [True]
  for place in range(num_processes - 1):  # each has a part of the calls that can be divided
    assert sum(num for name, num in engines[place].asked if name == "logprobs") >= 7 // num_processes
  assert sum(num for engine in engines for _, num in engine.asked) == 7 + 7 + 1 + 2
  assert [path.name for path in output.parent.iterdir()] == ["results.json"]


def test_a_process_killed_among_others_goes_on_while_they_wait(output, monkeypatch, capsys):
  monkeypatch.setattr(journal, "PATIENCE_SECONDS", 0.05)
  engines = [Engine(), Engine(2), Engine()]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(run, output, engines[0], 0, 2)
    with pytest.raises(KilledError):
      run(output, engines[1], 1, 2)
    with pytest.raises(concurrent.futures.TimeoutError):
      first.result(0.3)
    found, _ = run(output, engines[2], 1, 2)
    assert plain(found) == plain(first.result()[0]) == plain(work(Engine()))
  assert sum(num for engine in engines for _, num in engine.asked) == 7 + 7 + 1 + 2
  err = capsys.readouterr().err
  assert "waits for process 1 of 2; if it does not run, start it again: the same command with its --process_id" in err
  assert output.exists()


def test_the_last_process_writes_also_when_it_was_killed_before_it_could(output):
  def die():
    raise KilledError

  kept = journaled(Engine(), str(output), HEADER, process=0, num_processes=1)
  found = work(kept)
  with pytest.raises(KilledError):
    kept.join(die)
  engine = Engine()
  again, wrote = run(output, engine)
  assert plain(again) == plain(found)
  assert wrote
  assert not engine.asked


@pytest.mark.parametrize(
  "other",
  [
    lambda engine: engine.generate(PROMPTS, max_tokens=9, seed=2),
    lambda engine: engine.generate(PROMPTS, max_tokens=9, seed=1, first=1),
    lambda engine: engine.generate([*PROMPTS[:6], PROMPTS[6] + 1], max_tokens=9, seed=1),
    lambda engine: engine.generate([*PROMPTS[:1], *PROMPTS[2:4], PROMPTS[1], *PROMPTS[4:]], max_tokens=9, seed=1),
    lambda engine: engine.logprobs(PROMPTS, batch_size=1),
  ],
)
def test_a_call_of_other_prompts_or_options_than_before_is_refused(output, other):
  with pytest.raises(KilledError):
    run(output, Engine(3))
  with pytest.raises(InputError, match=r"call 1 of process 0 was of other prompts or options than here"):
    run(output, Engine(), do=other)


def test_a_run_with_another_header_or_number_of_processes_is_refused(output):
  with pytest.raises(KilledError):
    run(output, Engine(3))
  with pytest.raises(InputError, match=r"was begun with the weights='ab', now it is 'cd'"):
    run(output, Engine(), header={"the weights": "cd"})
  with pytest.raises(InputError, match=r"was begun with number of processes=1, now it is 2"):
    run(output, Engine(), num_processes=2)


def test_damaged_parts_are_refused_and_a_line_cut_short_is_made_again(output):
  with pytest.raises(KilledError):
    run(output, Engine(3))
  file = output.with_name("results.json.parts") / "0.jsonl"
  whole = file.read_bytes()
  packed = json.loads(whole.splitlines()[2])["value"]["results"]["tokens"]["bytes"].encode()
  file.write_bytes(whole.replace(packed, packed[1:] + packed[:1]))
  with pytest.raises(InputError, match=r"0\.jsonl:3 is not what was written"):
    run(output, Engine())
  file.write_bytes(whole[:-20])
  engine = Engine()
  assert plain(run(output, engine)[0]) == plain(work(Engine()))
  assert len(engine.asked) == 8 - 2


@pytest.mark.parametrize("num_processes", [1, 2])
def test_progress_counts_to_all_prompts_once(output, num_processes):
  seen = []
  run_all(
    output,
    [Engine()] * num_processes,
    do=lambda kept: kept.generate(PROMPTS, max_tokens=9, seed=1, progress=report(seen)),
  )
  ends = [tokens for done, tokens in seen if done == 7]
  assert len(ends) == num_processes
  assert sum(ends) == sum(range(1, 8))  # each counts the tokens that it wrote


def report(seen):
  return lambda done, tokens: seen.append((done, tokens))


def test_the_time_before_a_kill_is_told(output):
  with pytest.raises(KilledError):
    run(output, Engine(3))
  file = output.with_name("results.json.parts") / "0.jsonl"
  spent = [json.loads(line)["value"]["seconds"] for line in file.read_bytes().splitlines()[1:]]
  kept = journaled(Engine(), str(output), HEADER, process=0, num_processes=1)
  assert kept.seconds_before == sum(spent)
  assert kept.config == "the config"
