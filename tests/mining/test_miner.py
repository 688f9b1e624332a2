"""What a scripted model does wrong, and nothing else, becomes a record that training takes."""

import collections
import dataclasses
import itertools
import json
import math
import re

import datakit
import numpy as np
import pytest
from miningkit import CLASSES, CONFIG, MARKERS, PROBLEMS, TASK, TOKENIZER, right, said, wrong

from insec_jax.command import InputError
from insec_jax.data import records, tokens, vocabulary
from insec_jax.files.chunks import ChunkStore
from insec_jax.generation.confidence import ConfidenceTrigger, Surprisal
from insec_jax.method import tasks
from insec_jax.method.roles import FLAG, MISTAKE, PROMPT
from insec_jax.method.transcript import Piece, clean
from insec_jax.mining import miner
from insec_jax.mining.miner import Miner, chunk_store, mine_chunks
from insec_jax.mining.records import corrected_transcript, join


class Scripted:
  """In place of a TextGenerator: says what `answer` makes of a problem and of the number of the sample.

  What it says after steps that stand is what `go_on` makes of the problem and of these.
  """

  tokenizer, flag_id, confidence_ids = TOKENIZER, TOKENIZER.convert_tokens_to_ids(MARKERS.flag), ()

  def __init__(self, answer, problems=PROBLEMS, go_on=None):
    self._answer, self._go_on, self.asked = answer, go_on, []
    self._problems = {problem.prompt: problem for problem in problems}

  def encode(self, prompt):
    return prompt, ()

  def begin(self, prompts, steps, **_):
    return list(zip(prompts, steps, strict=True))

  def has_room(self, *_):
    return True

  def write(self, begins, **options):
    self.asked.append(options)
    seen = collections.Counter()
    written = []
    for prompt, steps in begins:
      problem = self._problems[prompt]
      written.append(said(self._go_on(problem, steps) if steps else self._answer(problem, seen[prompt])))
      seen[prompt] += 1
    return written


def mined(answer, tmp_path, *, config=CONFIG, num_processes=1, problems=PROBLEMS, go_on=None):
  """(what was found, the records written)."""
  output = str(tmp_path / "mined.jsonl")
  found = []
  for process in range(num_processes):
    miner = Miner(Scripted(answer, problems, go_on), tasks.get(config.task), config, seed=0, weights="w")
    parts = ChunkStore(output, miner.header)
    assert mine_chunks(miner, parts, process=process, num_processes=num_processes)
    found.append(parts.join(miner.num_chunks, lambda chunks: join(chunks, output, right=config.mine.right, seed=0)))
  (joined,) = [one for one in found if one is not None]
  with open(output) as lines:
    return joined, [json.loads(line) for line in lines]


def read_back(path):
  return [record.content for record in records.read(str(path / "mined.jsonl"), limit=0)]


def whole(record):
  """(role, text) of the pieces of a record, a wrong line as one."""
  joined = []
  for piece in record["pieces"]:
    if joined and piece["role"] == joined[-1][0] == "mistake":
      joined[-1] = ("mistake", joined[-1][1] + piece["text"])
    else:
      joined.append((piece["role"], piece["text"]))
  return joined


def lucky_answer(problem):
  """A right solution with a step in it that reads a value too early, yet has every number right."""
  for k in range(1, len(problem.steps)):
    early = (problem.steps[k], *problem.steps[:k], *problem.steps[k + 1 :])
    if TASK.check(problem, (), early[0]).kind == "unverified":
      return "".join(early)
  return None


def test_a_lucky_step_is_no_mistake_and_its_solution_no_contrast(tmp_path):
  unverified = [problem for problem in PROBLEMS if lucky_answer(problem)]
  assert len(unverified) > 5
  found, written = mined(lambda problem, _: lucky_answer(problem) or right(problem), tmp_path)
  assert not [record for record in written if record["meta"]["classes"]]
  assert found.counts["wrong"] == 0
  assert found.counts["unverified"] > 5


SEVERAL = dataclasses.replace(CONFIG, mistakes=dataclasses.replace(CONFIG.mistakes, max_per_solution=3))
LONG = next(problem for problem in PROBLEMS if len(problem.steps) == 4)


def repeats(problem, steps):
  """It says the step that was put right once more: a wrong step each time, as long as one is missing."""
  return steps[-1] + "".join(problem.steps[len(steps) :])


