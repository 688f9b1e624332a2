"""Paths of gs:// against a real server on loopback: local copies, whole objects, faults in one line."""

import asyncio
import json
import re
import sys
import time

import pytest
from bucketkit import point_at, times

from insec_jax.command import InputError, is_refusal, machine_refusal
from insec_jax.files import buckets, credentials, leases, sources
from insec_jax.files.reading import folder_to_read, local_path, read_json, read_json_lines
from insec_jax.files.writing import check_output, folder_writer, folder_written_whole, written_whole


def test_a_path_of_a_bucket_is_a_local_copy_that_is_shown_by_its_gs_name(bucket):
  path = local_path(f"{bucket.url}/runs/a/", "--model")
  assert f"{path}" == f"{bucket.url}/runs/a"
  assert f"{path / 'x.json'}" == f"{bucket.url}/runs/a/x.json"
  assert f"{path.parent}" == f"{bucket.url}/runs"
  assert f"{(path / 'x').with_suffix('.y')}" == f"{bucket.url}/runs/a/x.y"
  assert [*path.parent.iterdir()] == []


def test_a_json_file_of_a_bucket_is_read_and_a_missing_one_is_one_line(bucket):
  bucket.write("a/b.json", b'{"c": 1}')
  assert read_json(local_path(f"{bucket.url}/a/b.json", "--x"), "a file") == {"c": 1}
  with pytest.raises(InputError, match=rf"a file: cannot read {bucket.url}/a/c.json \(No such file"):
    read_json(local_path(f"{bucket.url}/a/c.json", "--x"), "a file")


def test_errors_of_lines_name_the_object_and_the_line(bucket):
  bucket.write("p.jsonl", b'{"a": 1}\nno json\n')
  with pytest.raises(InputError, match=rf"^{bucket.url}/p.jsonl:2: not JSON"):
    list(read_json_lines(local_path(f"{bucket.url}/p.jsonl", "--x"), "--x"))


def test_an_output_is_uploaded_whole_at_the_end_and_not_after_an_error(bucket):
  with written_whole(f"{bucket.url}/out/report.html") as file:
    file.write("page")
    assert bucket.names() == ["out/.report.html.lock"]
  assert bucket.names() == ["out/report.html"]

  def write_half():
    with written_whole(f"{bucket.url}/out/report.html") as file:
      file.write("half")
      raise RuntimeError

  with pytest.raises(RuntimeError):
    write_half()
  assert bucket.names() == ["out/report.html"]
  assert bucket.read("out/report.html") == b"page"


def test_a_name_is_that_of_a_file_or_of_a_folder_and_not_of_both(bucket):
  bucket.write("run/config.json", b"{}")
  bucket.write("file", b"x")
  with pytest.raises(InputError, match=rf"--output={bucket.url}/run is a folder; give the path of a file"):
    check_output(f"{bucket.url}/run", "--output")
  with (
    pytest.raises(InputError, match=rf"--workdir={bucket.url}/file is a file; give the name of a folder"),
    folder_writer(local_path(f"{bucket.url}/file", "--workdir"), "--workdir"),
  ):
    pass
  assert bucket.names() == ["file", "run/config.json"]


def test_an_output_that_the_program_reads_is_refused(bucket):
  with pytest.raises(InputError, match="is a file that the program reads"):
    check_output(f"{bucket.url}/a.jsonl", "--output", [f"{bucket.url}/a.jsonl"])


def test_a_second_writer_of_an_object_is_refused_and_names_the_first(bucket, monkeypatch):
  monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
  monkeypatch.setattr(leases, "GRACE_SECONDS", 0.1)
  second = written_whole(f"{bucket.url}/a")
  with written_whole(f"{bucket.url}/a"), pytest.raises(InputError, match=r"is being written by process [0-9]+ on"):
    second.__enter__()
  assert bucket.names() == ["a"]


def lease_of_another_host(bucket, name):
  with pytest.MonkeyPatch.context() as other:
    other.setattr(leases, "_processes", lambda: "another host")
    line = leases._acquire(local_path(f"{bucket.url}/{name}", "--x")).line(0)
  return json.loads(line)


