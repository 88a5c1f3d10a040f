"""What several test files need."""

import os
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hub import Hub

import prepare_data

# Where transformers keeps the Python files of exported models: not in the home folder.
MODULES = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = MODULES.name
torch.set_num_threads(1)  # models of this size gain nothing from more, and lose much beside other work


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Shards of sentences made by chance."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = "the a bird river stone finds under makes light of and old green house sings to water".split()
    lines = [" ".join(rng.choices(words, k=rng.randint(3, 12))) + "." for _ in range(1500)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n\n")
    (folder / "val.txt").write_text("\n".join(rng.sample(lines, 400)) + "\n")
    text = ["--input", str(folder / "text.txt"), "--val_input", str(folder / "val.txt")]
    prepare_data.main(["text", *text, "--out", str(folder / "shards")])
    return folder / "shards"


@pytest.fixture
def out(tmp_path) -> Path:
    """A folder that is to be made."""
    return tmp_path / "out"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local server in the place of the Hugging Face Hub."""
    constants, server = "huggingface_hub.constants", Hub()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    monkeypatch.setattr(f"{constants}.DOWNLOAD_CHUNK_SIZE", 1 << 14)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()