def test_mistakes_after_a_correction_are_corrected_in_the_same_record(tmp_path):
  found, written = mined(lambda problem, _: "ab\n" + right(problem), tmp_path, config=SEVERAL, go_on=repeats)
  of_long = next(record for record in written if record["pieces"][0]["text"] == LONG.prompt)
  first, second, third, fourth = LONG.steps
  assert [(role, text) for role, text in whole(of_long) if role not in ("flag", "reason")] == [
    ("prompt", LONG.prompt),
    ("mistake", "ab\n"),
    ("correction", first),
    ("mistake", first),
    ("correction", second),
    ("mistake", second),
    ("correction", third),
    ("text", fourth),
  ]
  assert of_long["meta"]["classes"] == ["malformed", "repeat", "repeat"]
  assert of_long["meta"]["places"] == [0, 1, 2]
  assert found.samples == {"malformed": 48}
  assert found.mistakes["malformed"] == found.mistake_records == len(written)
  assert found.mistakes["repeat"] == sum(len(record["meta"]["classes"]) - 1 for record in written)
  contents = [(content, "it") for content in read_back(tmp_path)]
  assert len(tokens.tokenize_all(contents, TOKENIZER, SEVERAL)) == len(written)


@pytest.mark.parametrize(("most", "num"), [(1, 1), (2, 2), (4, 4)])
def test_a_record_has_at_most_as_many_mistakes_as_the_config_allows(tmp_path, most, num):
  config = dataclasses.replace(CONFIG, mistakes=dataclasses.replace(CONFIG.mistakes, max_per_solution=most))
  _, written = mined(lambda problem, _: "ab\n" + right(problem), tmp_path, config=config, go_on=repeats)
  assert max(len(record["meta"]["classes"]) for record in written) == num


@pytest.mark.parametrize(
  ("said_next", "own"),
  [
    (lambda problem, steps: "".join(problem.steps[len(steps) :]), 3),  # right to the end
    (lambda problem, steps: problem.steps[len(steps)], 0),  # it stops too early
  ],
)
def test_steps_after_a_correction_stay_only_if_they_end_in_a_mistake_or_the_answer(said_next, own):
  asked = []

  def go_on(problem, steps):
    asked.append(steps)
    return said_next(problem, steps)

  miner = Miner(Scripted(lambda problem, _: "ab\n" + right(problem), go_on=go_on), TASK, SEVERAL, seed=0, weights="w")
  (sample,) = miner._samples([LONG], 0)
  assert asked == [LONG.steps[:1]]
  assert len(sample.steps) == (1 + own if own else 0)
  assert [one.step for one in sample.mistakes] == ["ab\n"]
  record = corrected_transcript(LONG, sample, TASK, MARKERS, reason="none", unit="line")
  assert clean(record) == LONG.prompt + right(LONG)


def test_every_turn_draws_anew():
  miner = Miner(Scripted(lambda problem, _: "ab\n" + right(problem), go_on=repeats), TASK, SEVERAL, seed=0, weights="w")
  miner.chunk(0)
  assert len({one["seed"] for one in miner._writer.asked}) == len(miner._writer.asked) == 3


def test_the_model_does_not_go_on_from_what_it_could_not_read():
  miner = Miner(Scripted(lambda problem, _: "ab\n" + right(problem), go_on=repeats), TASK, SEVERAL, seed=0, weights="w")
  miner._special = re.compile(re.escape(LONG.steps[1]))
  (sample,) = miner._samples([LONG], 0)
  assert len(sample.mistakes) == 2  # the second correction has what it cannot read
  miner._writer.confidence_ids = (1,)
  assert [miner._readable(steps) for steps in (("ab\n", "c\n"), ("ab",), ("a\nb\n",))] == [True, False, False]


def test_what_does_not_fit_behind_a_correction_is_left_to_the_task(tmp_path, monkeypatch):
  monkeypatch.setattr(Scripted, "has_room", lambda *_: False)
  _, written = mined(lambda problem, _: "ab\n" + right(problem), tmp_path, config=SEVERAL, go_on=repeats)
  assert {len(record["meta"]["classes"]) for record in written} == {1}


def test_a_wrong_step_after_the_answer_has_no_correction_and_is_left_out(tmp_path):
  found, written = mined(lambda problem, _: right(problem) + problem.steps[0], tmp_path)
  assert written == []
  assert found.samples == {"repeat": 48}
  assert found.left_out == {miner.NO_CORRECTION: 48}


