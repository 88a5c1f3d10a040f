"""What scoring several r at once and sharing contexts save. Writes results/eval_speed.json.

    python results/eval_speed.py --data_dir data/icl

CPU seconds of eval_icl.score on one thread, medians of rounds in which the variants take turns, for the shape
of config/abbie_tiny.py (1 + 2 + 1 blocks, bytes) with random weights, where the blocks and not the vocabulary
are the cost. The blocks of a sweep to 8 with one Tail are 1 + 16 + 1 = 18, with four Tails 21.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from config import ArgumentParser, cli, load_config  # noqa: E402
from eval_icl import encode, load_tasks, score  # noqa: E402
from model import AbbIE  # noqa: E402
from prepare_data import get_tokenizer  # noqa: E402


def main(argv: list[str]):
    parser = ArgumentParser(prog="results/eval_speed.py", description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data/icl"))
    parser.add_argument("--limit", type=int, default=64, help="rows of each task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="results/eval_speed.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = get_tokenizer("bytes")
    config = load_config(["config/abbie_tiny.py", "--block_size=1024"])  # room for every row
    model = AbbIE(config.model_config(tokenizer.n_vocab))
    command = f"python results/eval_speed.py --data_dir DIR --limit {args.limit} --rounds {args.rounds}"
    result = {"command": command, "rows": args.limit, "tasks": {}}
    for name in ("hellaswag", "arc_easy"):
        examples = load_tasks([name], None, args.data_dir, model.config.block_size, args.limit)[name]
        shared = encode(tokenizer, [request for example in examples for request in example.requests])
        apart = encode(tokenizer, [example.requests[i] for i in range(5) for example in examples
                                   if i < len(example.requests)])  # no neighbours have a context in common
        variants = {"1,2,4,8": (shared, [1, 2, 4, 8]), "8": (shared, [8]),
                    "8, contexts not shared": (apart, [8]), "each r alone": (shared, None)}
        seconds = {variant: [] for variant in variants}
        for _ in range(args.rounds):
            for variant, (requests, iters) in variants.items():
                start = time.process_time()
                for several in [iters] if iters else [[1], [2], [4], [8]]:
                    score(model, requests, several)
                seconds[variant].append(time.process_time() - start)
        median = {variant: statistics.median(values) for variant, values in seconds.items()}
        result["tasks"][name] = {
            "requests": len(shared), "cpu_seconds": seconds,
            "all_over_8_alone": median["1,2,4,8"] / median["8"],
            "each_alone_over_all": median["each r alone"] / median["1,2,4,8"],
            "not_shared_over_shared": median["8, contexts not shared"] / median["8"]}
        print(name, json.dumps(result["tasks"][name]))
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli(main)
