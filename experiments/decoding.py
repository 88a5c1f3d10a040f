"""What decoding costs at r iterations, and what the ways around it save. Adds to results/decoding.jsonl.

    python -m experiments.decoding draft --ckpt out/NAME                # a trained model
    python -m experiments.decoding int8 --ckpt out/NAME                 # what int8 gains and costs
    python -m experiments.decoding hugging_face                         # random weights; needs transformers
    python -m experiments.decoding nanogpt --nanogpt FOLDER             # random weights

Every ratio comes from one process, with the sides in turn; medians over rounds. FOLDER is a checkout of
github.com/karpathy/nanoGPT.
"""

import copy
import json
import os
import shlex
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

import train
from checkpoint import load_model
from config import ArgumentParser, cli, load_config
from data import Shards
from decode import Stats, generate, lay_out_for_decoding, quantize
from eval_icl import mean_stderr, window_losses
from experiments import RESULTS, ROOT, append
from experiments.speed import load_nanogpt
from model import AbbIE, UserError


def race(sides: dict, rounds: int) -> dict:
    """{name: function} -> {name: median seconds}, each side run once to warm up and then in turn. On one
    thread they are CPU seconds, so that other programs do not count."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, side in sides.items():
            start = clock()
            side()
            if i:
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def windows(args, n: int, length: int, model) -> list[list[int]]:
    """n stretches of validation text, evenly spaced."""
    shards = Shards(args.data or model.meta["data"], "val", length)
    return shards.batch([i * shards.n_windows // n for i in range(n)])[0].tolist()


def shape(model) -> str:
    c = model.config
    return (
        f"{c.n_head_blocks}+{c.n_body_blocks}+{c.n_tail_blocks} blocks, D {c.n_embd}, "
        f"{model.n_params():,} parameters, rule {c.rule}, trained at iters {c.iters}, "
        f"step {model.meta.get('step', 0)}"
    )


# ------------------------------------------------------------------------------------- of a trained model


def measure_draft(args):
    """Plain against drafted decoding, greedy: seconds, acceptance, and the speed-up that block counts predict
    at it, with a pass over several tokens counted as one over a single token."""
    model = lay_out_for_decoding(load_model(args.ckpt).eval())
    config, rows = model.config, []
    prompts = windows(args, args.prompts, 64, model)
    options = [(d, g) for d in (1, 2) for g in (2, 4, 8)]  # iterations of a draft, its tokens

    def run(iters, prompts, **keys):
        return [generate(model, [prompt], args.new_tokens, iters, **keys)[0] for prompt in prompts]

    for iters in (4, 8):
        sides = {"plain": partial(run, iters, prompts[:2])}
        for d, g in options:
            sides[d, g] = partial(run, iters, prompts[:2], draft_iters=d, draft_tokens=g)
        seconds = race(sides, args.rounds)
        plain = run(iters, prompts)
        for d, g in options:
            stats = Stats()
            drafted = run(iters, prompts, draft_iters=d, draft_tokens=g, stats=stats)
            acceptance = stats.accepted / stats.drafted
            once = config.n_head_blocks + config.n_tail_blocks
            whole = once + iters * config.n_body_blocks
            # a round: g drafted tokens, the Head and Body of the last one, then all of them on to iters
            blocks = g * (once + d * config.n_body_blocks) + whole
            row = {
                "iters": iters,
                "draft_iters": d,
                "draft_tokens": g,
                "acceptance": acceptance,
                "speedup": seconds["plain"] / seconds[d, g],
                "predicted": (1 + g * acceptance) * whole / blocks,
                "prompts_equal_to_plain": sum(a == b for a, b in zip(drafted, plain)),
            }
            rows.append(row)
            print(row, flush=True)
    return {"model": shape(model), "prompts": len(prompts), "new_tokens": args.new_tokens, "rows": rows}


# -------------------------------------------------------------------------------------- beside other programs


def as_hugging_face(model):
    """The same weights as transformers' Llama."""
    try:
        from transformers import LlamaForCausalLM

        from hf.export import export
    except ImportError:
        raise UserError("the comparison needs packages\npip install transformers safetensors") from None
    with tempfile.TemporaryDirectory() as temp:
        export(model, Path(temp, "llama"), kind="llama")
        return LlamaForCausalLM.from_pretrained(Path(temp, "llama"), dtype=torch.float32).eval()