def test_every_class_is_counted_as_it_was_made_and_training_takes_every_record(tmp_path):
  found, written = mined(wrong, tmp_path)
  want = collections.Counter(CLASSES[number % 5] for number in range(24) for _ in range(2))
  assert found.samples == dict(want)
  assert found.counts["problems"] == found.counts["problems with a mistake"] == 24
  assert found.counts["samples"] == found.counts["wrong"] == 48
  assert collections.Counter(error for record in written for error in record["meta"]["classes"]) == found.mistakes
  contents = read_back(tmp_path)
  assert len(tokens.tokenize_all([(content, "it") for content in contents], TOKENIZER, CONFIG)) == len(written)
  for record, content in zip(written, contents, strict=True):
    meta = record["meta"]
    problem = PROBLEMS[meta["problem"]]
    assert content[0] == Piece(PROMPT, problem.prompt)
    text = wrong(problem, meta["sample"])
    bad = next(text for role, text in whole(record) if role == "mistake")
    assert text.splitlines(keepends=True)[meta["places"][0]] == bad
  assert all(word in str(found) for word in ("48 samples of 24 problems", "early", "100.0%", "0 records of right"))


def test_the_same_record_is_written_once(tmp_path):
  found, written = mined(lambda problem, _: wrong(problem, 0), tmp_path)
  assert found.counts["wrong"] == 48
  assert len(written) == found.mistake_records == sum(found.mistakes.values()) == 24


@pytest.mark.parametrize(("per_mistake", "num"), [(0.0, 0), (0.5, 4), (2.0, 16), (9.0, 16)])
def test_right_solutions_are_kept_without_a_flag_as_many_per_mistake_as_asked_for(tmp_path, per_mistake, num):
  config = dataclasses.replace(CONFIG, mine=dataclasses.replace(CONFIG.mine, right=per_mistake))
  found, written = mined(
    lambda problem, _: wrong(problem, 0) if PROBLEMS.index(problem) < 8 else right(problem), tmp_path, config=config
  )
  are_right = [content for content in read_back(tmp_path) if len(content) == 2]
  assert (len(are_right), found.right_records, found.distinct_right) == (num, num, 16)
  assert len(written) == 8 + num
  assert found.mistake_records == 8
  assert {content[0].text + content[1].text for content in are_right} <= {
    problem.prompt + "".join(problem.steps) for problem in PROBLEMS[8:]
  }


@pytest.mark.parametrize(("mined_fraction", "share", "num"), [(1.0, 1.0, 32), (1.0, 0.0, 0), (0.5, 1.0, 0)])
def test_right_solutions_get_injected_mistakes_where_nothing_else_brings_them(tmp_path, mined_fraction, share, num):
  config = dataclasses.replace(
    CONFIG, mistakes=dataclasses.replace(CONFIG.mistakes, mined=mined_fraction, mined_path="mined.jsonl", share=share)
  )
  found, written = mined(
    lambda problem, _: wrong(problem, 0) if PROBLEMS.index(problem) < 8 else right(problem), tmp_path, config=config
  )
  injected = [record for record in written if record["meta"]["injected"]]
  assert (len(injected), found.injected_records) == (num, num)
  assert found.mistake_records == 8
  assert sum(found.mistakes.values()) == 8
  assert found.injected == sum(len(record["meta"]["classes"]) for record in injected)
  for record in injected:
    problem = PROBLEMS[record["meta"]["problem"]]
    wrong_steps = [text for role, text in whole(record) if role == "mistake"]
    assert wrong_steps
    for place, error, step in zip(record["meta"]["places"], record["meta"]["classes"], wrong_steps, strict=True):
      assert TASK.check(problem, problem.steps[:place], step).error == error
    left = [piece["text"] for piece in record["pieces"] if piece["role"] in ("text", "correction")]
    assert "".join(left) == "".join(problem.steps)
  assert (f"{num} records of right solutions with {found.injected} injected" in str(found)) == bool(num)


def test_arms_of_another_mistake_share_use_one_mined_file_unless_mine_injects():
  def of_share(share, mined):
    return miner.mined_by(
      dataclasses.replace(
        CONFIG, mistakes=dataclasses.replace(CONFIG.mistakes, share=share, mined=mined, mined_path="mined.jsonl")
      )
    )

  assert of_share(0.2, 0.5) == of_share(0.4, 0.6)
  assert of_share(0.2, 1.0) != of_share(0.4, 1.0)


