"""What made the numbers in experiments/README.md: `python -m experiments.NAME`, from the repository's folder.

An experiment appends its records to experiments/results/NAME.jsonl, a line of JSON each. Records are never
rewritten: they keep the commands and the names of keys of their time.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"


def read(name: str, folder: Path = RESULTS) -> list[dict]:
    """The records of one experiment, in the order in which they were made."""
    path = Path(folder, f"{name}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(name: str, record: dict, folder: Path = RESULTS):
    """Add a record as a line."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, f"{name}.jsonl"), "a") as file:
        file.write(json.dumps(record) + "\n")
