"""Do all processes compute the same bits? One forward and backward pass in each of N fresh processes.

    python -m experiments.bits --n 200 --dtype float32                        # -> results/bits.jsonl
    python -m experiments.bits --n 200 --dtype bfloat16 --batch 1 --length 64

Each process builds the shape of config/abbie_tiny.py (seed 1, default threads), takes a fixed batch through
it and prints its loss and two hashes: of the rotary table, and of the loss and all gradients. Run it beside
other work: what it looks for are races of threads (see model.rope_table)."""

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import train
from config import ArgumentParser, cli, load_config
from experiments import RESULTS, ROOT, append
from model import AbbIE, check


def digest(tensors) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().numpy().tobytes())
    return sha.hexdigest()[:12]


def one_pass(dtype: str, batch: int, length: int):
    """What one process computes."""
    config = load_config([str(ROOT / "config" / "abbie_tiny.py"), f"--dtype={dtype}"])
    torch.manual_seed(config.seed)
    model, device = AbbIE(config.model_config(257)), torch.device("cpu")
    train.choose_attention(device, train.choose_dtype(config, device), compiled=False)
    tokens = torch.randint(256, (batch, length + 1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    loss.backward()
    gradients = digest([loss, *(p.grad for p in model.parameters())])
    print(f"loss {loss.item():.9f}, rotary table {digest(model.rope_on(device))}, gradients {gradients}")


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.bits", description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="fresh processes (200)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=4, help="sequences (4)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (256)")
    parser.add_argument("--one", action="store_true", help="be one of these processes")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    args = parser.parse_args(argv)
    if args.one:
        return one_pass(args.dtype, args.batch, args.length)
    outcomes, began = Counter(), time.perf_counter()
    command = [sys.executable, "-m", "experiments.bits", "--one", *argv]
    for _ in tqdm(range(args.n), unit="process"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        check(done.returncode == 0, done.stderr.strip().removeprefix("error: "))
        outcomes[done.stdout.strip()] += 1
    record = {"command": "python -m experiments.bits " + " ".join(argv), "n": args.n, "dtype": args.dtype}
    record |= {"batch": args.batch, "length": args.length, "load": round(os.getloadavg()[0], 2)}
    record |= {"outcomes": dict(outcomes), "seconds": round(time.perf_counter() - began, 1)}
    append("bits", {**record, **train.versions(torch.device("cpu"))}, args.results)
    print(*(f"{n} of {args.n}: {outcome}" for outcome, n in outcomes.most_common()), sep="\n")


if __name__ == "__main__":
    cli(main)