def test_what_training_would_refuse_is_left_out_counted_and_told(tmp_path):
  short = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, row_length=70))
  found, written = mined(wrong, tmp_path, config=short)
  num = found.left_out[miner.REFUSED]
  assert 0 < num < 48
  assert 0 < len(written) <= 48 - num
  assert "do not fit in a row of data.row_length=70" in str(found)
  contents = [(content, "it") for content in read_back(tmp_path)]
  assert len(tokens.tokenize_all(contents, TOKENIZER, short)) == len(written)


def test_a_special_token_in_a_step_is_left_out(tmp_path):
  found, written = mined(lambda problem, _: problem.steps[0] + "a<|unknown|>\n", tmp_path)
  assert found.left_out == {miner.SPECIAL: 48}
  assert written == []


def test_flags_are_banned_and_every_chunk_draws_anew(tmp_path, monkeypatch):
  monkeypatch.setattr("insec_jax.mining.miner.SAMPLES_PER_CHUNK", 8)
  miner = Miner(Scripted(right), TASK, CONFIG, seed=0, weights="w")
  assert miner.num_chunks == 6
  parts = ChunkStore(str(tmp_path / "x"), miner.header)
  mine_chunks(miner, parts, process=0, num_processes=1)
  asked = miner._writer.asked
  assert {one["flag_bias"] for one in asked} == {-math.inf}
  assert {one["temperature"] for one in asked} == {1.0}
  assert len({one["seed"] for one in asked}) == 6


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_any_number_of_processes_writes_the_same_file(tmp_path, monkeypatch, num_processes):
  monkeypatch.setattr(miner, "SAMPLES_PER_CHUNK", 8)
  monkeypatch.setattr(Scripted, "write", drawn)
  (tmp_path / "alone").mkdir()
  (tmp_path / "shared").mkdir()
  alone = mined(wrong, tmp_path / "alone")
  assert mined(wrong, tmp_path / "shared", num_processes=num_processes) == alone
  assert len(alone[1]) > 10


def drawn(self, prompts, *, seed, **_):
  """Mistakes that hang on the seed and on the place in the chunk, as a sampler's do."""
  return [said(wrong(self._problems[prompt], seed + place)) for place, (prompt, _) in enumerate(prompts)]


def test_what_was_mined_before_a_kill_is_not_mined_again(tmp_path, monkeypatch):
  monkeypatch.setattr(miner, "SAMPLES_PER_CHUNK", 8)
  first, second = (Miner(Scripted(wrong), TASK, CONFIG, seed=0, weights="w") for _ in range(2))
  parts = ChunkStore(str(tmp_path / "mined.jsonl"), first.header)
  left = iter(range(4))
  assert not mine_chunks(first, parts, process=0, num_processes=1, stopped=lambda: next(left, None) is None)
  assert mine_chunks(second, parts, process=0, num_processes=1)
  assert [len(miner._writer.asked) for miner in (first, second)] == [4, 2]


def test_other_weights_or_another_config_do_not_go_on_from_parts(tmp_path):
  miner = Miner(Scripted(wrong), TASK, CONFIG, seed=0, weights="w")
  parts = ChunkStore(str(tmp_path / "mined.jsonl"), miner.header)
  parts.append(0, miner.chunk(0), process=0)
  fewer = dataclasses.replace(CONFIG, mine=dataclasses.replace(CONFIG.mine, right=0.5))
  for other, name in (
    (Miner(Scripted(wrong), TASK, fewer, seed=0, weights="w"), "mine.right"),
    (Miner(Scripted(wrong), TASK, CONFIG, seed=0, weights="v"), "the weights"),
  ):
    with pytest.raises(InputError, match=f"was begun with {name}="):
      ChunkStore(str(tmp_path / "mined.jsonl"), other.header).read()


def test_keys_on_which_no_sample_depends_may_change_while_mining(tmp_path):
  free = {"data.cache": "rows", "train.minutes": 3.0, "log.to": ["wandb"], "mesh.data": 4, "evaluate.votes": 9}
  held = {
    "evaluate.max_tokens",
    "evaluate.batch_size",
    "mine.samples",
    "data.path",
    "task.name",
    "mistakes.unit",
    "seed",
  }
  miner = Miner(Scripted(wrong), TASK, CONFIG, seed=0, weights="w")
  assert held <= miner.header.keys()
  assert not free.keys() & miner.header.keys()
  output = str(tmp_path / "mined.jsonl")
  ChunkStore(output, miner.header | free).append(0, miner.chunk(0), process=0)  # as earlier versions wrote it
  assert chunk_store(output, miner).read().keys() == {0}


