"""What decoding costs at r iterations, and what the ways around it save: results/decoding.json.

    python results/decoding.py draft exit cache --ckpt out/NAME     # a trained model
    python results/decoding.py hugging_face                         # random weights; needs transformers
    python results/decoding.py nanogpt --nanogpt FOLDER             # random weights

Every ratio comes from one process, with the sides in turn; medians over rounds. Each part replaces its own
key of the file. FOLDER is a checkout of github.com/karpathy/nanoGPT.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from bench import load_nanogpt  # noqa: E402
from config import ArgumentParser, cli, load_config  # noqa: E402
from llama import export  # noqa: E402
from model import AbbIE, KVCache, UserError  # noqa: E402
from prepare_data import Shards  # noqa: E402
from sample import Stats, adaptive_step, generate, lay_out_for_decoding, parse_exit  # noqa: E402


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
    return (f"{c.n_head_blocks}+{c.n_body_blocks}+{c.n_tail_blocks} blocks, D {c.n_embd}, "
            f"{model.n_params():,} parameters, rule {c.rule}, trained at iters {c.iters}, "
            f"step {model.meta.get('step', 0)}")


def measure_draft(args):
    """Plain against drafted decoding, greedy: seconds, acceptance, and the speed-up that block counts predict
    at it, with a pass over several tokens counted as one over a single token."""
    model = lay_out_for_decoding(AbbIE.from_checkpoint(args.ckpt).eval())
    c, rows = model.config, []
    prompts = windows(args, args.prompts, 64, model)

    def run(iters, prompts, **keys):
        return [generate(model, [prompt], args.new_tokens, iters, **keys)[0] for prompt in prompts]

    for iters in (4, 8):
        options = [(d, g) for d in (1, 2) for g in (2, 4, 8)]
        seconds = race({None: partial(run, iters, prompts[:2]), **{
            (d, g): partial(run, iters, prompts[:2], draft_iters=d, draft_tokens=g) for d, g in options}},
            args.rounds)
        plain = run(iters, prompts)
        for d, g in options:
            stats = Stats()
            drafted = run(iters, prompts, draft_iters=d, draft_tokens=g, stats=stats)
            acceptance = stats.accepted / stats.drafted
            once = c.n_head_blocks + c.n_tail_blocks
            # a round: g drafted tokens, the Head and Body of the last one, then all of them on to iters
            blocks = g * (once + d * c.n_body_blocks) + once + iters * c.n_body_blocks
            rows.append({"iters": iters, "draft_iters": d, "draft_tokens": g, "acceptance": acceptance,
                         "speedup": seconds[None] / seconds[d, g],
                         "predicted": (1 + g * acceptance) * (once + iters * c.n_body_blocks) / blocks,
                         "prompts_equal_to_plain": sum(a == b for a, b in zip(drafted, plain))})
            print(rows[-1], flush=True)
    return {"model": shape(model), "prompts": len(prompts), "new_tokens": args.new_tokens, "rows": rows}


def forced_loss(model, ids, iters, cache_mode="full", exit="", prompt=32):
    """Mean NLL in nats of tokens prompt + 1 ... of ids (B, T), decoded a token at a time, the iterations per
    token, and how many tokens ran how many."""
    cache, stats, nll = KVCache(model.config, len(ids), iters, cache_mode), Stats(), []
    logits = model.step(ids[:, :prompt], cache, iters)
    for t in range(prompt, ids.shape[1]):
        nll.append(F.cross_entropy(logits, ids[:, t]))
        if exit:
            logits = adaptive_step(model, cache, iters, *parse_exit(exit), stats, ids[:, t:t + 1],
                                   list(range(len(ids))))
        else:
            logits = model.step(ids[:, t:t + 1], cache, iters)
    used = sum(k * n for k, n in stats.iters.items()) / max(1, stats.iters.total()) if exit else iters
    return float(torch.stack(nll).mean()), used, {k: stats.iters[k] for k in sorted(stats.iters)}


@torch.no_grad()
def measure_exit(args):
    """Loss against mean iterations, adaptive beside fixed, and seconds per token at batch 1 and 8."""
    model = lay_out_for_decoding(AbbIE.from_checkpoint(args.ckpt).eval())
    ids = torch.tensor(windows(args, args.prompts, 160, model))
    prompts, rows = ids[:8, :64].tolist(), []
    sides = {f"iters {r}": (r, "") for r in (1, 2, 3, 4, 8)}
    sides |= {exit: (8, exit) for exit in ("kl:1e-2", "kl:1e-3", "kl:1e-4", "u:3e-2", "u:1e-2", "u:3e-3")}
    timed = {B: race({name: partial(generate, model, prompts[:B], args.new_tokens, r, exit=exit)
                      for name, (r, exit) in sides.items()}, args.rounds) for B in (1, 8)}
    for name, (r, exit) in sides.items():
        loss, used, histogram = forced_loss(model, ids, r, exit=exit)
        rows.append({"how": name, "loss": loss, "mean_iters": used, "histogram": histogram,
                     "time_vs_iters_8": {f"batch {B}": timed[B][name] / timed[B]["iters 8"] for B in timed}})
        print(rows[-1], flush=True)
    return {"model": shape(model), "tokens": ids[:, 32:].numel(), "new_tokens": args.new_tokens, "rows": rows}


@torch.no_grad()
def measure_cache(args):
    """Bytes per token and loss of the two modes."""
    model, rows = AbbIE.from_checkpoint(args.ckpt).eval(), []
    ids = torch.tensor(windows(args, args.prompts, 160, model))
    for iters in (1, 2, 4, 8):
        for mode in ("full", "last"):
            rows.append({"iters": iters, "cache": mode, "loss": forced_loss(model, ids, iters, mode)[0],
                         "bytes_per_token": KVCache(model.config, 1, iters, mode).bytes_per_token})
            print(rows[-1], flush=True)
    return {"model": shape(model), "tokens": ids[:, 32:].numel(), "rows": rows}


def as_hugging_face(model):
    """The same weights as transformers' Llama."""
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        raise UserError("the comparison needs a package\npip install transformers safetensors") from None
    with tempfile.TemporaryDirectory() as temp:
        export(model, Path(temp, "llama"))
        return LlamaForCausalLM.from_pretrained(Path(temp, "llama"), dtype=torch.float32).eval()


