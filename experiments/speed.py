"""How fast and how right we are beside others. A part adds a record to experiments/results/speed.jsonl.

    python -m experiments.speed nanogpt --nanogpt FOLDER      # training and decoding beside nanoGPT
    python -m experiments.speed hugging_face                  # decoding beside transformers' Llama
    python -m experiments.speed harness --data_dir data/icl   # scoring beside lm-evaluation-harness
    python -m experiments.speed processes                     # train.py in two processes against one
    python -m experiments.speed draft --ckpt out/abbie_tiny   # drafted decoding against plain
    python -m experiments.speed sweep                         # r = 1, 2, 4, 8 in one sweep against 8 alone
    python -m experiments.speed kernels                       # that decoding a token starts, at 350M's depth

The sides of a comparison take turns in one process, so that a machine which is slower for a while is slower
for all; figures are medians over rounds. On one thread (OMP_NUM_THREADS=1) seconds are CPU seconds, so that
other programs do not count. FOLDER is a clone of github.com/karpathy/nanoGPT. Weights are random, but those
of --ckpt.
"""

import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import eval_icl
import train
from checkpoint import load_model, save_checkpoint
from config import ArgumentParser, cli, load_config, optional
from data import Shards
from experiments import RESULTS, ROOT, append
from model import AbbIE, AbbIEConfig, UserError, check
from sample import generate


