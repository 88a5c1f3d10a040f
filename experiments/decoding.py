"""What decoding costs at r iterations, and what the ways around it save. Adds to results/decoding.jsonl.

    python -m experiments.decoding draft exit cache --ckpt out/NAME     # a trained model
    python -m experiments.decoding hugging_face                         # random weights; needs transformers
    python -m experiments.decoding nanogpt --nanogpt FOLDER             # random weights

Every ratio comes from one process, with the sides in turn; medians over rounds. FOLDER is a checkout of
github.com/karpathy/nanoGPT.
"""

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

from checkpoint import load_model
from config import ArgumentParser, cli, load_config
from data import Shards
from decode import KVCache, Stats, adaptive_step, generate, lay_out_for_decoding, parse_exit, step
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


def forced_loss(model, ids, iters, cache_mode="full", spec="", prompt=32):
    """Mean NLL in nats of tokens prompt + 1 ... of ids (B, T), decoded a token at a time, the iterations per
    token, and how many tokens ran how many."""
    looks = spec.startswith("kl")
    cache, stats, nll = KVCache(model.config, len(ids), iters, cache_mode, looks=looks), Stats(), []
    next_step, mean_iters = partial(step, model, cache=cache, iters=iters), iters
    if spec:
        how = {"cache": cache, "iters": iters, "rule": parse_exit(spec), "stats": stats}
        next_step = partial(adaptive_step, model, **how)
    logits = next_step(ids[:, :prompt])
    for t in range(prompt, ids.shape[1]):
        nll.append(F.cross_entropy(logits, ids[:, t]))
        logits = next_step(ids[:, t : t + 1])
    if spec:
        mean_iters = sum(k * n for k, n in stats.iters.items()) / stats.iters.total()
    return float(torch.stack(nll).mean()), mean_iters, {k: stats.iters[k] for k in sorted(stats.iters)}


@torch.no_grad()
def measure_exit(args):
    """Loss against mean iterations, with early exit beside fixed, and seconds per token at batch 1 and 8."""
    model = lay_out_for_decoding(load_model(args.ckpt).eval())
    ids = torch.tensor(windows(args, args.prompts, 160, model))
    prompts, rows, timed = ids[:8, :64].tolist(), [], {}
    sides = {f"iters {r}": (r, "") for r in (1, 2, 3, 4, 8)}
    sides |= {spec: (8, spec) for spec in ("kl:1e-2", "kl:1e-3", "kl:1e-4", "u:3e-2", "u:1e-2", "u:3e-3")}
    for B in (1, 8):
        runs = {}
        for name, (r, spec) in sides.items():
            runs[name] = partial(generate, model, prompts[:B], args.new_tokens, r, early_exit=spec)
        timed[B] = race(runs, args.rounds)
    for name, (r, spec) in sides.items():
        loss, mean_iters, histogram = forced_loss(model, ids, r, spec=spec)
        times = {f"batch {B}": timed[B][name] / timed[B]["iters 8"] for B in timed}
        row = {"how": name, "loss": loss, "mean_iters": mean_iters, "histogram": histogram}
        rows.append({**row, "time_vs_iters_8": times})
        print(rows[-1], flush=True)
    tokens = ids[:, 32:].numel()
    return {"model": shape(model), "tokens": tokens, "new_tokens": args.new_tokens, "rows": rows}


@torch.no_grad()
def measure_cache(args):
    """Bytes per token and loss of the two modes."""
    model, rows = load_model(args.ckpt).eval(), []
    ids = torch.tensor(windows(args, args.prompts, 160, model))
    for iters in (1, 2, 4, 8):
        for mode in ("full", "last"):
            loss = forced_loss(model, ids, iters, mode)[0]
            size = KVCache(model.config, 1, iters, mode).bytes_per_token
            rows.append({"iters": iters, "cache": mode, "loss": loss, "bytes_per_token": size})
            print(rows[-1], flush=True)
    return {"model": shape(model), "tokens": ids[:, 32:].numel(), "rows": rows}


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
    models = [AbbIE(config).eval() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    llama = as_hugging_face(models[0])
    ours, row_major = lay_out_for_decoding(models[0]), models[1]
    bfloat16 = lay_out_for_decoding(models[2].bfloat16())
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
    }


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
    "exit": measure_exit,
    "cache": measure_cache,
    "hugging_face": against_hugging_face,
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
            **MEASURES[part](args),
        }
        print(json.dumps(record), flush=True)
        append("decoding", record, args.results)


if __name__ == "__main__":
    cli(main)