def test_a_silent_lease_is_taken_over_and_its_holder_ends(bucket, monkeypatch):
  lease_of_another_host(bucket, ".a.lock")
  monkeypatch.setattr(leases, "SILENCE_SECONDS", 0.3)
  with written_whole(f"{bucket.url}/a") as file:
    file.write("x")
  assert bucket.read("a") == b"x"
  assert bucket.names() == ["a"]

  monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
  ended = []

  def end(code, line):
    ended.append((code, line))
    raise OSError  # the process would end here

  monkeypatch.setattr(leases.stop_signal, "end", end)
  with written_whole(f"{bucket.url}/a"):
    bucket.remove(".a.lock")
    lease_of_another_host(bucket, ".a.lock")
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
      time.sleep(0.02)
  assert ended[0][0] == 1
  assert "has taken" in ended[0][1]
  assert bucket.names() == [".a.lock", "a"], "the lease of the other process stays"


def test_a_folder_to_read_brings_the_small_files_and_no_weights(bucket):
  for name in ("config.json", "model.safetensors", "original/x.pth", "tokenizer/t.json", "checkpoints/1/a", ".lock"):
    bucket.write(f"hf/{name}", b"{}")
  folder = folder_to_read(f"{bucket.url}/hf", "--model")
  here = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
  assert here == ["config.json", "tokenizer/t.json"]
  assert sorted(buckets.children(folder)) == sorted(
    ["config.json", "model.safetensors", "original", "tokenizer", "checkpoints", ".lock"]
  )


def test_a_folder_that_is_read_again_is_what_the_bucket_has_and_those_below_it_stay(bucket):
  for name in ("hf/config.json", "hf/tokenizer/t.json", "hf/x.json"):
    bucket.write(name, b"{}")
  folder = folder_to_read(f"{bucket.url}/hf", "--model")
  (folder / "run").mkdir()
  (folder / "run" / "metrics.jsonl").write_text("not uploaded yet")
  bucket.remove("hf/tokenizer/t.json")
  bucket.write("hf/config.json", b'{"a": 1}')
  buckets.refresh_folder(folder)
  here = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
  assert here == {"config.json": '{"a": 1}', "x.json": "{}", "run/metrics.jsonl": "not uploaded yet"}


def test_a_folder_is_written_with_config_json_last_and_a_killed_one_is_replaced(bucket):
  bucket.write("hf/.unfinished", b"")
  bucket.write("hf/model.safetensors", b"half")
  path = local_path(f"{bucket.url}/hf", "--output")
  with folder_written_whole(path) as folder:
    assert bucket.names("hf/") == ["hf/.unfinished"]
    (folder / "config.json").write_text("{}")
    (folder / "z.json").write_text("{}")
    with buckets.opened_to_write(folder / "model.safetensors") as file:
      file.write(b"w" * 10)
  assert bucket.names() == ["hf/config.json", "hf/model.safetensors", "hf/z.json"]
  with pytest.raises(InputError, match="already and not empty"), folder_written_whole(path):
    pass


def test_an_object_that_is_not_written_to_its_end_does_not_appear(bucket, monkeypatch):
  monkeypatch.setattr(buckets, "BLOCK_BYTES", 1 << 18)
  path = local_path(f"{bucket.url}/w.safetensors", "--output")

  def write_half():
    with buckets.opened_to_write(path) as file:
      file.write(b"x" * (buckets.BLOCK_BYTES + 5))
      raise RuntimeError

  with pytest.raises(RuntimeError):
    write_half()
  assert bucket.names() == []


def test_a_range_is_read_in_blocks(bucket, monkeypatch):
  monkeypatch.setattr(buckets, "BLOCK_BYTES", 7)
  bucket.write("w", bytes(range(100)))
  assert buckets.read_range(local_path(f"{bucket.url}/w", "--x"), 5, 50) == bytes(range(5, 50))


@pytest.fixture
def quick_repeats(monkeypatch):
  """gcsfs repeats a request without a pause."""
  sleep = asyncio.sleep
  monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda _: sleep(0))


@pytest.mark.usefixtures("quick_repeats")
@pytest.mark.parametrize("status", [429, 503])
def test_a_request_that_fails_for_a_while_is_repeated(faulty, status):
  bucket, proxy = faulty(times(3, "upload", status))
  with written_whole(f"{bucket.url}/a") as file:
    file.write("x")
  assert bucket.read("a") == b"x"
  assert sum("upload" in path for _, path in proxy.seen) > 3


def refused(faulty, rule, do) -> str:
  """Line with which `do` of the name of a bucket is refused."""
  bucket, _ = faulty(rule)
  with pytest.raises((InputError, OSError)) as raised:
    do(bucket)
  error = raised.value
  said = error if isinstance(error, InputError) else machine_refusal(error)
  return f"{type(error).__name__}: {said}".replace(bucket.name, "BUCKET")


