"""What several test files need."""

import os
import random
import tempfile
from pathlib import Path

import pytest
import torch

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
