"""The contract of generate: lines in, lines out, and one clear line when the input is wrong."""

import json
import shutil
import signal

import datakit
import numpy as np
import pytest
from datakit import write_lines
from killkit import ended, start
from modelkit import run, save_model

from insec_jax.data import tokens, vocabulary
from insec_jax.generation.loading import load_model
from insec_jax.generation.sampler import Sampler
from insec_jax.method.transcript import Markers, clean_text
from insec_jax.model.markings import MARKERS

PROMPTS = [
  {"prompt": "12 + 30 = "},
  {"prompt": "He adds 12 and 30. What is the sum? \n" * 4, "id": 5},
  {"tokens": [1, 9, 12]},
]
BAD = {  # arguments (after those that are right) and what the line says
  "prompts missing": (["--prompts=none.jsonl"], "--prompts: cannot read none.jsonl"),
  "line not JSON": (["--prompts=bad.jsonl"], "bad.jsonl:2: not JSON"),
  "neither key": (["--prompts=neither.jsonl"], 'neither.jsonl:1: keys are text; needed is either "prompt" or "tokens"'),
  "id out of range": (["--prompts=range.jsonl"], "range.jsonl:1: token id 9999 is not in the vocabulary; ids go"),
  "prompt too long": (
    ["--prompts=long.jsonl"],
    "long.jsonl:1: 250 tokens and max_tokens=16 more do not fit in the model's 256 positions",
  ),
  "prompt of megabytes": (
    ["--prompts=huge.jsonl"],
    "tokens do not fit in the model's 256 positions; shorten the prompt",
  ),
  "no flag token": (["--model=plain", "--flag_bias=1"], "flag_bias=1.0 needs a model that has a flag token"),
  "no flag token to force": (["--model=plain", "--flag_above=1"], "needs a model that has a flag token"),
  "steps that are no lines": (["--model=sentences", "--flag_above=1"], "the model's steps are sentences"),
  "no model": (["--model=none"], "no folder 'none'"),
  "no weights": (["--model=empty"], "empty holds neither"),
  "output in no folder": (["--output=none/o.jsonl"], "--output=none/o.jsonl cannot be written"),
  "flag unknown": (["--top_q=1"], "Unknown command line flag 'top_q'"),
  "temperature": (["--temperature=-1"], "temperature"),
  "top_p": (["--top_p=0"], "top_p=0.0; must be above 0"),
}
RIGHT = ["--model=marked", "--prompts=p.jsonl", "--max_tokens=16", "--seed=0"]