def test_parts_of_a_version_with_removed_keys_go_on(tmp_path):
  miner = Miner(Scripted(wrong), TASK, CONFIG, seed=0, weights="w")
  for temperature, goes_on in ((1.0, True), (0.5, False)):
    store = ChunkStore(str(tmp_path / f"{temperature}.jsonl"), miner.header | {"mine.temperature": temperature})
    store.append(0, miner.chunk(0), process=0)
    now = chunk_store(str(tmp_path / f"{temperature}.jsonl"), miner)
    if goes_on:
      assert now.read().keys() == {0}
    else:
      with pytest.raises(InputError, match=r"was begun with mine\.temperature=0\.5"):
        now.read()


def test_with_flags_the_model_may_flag_and_its_alarms_and_gaps_are_kept(tmp_path):
  flags = dataclasses.replace(CONFIG, mine=dataclasses.replace(CONFIG.mine, flags=True, right=0.0))

  def answer(problem, sample):
    number, (first, *rest) = PROBLEMS.index(problem), problem.steps
    texts = [
      first + MARKERS.flag + MARKERS.fix + "".join(problem.steps),  # a false alarm
      "".join((first, *rest[:-1])),  # the last step forgotten
      "ab\n" + MARKERS.flag + MARKERS.fix + "cd\n",  # a failed correction
      right(problem),
    ]
    return right(problem) if sample == 0 else texts[number % 4]

  script = Scripted(answer)
  found = Miner(script, TASK, flags, seed=0, weights="w").chunk(0)
  assert [one["flag_bias"] for one in script.asked] == [0.0]
  assert found["counts"]["false alarm"] == found["counts"]["forgotten"] == found["counts"]["wrong"] == 6
  joined, written = mined(answer, tmp_path, config=flags)
  # A solution that was right the first time is kept where the same text puts a false alarm right.
  assert (joined.flagged_records, joined.mistake_records, joined.right_records) == (12, 6, 0)
  kinds = collections.Counter(record["meta"].get("kind", "wrong") for record in written)
  assert kinds == {"false alarm": 6, "forgotten": 6, "wrong": 6}
  assert all(word in str(joined) for word in ("false alarm samples", "12 records with a false alarm or a forgotten"))


SURE = datakit.config(
  task__name="graph",
  task__min_size=3,
  task__max_size=4,
  task__modulus=10,
  data__path="",
  data__num_records=1,
  data__num_heldout=0,
  mistakes__source="injected",
  mistakes__mined=1.0,
  mistakes__mined_path="mined.jsonl",
  mistakes__share=0.0,
  mistakes__max_per_solution=2,
  tokenizer__confidence=(0.5, 2.0),
  evaluate__batch_size=4,
  mine__num_problems=24,
  mine__samples=2,
)


class Reading(Scripted):
  """Scripted, and sure of a right line, unsure of a wrong one; a line is what ends, as the real one has it."""

  def read(self, prompts, steps, *, batch_size):
    assert batch_size == SURE.evaluate.batch_size
    found = []
    for prompt, some in zip(prompts, steps, strict=True):
      problem = self._problems[prompt]
      kinds = [TASK.check(problem, tuple(some[:k]), step).kind for k, step in enumerate(some) if step.endswith("\n")]
      found.append((prompt, [Surprisal(0.1, 0.1) if kind == "right" else Surprisal(0.7, 3.0) for kind in kinds]))
    return found

  def watch(self):
    """As a writer whose model has no tokens of confidence yet."""
    return ConfidenceTrigger((), None)


