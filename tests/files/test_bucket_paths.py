"""Names of gs:// that Google's rules do not allow, and folders of local copies: decided before anything is read."""

import fcntl
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from insec_jax.command import InputError
from insec_jax.files import bucket_paths, datasets, sources
from insec_jax.files.bucket_paths import local_copy
from insec_jax.files.reading import local_path
from insec_jax.files.writing import check_output, folder_writer, folder_written_whole

NO_BUCKET = "is no name of a bucket, which is 3 to 63 small letters"
REFUSED = {
  "gs://bucket": "is no gs://BUCKET/NAME; give the name of a folder or file in a bucket",
  "gs://": "is no gs://BUCKET/NAME",
  "gs://bucket//x": "is no gs://BUCKET/NAME",
  "gs://bucket/../x": "is no gs://BUCKET/NAME",
  "gs://../x": "is no gs://BUCKET/NAME",
  "gs://bucket/./x": "is no gs://BUCKET/NAME",
  "gs://bucket/a#1": "has '#' or a character that is not printable",
  "gs://bucket/a\nb": "has '#' or a character that is not printable",
  "gs://my-*/x.jsonl": "has a pattern in the name of the bucket; name one bucket",
  "gs://my-bucket?/x.jsonl": "has a pattern in the name of the bucket",
  "gs://My-Bucket/x": f"'My-Bucket' {NO_BUCKET}",
  "gs://_bucket/x": NO_BUCKET,
  "gs://bucket_/x": NO_BUCKET,
  "gs://bucket-/x": NO_BUCKET,
  "gs://ab/x": NO_BUCKET,
  "gs://a..b/x": NO_BUCKET,
  "gs://bücket/x": NO_BUCKET,
  f"gs://{'b' * 64}/x": NO_BUCKET,
  "gs://192.168.5.4/x": NO_BUCKET,
  f"gs://bucket/{'n' * 200}/{'ü' * 413}": "the name in the bucket has 1,027 bytes, at most 1,024 are possible; cut it",
  "gs://bucket/.well-known/acme-challenge/x": "no name in a bucket may begin with",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_name_that_no_object_can_have_is_one_line_that_says_which_can(text):
  with pytest.raises(InputError, match=f"^--model={re.escape(text[:200])}.*{re.escape(REFUSED[text])}"):
    local_path(text, "--model")


@pytest.mark.parametrize("text", ["my-bucket_1/x", "a.example.com/x", f"{'b' * 63}/x", "123/x", f"bucket/{'n' * 250}"])
def test_names_that_the_rules_allow_are_taken(text):
  assert f"{local_copy(f'gs://{text}', '--model')}" == f"gs://{text}"


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("gs:/x", "write gs://BUCKET/NAME, in small letters and with two slashes"),
    ("GS://bucket/x", "write gs://BUCKET/NAME, in small"),
    ("Gs:x", "write gs://BUCKET/NAME, in small"),
    ("s3://bucket/x", "s3:// is not supported; give a local path or gs://BUCKET/NAME"),
    ("https://host/x", "https:// is not supported"),
    ("hf://org/name", "give a model as org/name[@revision], and records (data.path) as hf://datasets/org/name"),
  ],
)
def test_a_scheme_that_is_not_spelled_right_is_one_line_with_the_spelling_needed(text, said):
  with pytest.raises(InputError, match=re.escape(f"--model={text}: {said}")):
    local_path(text, "--model")


@pytest.mark.parametrize(
  "text",
  ["hf://datasets/../x", "hf://datasets/org/name/../../x", "hf://datasets/org/..", "HF://datasets/org/name", "hf:/x"],
)
def test_a_data_set_outside_its_repository_or_of_another_spelling_is_refused(text):
  with pytest.raises(InputError, match=re.escape(f"data.path={text}: not of the form hf://datasets/org/name")):
    sources.checked(text, "data.path")
  with pytest.raises(InputError):
    datasets.find(text, "data.path")


OUTPUTS = {
  "file": lambda text: check_output(text, "--output"),
  "folder": lambda text: folder_written_whole(local_path(text, "--output")).__enter__(),
  "workdir": lambda text: folder_writer(local_path(text, "--output"), "--output").__enter__(),
}


@pytest.mark.parametrize("begin", OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_leaves_room_for_the_longer_names_beside_it_and_in_it(begin, monkeypatch):
  monkeypatch.setattr("insec_jax.files.buckets.children", lambda _: [])
  with pytest.raises(InputError, match=r"the name in the bucket has 825 bytes; give one of at most 824, since files"):
    begin(f"gs://bucket/{'/'.join(['n' * 205] * 4)}/o")


KILLED = """
import os, signal
from insec_jax.files.bucket_paths import local_copy
path = local_copy("gs://bucket/a/b", "--x")
path.write_text("left")
print(path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_copies_of_a_killed_program_are_removed_by_the_next_one_and_no_others(tmp_path, monkeypatch):
  environment = {**os.environ, "TMPDIR": str(tmp_path)}
  ran = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True, check=False)
  assert ran.returncode == -signal.SIGKILL, ran.stderr
  left = pathlib.Path(ran.stdout.strip())
  assert left.read_text() == "left"
  (living := tmp_path / f"{bucket_paths.SPOOL_PREFIX}living").mkdir()
  (making := tmp_path / f"{bucket_paths.MAKING_PREFIX}making").mkdir()
  handle = os.open(living, os.O_RDONLY)
  fcntl.flock(handle, fcntl.LOCK_SH)
  monkeypatch.setattr(bucket_paths.tempfile, "gettempdir", lambda: str(tmp_path))
  bucket_paths._remove_abandoned()
  assert sorted(tmp_path.iterdir()) == [living, making]
  os.utime(making, (1, 1))
  os.close(handle)
  bucket_paths._remove_abandoned()
  assert list(tmp_path.iterdir()) == []