def in_turn(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
    """{name: function} -> {name: median seconds}. Each side runs once to warm up, then in turn."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, side in sides.items():
            start = clock()
            side()
            if i > 0:
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def random_model(config: str, **changes) -> AbbIE:
    """Of the shape of config/NAME.py, changed."""
    run = load_config([f"{ROOT}/config/{config}.py"])
    shape = {field.name: getattr(run, field.name) for field in fields(AbbIEConfig)}
    torch.manual_seed(0)
    return AbbIE(
        AbbIEConfig(**{**shape, "iters": 1, "vocab_size": 257, "n_kv_heads": None, **changes})
    ).eval()


# ---------------------------------------------------------------------------------------- beside other models


def load_nanogpt(folder: str, config: AbbIEConfig) -> nn.Module:
    """nanoGPT's model with our width, depth, heads, context and vocabulary; no biases, no dropout."""
    file = Path(folder, "model.py")
    if not folder or not file.is_file():
        raise UserError(
            f"{folder or 'no folder'} holds no nanoGPT\n"
            "git clone https://github.com/karpathy/nanoGPT, and give that folder with --nanogpt"
        )
    spec = importlib.util.spec_from_file_location("nanogpt", file)
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {"block_size": config.block_size, "n_layer": config.n_blocks, "n_head": config.n_attn_heads}
    shape |= {"n_embd": config.n_embd, "vocab_size": config.vocab_size, "bias": False, "dropout": 0.0}
    return module.GPT(module.GPTConfig(**shape)).eval()


def training(model: nn.Module, config: AbbIEConfig, **options) -> Callable:
    """A function that trains for four steps of four sequences; the model's forward returns (_, loss)."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    x, y = torch.randint(config.vocab_size, (2, 4, config.block_size))

    def run():
        for _ in range(4):
            model(x, y, **options)[1].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def measure_nanogpt(args) -> dict:
    """Training at the shape of config/abbie_tiny.py, eager, fp32, at r = 1, and at r = 2 against an unlooped
    model of the same depth. Then decoding of 256 tokens by 10.7M parameters, theirs without a cache."""
    ours, deep = random_model("abbie_tiny"), random_model("abbie_tiny", n_body_blocks=4)
    sides = {"r = 1": training(ours, ours.config, iters=1)}
    sides["nanoGPT"] = training(load_nanogpt(args.nanogpt, ours.config), ours.config)
    sides["r = 2"] = training(random_model("abbie_tiny"), ours.config, iters=2)
    sides["unlooped"] = training(deep, ours.config, iters=1)
    seconds = in_turn(sides, args.rounds)
    wide = {"block_size": 512, "n_embd": 384, "ffn_dim": 1024, "n_attn_heads": 6}
    ours = random_model("abbie_tiny", n_head_blocks=2, n_tail_blocks=2, **wide)
    theirs, prompt = load_nanogpt(args.nanogpt, ours.config), torch.ones(1, 16, dtype=torch.long)
    sides = {"ours": partial(generate, ours, prompt.tolist(), 256, 1)}
    sides["nanoGPT"] = partial(theirs.generate, prompt, 256)
    decoding = in_turn(sides, args.rounds)
    return {
        "training_over_nanogpt": seconds["nanoGPT"] / seconds["r = 1"],
        "looped_over_unlooped": seconds["unlooped"] / seconds["r = 2"],
        "decoding_over_nanogpt": decoding["nanoGPT"] / decoding["ours"],
    }


def measure_hugging_face(args) -> dict:
    """Greedy decoding by 124M parameters at r = 1, batch 1, fp32, beside a Llama of the same shape."""
    transformers = optional("transformers")
    ours = random_model("abbie_124m", vocab_size=50257)
    c, n, prompt = ours.config, args.new_tokens, list(range(100, 132))
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.padded_vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_dim,
            num_hidden_layers=c.n_blocks, num_attention_heads=c.n_attn_heads, tie_word_embeddings=True,
            max_position_embeddings=c.block_size,
        )
    ).eval()  # fmt: skip
    idx = torch.tensor([prompt])
    options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
    sides = {"ours": partial(generate, ours, [prompt], n, 1)}
    sides["hugging_face"] = partial(llama.generate, idx, attention_mask=torch.ones_like(idx), **options)
    seconds = in_turn(sides, args.rounds)
    return {
        "n_params": ours.n_params(),
        "new_tokens": n,
        "tokens_per_s": {name: n / took for name, took in seconds.items()},
        "ours_over_hugging_face": seconds["hugging_face"] / seconds["ours"],
    }


# ------------------------------------------------------------------------------------------- ours beside ours


def measure_draft(args) -> dict:
    """A trained model, greedy, prompts of 64 validation tokens: drafts of 8 tokens at r = 1 against none."""
    model = load_model(args.ckpt).eval()
    shards = Shards(args.data or model.meta["data"], "val", 64)
    prompts = shards.batch([i * shards.n_windows // 4 for i in range(4)])[0].tolist()
    result = {"ckpt": model.meta["ckpt"], "speedup": {}, "prompts_equal_to_plain": {}}

    def decode(r, **options):
        return [generate(model, [prompt], args.new_tokens, r, **options) for prompt in prompts]

    for r in (4, 8):
        sides = {"plain": partial(decode, r), "drafted": partial(decode, r, draft_iters=1, draft_tokens=8)}
        seconds = in_turn(sides, args.rounds)
        result["speedup"][r] = seconds["plain"] / seconds["drafted"]
        both = zip(sides["plain"](), sides["drafted"]())
        result["prompts_equal_to_plain"][r] = sum(plain == drafted for plain, drafted in both)
    return result


@torch.no_grad()
def measure_sweep(args) -> dict:
    """Logits of 16 windows at r = 1, 2, 4, 8 from one sweep of the Body, against those at 8 alone."""
    model = random_model("abbie_tiny")
    idx = torch.randint(257, (16, 256))
    sides = {"all": lambda: list(model.logits_at(idx, [1, 2, 4, 8]))}
    sides["8"] = lambda: list(model.logits_at(idx, [8]))
    seconds = in_turn(sides, args.rounds)
    return {"all_over_8_alone": seconds["all"] / seconds["8"]}


def measure_processes(args) -> dict:
    """Tokens/s of the same step of train.py in one process and, by torchrun, in two; a thread each."""
    rates = {1: [], 2: []}
    flags = ["--max_steps=40", "--eval_every=0", "--eval_tokens=1024", "--save_every=0", "--dtype=float32"]
    with TemporaryDirectory() as temp:
        for i in range(args.rounds):
            for n, measured in rates.items():
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command = [*torchrun, f"--nproc_per_node={n}", "train.py", "config/abbie_tiny.py", *flags]
                command += [f"--out_dir={temp}/{n}_{i}", "--device=cpu"]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
                log = map(json.loads, Path(temp, f"{n}_{i}", "log.jsonl").read_text().splitlines())
                steps = [line["tokens_per_s"] for line in log if "tokens_per_s" in line]
                measured.append(statistics.median(steps[10:]))
    medians = {n: statistics.median(measured) for n, measured in rates.items()}
    return {"tokens_per_s": medians, "two_over_one": medians[2] / medians[1]}


# ------------------------------------------------------------------------------- beside lm-evaluation-harness


def harness_task(name: str, data_dir: Path) -> dict:
    """The harness's own definition of a task, with nothing changed but where the rows lie."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(TaskManager().task_index[name].yaml_path, resolve_func=True)
    split = config.get("test_split") or config["validation_split"]
    rows = str(data_dir.absolute() / name / f"{split}.jsonl")
    config |= {"task": name, "dataset_path": "json", "dataset_name": None}
    config |= {"training_split": None, "validation_split": None, "test_split": split}
    return config | {"dataset_kwargs": {"data_files": {split: rows}}}


def measure_harness(args) -> dict:
    """Every task of which there are rows, example by example: eval_icl.py against `lm_eval --model hf` on the
    exported folder of the same model, 3.4M random parameters large enough for answers to differ, at r = 3."""
    lm_eval = optional("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from hf.export import main as export

    names = sorted(folder.name for folder in args.data_dir.glob("*") if folder.is_dir())
    check(bool(names), f"{args.data_dir} holds no task\npython prepare_data.py icl --out {args.data_dir}")
    shape = {"block_size": 1024, "n_embd": 64, "n_attn_heads": 2, "ffn_dim": 176}
    model = random_model("abbie_tiny", vocab_size=50257, **shape)
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 4
    result = {"lm_eval": version("lm_eval"), "transformers": version("transformers"), "tasks": {}}
    with TemporaryDirectory() as temp:
        run = Path(temp, "run")
        meta = {**asdict(model.config), "tokenizer": "gpt2", "step": 0}
        save_checkpoint(run, 0, model.state_dict(), {}, meta)
        export([f"--ckpt={run}", f"--out={temp}/exported", "--iters=3"])
        theirs = HFLM(f"{temp}/exported", trust_remote_code=True, batch_size=32, device="cpu")
        for name in names:
            rows = [f"--tasks={name}", f"--data_dir={args.data_dir}", f"--limit={args.limit}"]
            files = [f"--out={temp}/ours.json", f"--log_samples={temp}/ours.jsonl"]
            eval_icl.main([f"--ckpt={run}", "--iters=3", "--device=cpu", *rows, *files])
            ours = json.loads(Path(temp, "ours.json").read_text())["tasks"][name]["iters"]["3"]
            scores = []
            for line in Path(temp, "ours.jsonl").read_text().splitlines():
                example = json.loads(line)
                scores += zip(example["loglikelihoods"], example["is_greedy"])

            task = harness_task(name, args.data_dir)
            report = lm_eval.simple_evaluate(theirs, tasks=[task], limit=args.limit, bootstrap_iters=100)
            samples = sorted(report["samples"][name], key=lambda sample: sample["doc_id"])
            expected = [(float(ll), str(hit)) for sample in samples for [(ll, hit)] in sample["resps"]]
            theirs_by_metric = {key.split(",")[0]: value for key, value in report["results"][name].items()}
            pairs = list(zip(scores, expected, strict=True))
            result["tasks"][name] = {
                "requests": len(pairs),
                "max_abs_difference": max(abs(a[0] - b[0]) for a, b in pairs),
                "greedy_differs": sum(str(bool(a[1])) != b[1] for a, b in pairs),
                "ours": ours,
                "harness": {key: value for key, value in theirs_by_metric.items() if key in ours},
            }
    return result


# ------------------------------------------------------------------------------------- counted, for a GPU


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something: on a GPU a kernel each."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **(kwargs or {}))


def measure_kernels(args) -> dict:
    """Of decoding one more token at the depth of config/abbie_350m.py (and a tiny width), fp32, eager."""
    model = random_model("abbie_350m", n_embd=64, n_attn_heads=4, ffn_dim=128, block_size=64)
    result = {}
    for r in (1, 2, 8):
        counts = []
        for n in (4, 5):
            with Kernels() as kernels:
                generate(model, [[1, 2, 3]], n, r)
            counts.append(kernels.count)
        result[r] = counts[1] - counts[0]
    return {"kernels_per_token": result}


PARTS = {
    "nanogpt": measure_nanogpt,
    "hugging_face": measure_hugging_face,
    "draft": measure_draft,
    "sweep": measure_sweep,
    "harness": measure_harness,
    "processes": measure_processes,
    "kernels": measure_kernels,
}


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.speed", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--nanogpt", default="", metavar="FOLDER", help="a clone of nanoGPT")
    parser.add_argument("--ckpt", help="draft: the model (default: the newest under out/)")
    parser.add_argument("--data", help="draft: folder of shards (default: the checkpoint's)")
    parser.add_argument("--data_dir", type=Path, default=Path("data/icl"), help="harness: TASK/SPLIT.jsonl")
    parser.add_argument("--limit", type=int, default=200, help="harness: rows of each task (200)")
    parser.add_argument("--new_tokens", type=int, default=48, help="decoded (48)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of every side (5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    args = parser.parse_args(argv)
    for name in ("limit", "new_tokens", "rounds"):
        check(getattr(args, name) >= 1, f"--{name}={getattr(args, name)} must be at least 1")
    record = {"what": args.part, "command": f"python -m experiments.speed {shlex.join(argv)}"}
    record |= {**train.versions(torch.device("cpu")), **PARTS[args.part](args)}
    print(json.dumps(record, indent=1))
    append("speed", record, args.results)


if __name__ == "__main__":
    cli(main)