def write(bucket):
  with written_whole(f"{bucket.url}/a"):
    pass


@pytest.mark.usefixtures("quick_repeats")
@pytest.mark.parametrize(
  ("status", "said"),
  [
    (403, r"InputError: gs://BUCKET/.a.lock: permission denied \(Forbidden: .*roles Storage Object User and"),
    (401, r"InputError: gs://BUCKET/.a.lock cannot be reached without credentials \(.*run gcloud auth application-def"),
    (503, r"OSError: the store does not answer \(.*503\): gs://BUCKET/.a.lock; look at the network"),
  ],
)
def test_what_the_store_refuses_is_one_line_that_says_what_to_do(faulty, status, said):
  assert re.match(said, refused(faulty, times(99, "upload", status), write))


USES = {
  "read": lambda url: read_json(local_path(url, "--x"), "a file"),
  "matched": lambda url: sources.find(f"{url}/*.jsonl", "data.path"),
  "folder": lambda url: folder_to_read(url, "--model"),
  "exists": lambda url: buckets.exists(local_path(url, "--x")),
  "written": lambda url: written_whole(url).__enter__(),
  "exported": lambda url: folder_written_whole(local_path(url, "--output")).__enter__(),
  "started": lambda url: folder_writer(local_path(url, "--workdir"), "--workdir").__enter__(),
}


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("name", USES)
def test_a_bucket_that_is_not_there_is_named_with_the_command_that_makes_it(name):
  line = r"^gs://no-bucket/\S+: there is no bucket no-bucket; correct the name, or make it \(gcloud storage buckets cre"
  with pytest.raises(InputError, match=line):
    USES[name](f"gs://no-bucket/{name}")


def test_of_a_bucket_that_may_not_be_listed_a_missing_file_is_a_missing_file(faulty):
  bucket, _ = faulty(times(99, r"/o\?", 403, "GET"))
  with pytest.raises(InputError, match=r"cannot read gs://.*/c.json \(No such file|permission denied"):
    read_json(local_path(f"{bucket.url}/c.json", "--x"), "a file")


@pytest.mark.usefixtures("quick_repeats")
def test_a_store_that_is_slow_to_answer_at_first_is_named_while_it_is_waited_for(faulty, monkeypatch, capsys):
  monkeypatch.setattr(credentials, "PATIENCE_SECONDS", 0.05)
  monkeypatch.setattr(buckets, "_has_answered", False)
  bucket, _ = faulty(times(1, "a.json", 0.8, "GET"))
  bucket.write("a.json", b"{}")
  for _ in range(2):
    buckets.refresh(local_path(f"{bucket.url}/a.json", "--x"))
  assert capsys.readouterr().err == f"waiting for an answer from the store ({bucket.url}/a.json)\n"


@pytest.mark.usefixtures("quick_repeats")
def test_a_store_that_does_not_answer_is_an_error_of_the_machine(monkeypatch):
  point_at("http://127.0.0.1:9", monkeypatch)
  with pytest.raises(OSError, match="does not answer") as error:
    read_json(local_path("gs://bucket/a", "--x"), "a file")
  assert is_refusal(error.value)


def test_without_gcsfs_the_error_names_the_extra(monkeypatch):
  buckets._fsspec.cache_clear()
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(InputError, match=r"pip install 'insec_jax\[gcs\]'"):
    local_path("gs://bucket/a", "--x")


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (
      ValueError("PERMISSION_DENIED: no [http_response_code='403']"),
      "the store refuses access (PERMISSION_DENIED: no)",
    ),
    (
      ValueError("ABORTED: All 32 retry attempts failed: x [http_response_body='y']"),
      "does not answer (ABORTED: All 32",
    ),
    (OSError("Forbidden: http://x/o\nno"), "the store refuses access (Forbidden: http://x/o no)"),
  ],
)
def test_errors_of_tensorstore_and_gcsfs_are_of_the_machine_and_no_damage(error, said):
  assert said in machine_refusal(error)
  assert "http_response" not in machine_refusal(error)
  assert is_refusal(error)


def test_a_workdir_needs_the_metadata_of_its_bucket_and_says_so_at_the_start(faulty):
  bucket, _ = faulty(times(9, r"/storage/v1/b/[^/?]+\?", 403, "GET"))
  folder = local_path(f"{bucket.url}/run", "--workdir")
  with pytest.raises(InputError, match=r"permission denied .* Storage Legacy Bucket Reader"):
    folder_writer(folder, "--workdir").__enter__()
  assert bucket.names() == []
