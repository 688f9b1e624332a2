"""Where the frozen weights of a LoRA run are read from."""

import json

import datakit

from insec_jax.training import frozen


def test_a_base_of_the_hub_is_read_again_at_the_commit_of_the_start(tmp_path, monkeypatch):
  commits = {"org/base": "abc123", "org/base@v1": "def456"}
  (tmp_path / "environment.json").write_text(json.dumps({"hub": commits}))
  asked = []
  monkeypatch.setattr(frozen.hub, "model_folder", lambda text, _: asked.append(text) or tmp_path)
  for path, workdir in (("org/base", None), ("org/base", tmp_path), ("org/base@v1", tmp_path), ("org/new", tmp_path)):
    frozen.base_folder(datakit.config(model__path=path, model__size=None), workdir)
  assert asked == ["org/base", "org/base@abc123", "org/base@def456", "org/new"]