def test_with_confidence_each_step_is_followed_by_how_sure_the_model_was_of_it(monkeypatch, tmp_path):
  monkeypatch.setitem(globals(), "Scripted", Reading)
  _, written = mined(
    lambda problem, sample: right(problem) if sample else wrong(problem, 0), tmp_path, config=SURE, go_on=repeats
  )
  assert 2 in [len(record["meta"]["classes"]) for record in written]
  seen = collections.Counter()
  for record in written:
    pieces = whole(record)
    for (role, text), (after, name) in itertools.pairwise(pieces):
      if role in ("text", "mistake", "correction"):
        assert text.count("\n") == 1
        assert (after, name) == ("flag", "<|sure_2|>" if role == "mistake" else "<|sure_0|>")
        seen[role] += 1
  assert min(seen["text"], seen["mistake"], seen["correction"]) > 5
  example = tokens.tokenize(read_back(tmp_path)[0], "", vocabulary.open_tokenizer(SURE).tokenizer, SURE)
  ids = vocabulary.open_tokenizer(SURE).confidence_ids
  assert not example.weight_T[np.isin(example.token_T, ids)].any()
  assert np.isin(example.token_T, ids).any()


def test_the_first_token_of_a_step_is_told_apart_where_it_has_edges(monkeypatch, tmp_path):
  monkeypatch.setitem(globals(), "Scripted", Reading)
  config = dataclasses.replace(SURE, tokenizer=dataclasses.replace(SURE.tokenizer, confidence_first=(0.5, 1.0, 2.0)))
  _, written = mined(lambda problem, _: wrong(problem, 1), tmp_path, config=config, go_on=repeats)
  after = {
    (role, name)
    for record in written
    for (role, _), (_, name) in itertools.pairwise(whole(record))
    if role in ("text", "mistake", "correction")
  }
  # Of 3 x 4 bins: 3.0 is above both edges of the others, 0.7 above one of the first; 0.1 above none.
  assert after == {("text", "<|sure_0|>"), ("correction", "<|sure_0|>"), ("mistake", "<|sure_9|>")}


def test_injected_mistakes_are_followed_by_how_sure_the_model_is_of_them_too(monkeypatch, tmp_path):
  monkeypatch.setitem(globals(), "Scripted", Reading)
  config = dataclasses.replace(SURE, mistakes=dataclasses.replace(SURE.mistakes, share=1.0))
  found, written = mined(lambda problem, _: right(problem), tmp_path, config=config)
  assert found.injected >= found.injected_records == len(written) > 20
  for record in written:
    pieces = whole(record)
    after = [name for (role, _), (_, name) in itertools.pairwise(pieces) if role == "mistake"]
    assert set(after) == {"<|sure_2|>"}


def test_a_wrong_step_that_is_no_line_gets_no_confidence_and_no_record(monkeypatch, tmp_path):
  monkeypatch.setitem(globals(), "Scripted", Reading)
  found, written = mined(lambda problem, _: problem.steps[0] + "ab", tmp_path, config=SURE, go_on=repeats)
  assert not written
  assert found.left_out == {miner.NO_LINE: 48}


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"mistakes__mined": 0.5}, "mistakes.mined=0.5 leaves others"),
    ({"data__num_heldout": 3}, "data.num_heldout=3 transcripts would be made without"),
    ({"mistakes__unit": "sentence"}, "mistakes.unit='sentence'; set mistakes.unit='line'"),
  ],
)
def test_confidence_must_be_known_of_every_transcript(changes, words):
  values = {
    "task__name": "graph",
    "task__min_size": 3,
    "task__max_size": 4,
    "task__modulus": 10,
    "data__path": "",
    "data__num_records": 1,
    "data__num_heldout": 0,
    "mistakes__source": "injected",
    "mistakes__mined": 1.0,
    "mistakes__mined_path": "mined.jsonl",
    "tokenizer__confidence": (0.5,),
  }
  with pytest.raises(InputError, match=words.replace("(", r"\(")):
    datakit.config(**values | changes)


def test_the_end_of_a_wrong_line_is_trained_and_no_other_token_of_it(tmp_path):
  config = dataclasses.replace(SURE, tokenizer=dataclasses.replace(SURE.tokenizer, confidence=()))
  _, written = mined(lambda problem, _: wrong(problem, 1), tmp_path, config=config, go_on=repeats)
  assert len(written) > 10
  tokenizer = vocabulary.open_tokenizer(config).tokenizer
  for content in read_back(tmp_path):
    example = tokens.tokenize(content, "", tokenizer, config)
    wrong_T = example.role_T == MISTAKE
    is_end_T = example.token_T == tokenizer.convert_tokens_to_ids("\n")
    assert wrong_T.sum() > 3
    assert (example.weight_T[wrong_T] == is_end_T[wrong_T]).all()
    assert (example.role_T[1:][(wrong_T & is_end_T)[:-1]] == FLAG).all()
