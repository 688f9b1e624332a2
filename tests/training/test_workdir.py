"""The folder of a run that could not begin."""

from insec_jax.files.reading import local_path
from insec_jax.files.writing import folder_writer
from insec_jax.training.workdir import is_empty, make_empty


def begin(folder):
  """Write some files into a new workdir, and give it up."""
  with folder_writer(folder, "--workdir"):
    assert is_empty(folder)
    (folder / "tb").mkdir()
    (folder / "tb" / "events").write_text("x")
    (folder / "config.json").write_text("{}")
    make_empty(folder)
    assert is_empty(folder)


def test_of_a_run_that_is_given_up_nothing_is_left_on_a_disk(tmp_path):
  begin(tmp_path / "made" / "run")
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "config.json").write_text("{}")
  assert not is_empty(tmp_path)


def test_of_a_run_that_is_given_up_nothing_is_left_in_a_bucket(bucket):
  folder = local_path(f"{bucket.url}/run", "--workdir")
  begin(folder)
  assert bucket.names() == []
  bucket.write("run/config.json", b"{}")
  assert not is_empty(folder)