@torch.no_grad()
def against_hugging_face(args):
    """Tokens/s of 124M parameters at r = 1, batch 1, beside transformers' generate and bare products."""
    config = load_config([f"{ROOT}/config/abbie_124m.py"]).model_config(50257)
    models = [AbbIE(config).eval() for _ in range(4)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    llama = as_hugging_face(models[0])
    ours, row_major = lay_out_for_decoding(models[0]), models[1]
    bfloat16, int8 = lay_out_for_decoding(models[2].bfloat16()), quantize(models[3])
    n, prompt = args.new_tokens, list(range(100, 132))
    idx = torch.tensor([prompt])
    options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}

    def hugging_face():
        ids = llama.generate(idx, attention_mask=torch.ones_like(idx), **options)
        return ids[0, len(prompt) :].tolist()

    weights = [module.weight for module in ours.modules() if isinstance(module, torch.nn.Linear)]
    rows = {w.shape[1]: torch.randn(1, 1, w.shape[1]) for w in weights}

    def bare_products():
        for _ in range(n):
            for w in weights:
                F.linear(rows[w.shape[1]], w)

    sides = {
        "ours": partial(generate, ours, [prompt], n, 1),
        "hugging_face": hugging_face,
        "row_major": partial(generate, row_major, [prompt], n, 1),
        "bfloat16": partial(generate, bfloat16, [prompt], n, 1),
        "int8": partial(generate, int8, [prompt], n, 1),
        "bare_products": bare_products,
    }
    seconds = race(sides, args.rounds)
    same = sum(a == b for a, b in zip(hugging_face(), generate(ours, [prompt], n, 1)[0]))
    return {
        "model": f"{config.n_blocks} blocks, D {config.n_embd}, random weights, iters 1",
        "prompt": len(prompt),
        "new_tokens": n,
        "same_tokens": same,
        "tokens_per_s": {name: n / took for name, took in seconds.items()},
        "ours_over_hugging_face": seconds["hugging_face"] / seconds["ours"],
        "ours_over_bare_products": seconds["bare_products"] / seconds["ours"],
        "ours_over_row_major": seconds["row_major"] / seconds["ours"],
        "bfloat16_over_ours": seconds["ours"] / seconds["bfloat16"],
        "int8_over_ours": seconds["ours"] / seconds["int8"],
        "int8_over_hugging_face": seconds["hugging_face"] / seconds["int8"],
    }


@torch.no_grad()
def measure_int8(args):
    """Tokens/s of 124M parameters in int8 over fp32 at every r; and of --ckpt what int8 costs in nats, on
    windows of the validation split, paired, with the standard error over windows."""
    config = load_config([f"{ROOT}/config/abbie_124m.py"]).model_config(50257)
    model = AbbIE(config).eval()
    int8 = quantize(copy.deepcopy(model))
    lay_out_for_decoding(model)
    prompt, depths = list(range(100, 132)), [1, 2, 4, 8]
    found = {"model": f"{config.n_blocks} blocks, D {config.n_embd}, random weights", "int8_over_float32": {}}
    for r in depths:
        sides = {"float32": model, "int8": int8}
        runs = {name: partial(generate, side, [prompt], args.new_tokens, r) for name, side in sides.items()}
        seconds = race(runs, args.rounds)
        found["int8_over_float32"][r] = seconds["float32"] / seconds["int8"]
    if args.ckpt:
        model = load_model(args.ckpt).eval()
        shards = Shards(args.data or model.meta["data"], "val", model.config.block_size)
        sides = {"float32": model, "int8": quantize(copy.deepcopy(model))}
        sides["bfloat16"] = copy.deepcopy(model).bfloat16()
        losses = {name: window_losses(side, shards, depths, 512)[0].numpy() for name, side in sides.items()}
        found |= {"ckpt": args.ckpt, "tokens": 512 * shards.block_size}
        found["float32"] = losses["float32"].mean(0).tolist()
        for name in ("int8", "bfloat16"):
            gaps = (losses[name] - losses["float32"]).T
            found[f"{name}_costs"] = [[float(gap.mean()), mean_stderr(gap)] for gap in gaps]
    return found


def against_nanogpt(args):
    """Tokens/s of about 10M parameters at r = 1, batch 1, over 256 new tokens, beside nanoGPT's generate."""
    flags = (
        "--block_size=512 --n_embd=384 --ffn_dim=1024 --n_attn_heads=6 --n_head_blocks=2 --n_tail_blocks=2"
    )
    config = load_config([f"{ROOT}/config/abbie_tiny.py", *flags.split(), "--device=cpu"])
    theirs = load_nanogpt(args.nanogpt, config, vocab_size=257)[0].eval()
    ours = lay_out_for_decoding(AbbIE(config.model_config(257)).eval())
    sides = {
        "ours": partial(generate, ours, [[1] * 16], 256, 1),
        "nanogpt": partial(theirs.generate, torch.ones(1, 16, dtype=torch.long), 256),
    }
    seconds = race(sides, args.rounds)
    return {
        "parameters": {"ours": ours.n_params(), "nanogpt": theirs.get_num_params()},
        "new_tokens": 256,
        "tokens_per_s": {name: 256 / took for name, took in seconds.items()},
        "ours_over_nanogpt": seconds["nanogpt"] / seconds["ours"],
    }


MEASURES = {
    "draft": measure_draft,
    "hugging_face": against_hugging_face,
    "int8": measure_int8,
    "nanogpt": against_nanogpt,
}


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.decoding", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=MEASURES)
    parser.add_argument("--ckpt")
    parser.add_argument("--data", help="folder of validation text (default: the checkpoint's)")
    parser.add_argument("--nanogpt", default="", help="a clone of nanoGPT")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    for part in args.parts:
        print(part, flush=True)
        record = {
            "what": part,
            "command": "python -m experiments.decoding " + shlex.join(argv),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "torch": torch.__version__,
            "device": train.versions(torch.device("cpu"))["device"],
            **MEASURES[part](args),
        }
        print(json.dumps(record), flush=True)
        append("decoding", record, args.results)


if __name__ == "__main__":
    cli(main)