@torch.no_grad()
def against_hugging_face(args):
    """Tokens/s of 124M parameters at r = 1, batch 1, beside transformers' generate and bare products."""
    config = load_config([str(ROOT / "config/abbie_124m.py")]).model_config(50257)
    models = [AbbIE(config).eval() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    llama, c = as_hugging_face(models[0]), config
    ours, row_major = lay_out_for_decoding(models[0]), models[1]
    bfloat16 = lay_out_for_decoding(models[2].bfloat16())
    n, prompt = args.new_tokens, list(range(100, 132))
    idx = torch.tensor([prompt])

    def hugging_face():
        ids = llama.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, min_new_tokens=n,
                             do_sample=False, pad_token_id=0)
        return ids[0, len(prompt):].tolist()

    weights = [m.weight for m in ours.modules() if isinstance(m, torch.nn.Linear)]
    rows = {w.shape[1]: torch.randn(1, 1, w.shape[1]) for w in weights}

    def bare_products():
        for _ in range(n):
            for w in weights:
                F.linear(rows[w.shape[1]], w)

    s = race({"ours": partial(generate, ours, [prompt], n, 1), "hugging_face": hugging_face,
              "row_major": partial(generate, row_major, [prompt], n, 1),
              "bfloat16": partial(generate, bfloat16, [prompt], n, 1), "bare_products": bare_products},
             args.rounds)
    same = sum(a == b for a, b in zip(hugging_face(), generate(ours, [prompt], n, 1)[0]))
    return {"model": f"{c.n_blocks} blocks, D {c.n_embd}, random weights, iters 1", "prompt": len(prompt),
            "new_tokens": n, "same_tokens": same, "tokens_per_s": {k: n / t for k, t in s.items()},
            "ours_over_hugging_face": s["hugging_face"] / s["ours"],
            "ours_over_bare_products": s["bare_products"] / s["ours"],
            "ours_over_row_major": s["row_major"] / s["ours"],
            "bfloat16_over_ours": s["ours"] / s["bfloat16"]}


def against_nanogpt(args):
    """Tokens/s of about 10M parameters at r = 1, batch 1, over 256 new tokens, beside nanoGPT's generate."""
    config = load_config([str(ROOT / "config/abbie_tiny.py"), "--block_size=512", "--n_embd=384",
                          "--ffn_dim=1024", "--n_attn_heads=6", "--n_head_blocks=2", "--n_tail_blocks=2",
                          "--device=cpu"])
    theirs = load_nanogpt(args.nanogpt, config, vocab_size=257)[0].eval()
    ours = lay_out_for_decoding(AbbIE(config.model_config(257)).eval())
    s = race({"ours": partial(generate, ours, [[1] * 16], 256, 1),
              "nanogpt": partial(theirs.generate, torch.ones(1, 16, dtype=torch.long), 256)}, args.rounds)
    return {"parameters": {"ours": ours.n_params(), "nanogpt": theirs.get_num_params()}, "new_tokens": 256,
            "tokens_per_s": {k: 256 / t for k, t in s.items()}, "ours_over_nanogpt": s["nanogpt"] / s["ours"]}


def main(argv: list[str]):
    parser = ArgumentParser(prog="results/decoding.py", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=["draft", "exit", "cache", "hugging_face", "nanogpt"])
    parser.add_argument("--ckpt")
    parser.add_argument("--data", help="folder of validation text (default: the checkpoint's)")
    parser.add_argument("--nanogpt")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--out", default=str(ROOT / "results/decoding.json"))
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    measures = {"draft": measure_draft, "exit": measure_exit, "cache": measure_cache,
                "hugging_face": against_hugging_face, "nanogpt": against_nanogpt}
    for part in args.parts:
        print(part, flush=True)
        result = {"command": "python results/decoding.py " + " ".join(argv),
                  "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0],
                  "torch": torch.__version__, **measures[part](args)}
        path = Path(args.out)
        print(json.dumps(result, indent=1), flush=True)
        whole = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**whole, part: result}, indent=1) + "\n")


if __name__ == "__main__":
    cli(main)