DRAWN = ["--temperature=0.8", "--top_p=0.9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model with markers and one without, prompts, and everything that main is run on, run once."""
  folder = tmp_path_factory.mktemp("generate")
  save_model(folder / "plain", datakit.bpe_tokenizer())
  shutil.copytree(folder / "plain", folder / "marked")
  (folder / "marked" / MARKERS).write_text(
    json.dumps({"flag": "<|spare_0|>", "fix": "<|spare_1|>", "special": True, "unit": "line", "template": "plain"})
  )
  shutil.copytree(folder / "plain", folder / "words")  # whose random text happens to hold a whole correction
  (folder / "words" / MARKERS).write_text(
    json.dumps({"flag": "=", "fix": "(", "special": False, "unit": "line", "template": "plain"})
  )
  shutil.copytree(folder / "marked", folder / "sentences")
  (folder / "sentences" / MARKERS).write_text((folder / "marked" / MARKERS).read_text().replace("line", "sentence"))
  (folder / "empty").mkdir()
  write_lines(folder / "p.jsonl", PROMPTS)
  write_lines(folder / "many.jsonl", PROMPTS[:1] * 32)
  write_lines(folder / "bad.jsonl", [{"prompt": "2"}, "{"])
  write_lines(folder / "neither.jsonl", [{"text": "2"}])
  write_lines(folder / "range.jsonl", [{"tokens": [1, 9999]}])
  write_lines(folder / "long.jsonl", [{"tokens": [9] * 250}])
  write_lines(folder / "huge.jsonl", [{"prompt": "2"}, {"prompt": "12 + " * 2_000_000}])
  return folder


@pytest.fixture(scope="module")
def done(folder):
  """What each run gave, by name."""
  lines = {
    "greedy": ["--output=greedy.jsonl", "--logprobs"],
    "again": ["--output=again.jsonl", "--logprobs"],
    "flagged": ["--output=flagged.jsonl", "--flag_bias=6", "--temperature=1"],
    "unsure": [
      "--output=unsure.jsonl",
      "--prompts=many.jsonl",
      "--flag_above=0",
      "--flag_bias=-inf",
      "--temperature=20",
      "--max_tokens=60",
    ],
    "plain": ["--model=plain", "--output=plain.jsonl", *DRAWN],
    "words": ["--model=words", "--output=words.jsonl", *DRAWN],
    "clean": ["--model=words", "--output=clean.jsonl", *DRAWN, "--clean"],
    **{name: ["--output=bad_out.jsonl", *arguments] for name, (arguments, _) in BAD.items()},
  }
  found = run("generate", *([*RIGHT, *arguments] for arguments in lines.values()), folder=folder)
  return dict(zip(lines, found, strict=True))


def output(folder, name) -> list[dict]:
  return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def test_one_line_comes_out_for_each_in_the_same_order(folder, done):
  assert done["greedy"][0] == 0, done["greedy"][2]
  found = output(folder, "greedy.jsonl")
  assert [set(line) - {"id"} for line in found] == [{"prompt", "text", "clean", "tokens", "logprobs", "finish"}] * 3
  assert [line["prompt"] for line in found[:2]] == [prompt["prompt"] for prompt in PROMPTS[:2]]
  assert found[1]["id"] == 5
  assert found[2]["prompt"] == vocabulary.load(str(folder / "marked")).decode(PROMPTS[2]["tokens"])


def test_tokens_and_logprobs_are_those_of_the_sampler_and_text_is_theirs(folder, done):
  assert done["greedy"][0] == 0, done["greedy"][2]
  opened = load_model(str(folder / "marked"))
  begins = [tokens.encode_prompt(prompt["prompt"], opened.tokenizer, "plain") for prompt in PROMPTS[:2]]
  begins.append(np.array(PROMPTS[2]["tokens"]))
  written = Sampler(opened.config, opened.params, compute="float32", mesh=opened.mesh).generate(
    begins, max_tokens=16, stop_ids=[opened.tokenizer.eos_token_id], batch_size=4
  )
  for line, one in zip(output(folder, "greedy.jsonl"), written, strict=True):
    assert (line["tokens"], line["finish"]) == (one.tokens.tolist(), one.finish)
    np.testing.assert_allclose(line["logprobs"], one.logprobs, atol=1e-4)
    shown = one.tokens[:-1] if one.finish == "stop" else one.tokens
    assert line["text"] == opened.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_the_same_command_writes_the_same_bytes(folder, done):
  assert done["again"][0] == 0, done["again"][2]
  assert (folder / "again.jsonl").read_bytes() == (folder / "greedy.jsonl").read_bytes()


def test_clean_is_the_clean_view_and_with_the_flag_text_is_too(folder, done):
  assert done["clean"][0] == 0, done["clean"][2]
  plain, words, clean = (output(folder, f"{name}.jsonl") for name in ("plain", "words", "clean"))
  assert [line["text"] for line in words] == [line["text"] for line in plain]
  assert [line["clean"] for line in words] == [clean_text(line["text"], Markers("=", "("), "line") for line in words]
  assert any(line["clean"] != line["text"] for line in words)
  assert [line["text"] for line in clean] == [line["clean"] for line in clean] == [line["clean"] for line in words]
  assert [line["tokens"] for line in clean] == [line["tokens"] for line in words]


def test_a_model_without_markers_writes_text_that_is_clean(folder, done):
  assert done["plain"][0] == 0, done["plain"][2]
  assert all(line["clean"] == line["text"] for line in output(folder, "plain.jsonl"))


def test_flag_bias_makes_flags_that_the_text_shows(folder, done):
  assert done["flagged"][0] == 0, done["flagged"][2]
  assert all("<|spare_0|>" in line["text"] for line in output(folder, "flagged.jsonl"))
  assert not any("<|spare_0|>" in line["text"] for line in output(folder, "greedy.jsonl"))
  assert all(line["logprobs"] is None for line in output(folder, "flagged.jsonl"))


def test_flag_above_flags_the_lines_that_the_model_is_less_sure_of(folder, done):
  assert done["unsure"][0] == 0, done["unsure"][2]
  texts = [line["text"].partition("<|spare_0|>") for line in output(folder, "unsure.jsonl")]
  assert any(flag for _, flag, _ in texts)
  assert all(before.endswith("\n") for before, flag, _ in texts if flag)  # it says none itself
  assert not any("\n" in before[:-1] for before, _, _ in texts)  # with a score of 0 no line goes by


def test_progress_is_told_in_plain_lines(done):
  assert "generate: 3/3 prompts" in done["greedy"][2]
  assert "tokens/s" in done["greedy"][2]


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_ends_in_one_line_and_code_2_and_writes_nothing(folder, done, name):
  code, out, err = done[name]
  assert (code, out) == (2, ""), err
  assert BAD[name][1] in err
  assert err.startswith("error: ")
  assert len(err.splitlines()) == 1
  assert not list(folder.glob("bad_out*"))


def chunked(folder, name, *arguments, code=0, **options):
  """The stderr of a run in chunks of 8 prompts."""
  words = (*RIGHT, "--prompts=many.jsonl", f"--output={name}.jsonl", *DRAWN, *arguments)
  return ended(start(folder, "generate", *words, **options), code)[1]


@pytest.fixture(scope="module")
def whole(folder):
  """The bytes that one process writes without a stop."""
  (code, _, err) = run("generate", [*RIGHT, "--prompts=many.jsonl", "--output=whole.jsonl", *DRAWN], folder=folder)[0]
  assert code == 0, err
  return (folder / "whole.jsonl").read_bytes()


def test_killed_and_run_again_it_goes_on_from_its_chunks_to_the_same_bytes(folder, whole):
  chunked(folder, "killed", kill_after=2, code=-signal.SIGKILL)
  assert not (folder / "killed.jsonl").exists()
  err = chunked(folder, "killed", "--temperature=0.9", code=2)
  assert "was begun with temperature='0.8', now it is '0.9'" in err
  assert "2 of 4 chunks were made before" in chunked(folder, "killed")
  assert (folder / "killed.jsonl").read_bytes() == whole
  assert not list(folder.glob("*.parts"))


def test_two_processes_on_other_devices_write_the_same_bytes(folder, whole, monkeypatch):
  # Process 1 as Slurm starts it; the flags that process 0 has come before that.
  step = {"JOB_ID": "7", "STEP_NODELIST": "node[3-4]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
  for name, value in step.items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  err = chunked(folder, "shared", "--mesh=data:2", num_devices=2)
  assert "process 1 is done; the last of the 2 to end writes shared.jsonl" in err
  assert not (folder / "shared.jsonl").exists()
  chunked(folder, "shared", "--num_processes=2", "--process_id=0", "--mesh=data:1", num_devices=2)
  assert (folder / "shared.jsonl").read_bytes() == whole
