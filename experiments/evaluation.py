"""How good, how right and how fast the evaluation is. Adds lines to results/evaluation.jsonl.

    python -m experiments.evaluation tiny --ckpt out/abbie_tiny      # a model at every r, and its fixed point
    python -m experiments.evaluation speed                           # what one sweep and shared contexts save
    python -m experiments.evaluation parity --vocab DIR --limit 200  # against the real lm-evaluation-harness

speed and parity read the tasks in --data_dir (python prepare_data.py icl). Their seconds are CPU seconds on
one thread, the sides in turn, so that other work on the machine disturbs them little.

speed takes the shape of config/abbie_tiny.py (1 + 2 + 1 blocks, bytes) with random weights, where the blocks
and not the vocabulary are the cost. A sweep to 8 with one Tail is 1 + 16 + 1 = 18 blocks, with four Tails 21.

parity puts the same model through eval_icl.py and through the harness: are all scores equal, and which is
faster? The harness's side is as far from ours as can be: its own task files on the same rows, its Hugging
Face model class around our network, Hugging Face's tokenizer, right-padded batches of whole sequences. The
network has random weights, large enough for its answers to differ from example to example. DIR holds GPT-2's
two vocabulary files; pip install lm_eval==0.4.13 transformers accelerate.
"""

import copy
import json
import logging
import shlex
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoint import load_model
from config import ArgumentParser, cli, load_config, parse_list
from data import Shards, get_tokenizer
from eval_icl import encode_requests, perplexity, print_table, run_task, run_tasks, score
from experiments import RESULTS, ROOT, append
from model import AbbIE, AbbIEConfig, UserError, check
from tasks import DOWNLOADED, TASKS, load_tasks

# ------------------------------------------------------------------------------------------------ convergence


@torch.no_grad()
def convergence(model: AbbIE, idx: Tensor, iters: int) -> dict:
    """idx (B, T), B >= 2 -> for every r up to `iters`, means over tokens of what happens to u, the state
    that the Tail reads, brought to unit RMS:

        change, cosine          of u against the u of the iteration before (change: relative distance)
        settled                 the fraction of tokens whose argmax is the same from this r to the last
        from_zero, from_noise,  path independence: the relative distance of this u from the one that starts
        from_other              at zeros, at noise as large as the Head's output, or at another row's h
    """
    rope = model.rope(idx)
    h = model.run_head(idx, rope)
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
    noise *= h.square().mean().sqrt()
    others = {"from_zero": torch.zeros_like(h), "from_noise": noise, "from_other": h.roll(1, 0)}
    x, before, argmax, result = model.start(h), None, [], {}
    for k in range(iters):
        u, x = model.advance(x, h, k, k + 1, rope)
        now, entry = at_unit_rms(u), {}
        if before is not None:
            entry["change"] = distance(now, before)
            entry["cosine"] = F.cosine_similarity(now, before, dim=-1).mean().item()
        argmax.append(model.logits(model.run_tail(u, rope)).argmax(-1))
        for name, state in others.items():
            u, others[name] = model.advance(state, h, k, k + 1, rope)
            entry[name] = distance(at_unit_rms(u), now)
        before, result[str(k + 1)] = now, entry
    argmax = torch.stack(argmax)  # (iters, B, T)
    stays = (argmax == argmax[-1]).flip(0).cumprod(0).flip(0)
    for r, fraction in enumerate(stays.float().mean((1, 2)).tolist(), 1):
        result[str(r)]["settled"] = fraction
    return result


def at_unit_rms(u: Tensor) -> Tensor:
    return F.rms_norm(u.float(), u.shape[-1:])


def distance(u: Tensor, v: Tensor) -> float:
    """Mean over tokens of |u - v| / |v|."""
    return ((u - v).norm(dim=-1) / v.norm(dim=-1)).mean().item()


def convergence_of(model: AbbIE, shards: Shards, iters: int, model_class=AbbIE) -> dict:
    """`convergence` on eight windows, and the control: the same of a model with fresh weights."""
    n, device = min(8, shards.n_windows), model.embed.weight.device
    idx = shards.batch(np.arange(n) * shards.n_windows // n)[0].to(device)
    torch.manual_seed(0)
    untrained = model_class(model.config).to(device)
    found = {"trained": convergence(model, idx, iters), "untrained": convergence(untrained, idx, iters)}
    return {"n": idx.numel(), **found}


def print_convergence(found: dict, iters: list[int]):
    print(
        f"convergence, mean over {found['n']} tokens\n{'':25s}" + "".join(f"{f'r={r}':>10s}" for r in iters)
    )
    for quantity in ("change", "cosine", "settled", "from_zero", "from_noise", "from_other"):
        for which in ("trained", "untrained"):
            values = [found[which][str(r)].get(quantity, float("nan")) for r in iters]
            print(f"  {quantity:12s}{which:11s}" + "".join(f"{value:>10.3g}" for value in values))


def measure_tiny(args) -> dict:
    """A trained model at every r, on its own validation split."""
    check(bool(args.ckpt), "say which model: --ckpt out/NAME")
    model, iters = load_model(args.ckpt).eval(), parse_list(args.iters, "iters")
    shards = Shards(model.meta["data"], "val", model.config.block_size)
    result = {"ckpt": model.meta["ckpt"], "trained_iters": model.config.mean_iters}
    tokenizer = get_tokenizer(model.meta["tokenizer"])
    result |= run_tasks(model, tokenizer, ["cloze", "lastword"], iters, shards.folder, limit=args.limit)
    result["ppl"] = perplexity(model, shards, iters)
    result["convergence"] = convergence_of(model, shards, max(iters))
    print_table(result)
    print_convergence(result["convergence"], iters)
    return result


# ------------------------------------------------------------------------------------------------------ speed


def measure_speed(args) -> dict:
    """All r from one sweep against each alone, and contexts read once against once per continuation."""
    torch.manual_seed(0)
    tokenizer, limit = get_tokenizer("bytes"), args.limit or 64
    config = load_config([f"{ROOT}/config/abbie_tiny.py", "--block_size=1024"])  # room for every row
    model, result = AbbIE(config.model_config(tokenizer.n_vocab)), {"rows": limit, "tasks": {}}
    for name in ("hellaswag", "arc_easy"):
        examples = load_tasks([name], None, args.data_dir, model.config.block_size, limit)[name]
        choices = [example.requests for example in examples]
        most = max(len(requests) for requests in choices)
        shared = encode_requests(tokenizer, [request for requests in choices for request in requests])
        # The first choice of every row, then the second, ...: no neighbours have a context in common.
        apart = [requests[i] for i in range(most) for requests in choices if i < len(requests)]
        apart = encode_requests(tokenizer, apart)
        sides = {  # name: requests, and the iters of each sweep
            "1,2,4,8": (shared, [[1, 2, 4, 8]]),
            "8": (shared, [[8]]),
            "8, contexts not shared": (apart, [[8]]),
            "each r alone": (shared, [[1], [2], [4], [8]]),
        }
        seconds = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, (requests, sweeps) in sides.items():
                start = time.process_time()
                for iters in sweeps:
                    score(model, requests, iters)
                seconds[side].append(time.process_time() - start)
        median = {side: statistics.median(times) for side, times in seconds.items()}
        result["tasks"][name] = {
            "requests": len(shared),
            "cpu_seconds": seconds,
            "all_over_8_alone": median["1,2,4,8"] / median["8"],
            "each_alone_over_all": median["each r alone"] / median["1,2,4,8"],
            "not_shared_over_shared": median["8, contexts not shared"] / median["8"],
        }
        print(name, json.dumps(result["tasks"][name]))
    return result


# ----------------------------------------------------------------------------------------------------- parity


def make_model(seed: int = 0) -> AbbIE:
    torch.manual_seed(seed)
    shape = {"n_embd": 64, "n_attn_heads": 2, "ffn_dim": 176}
    blocks = {"n_head_blocks": 1, "n_body_blocks": 2, "n_tail_blocks": 1}
    model = AbbIE(AbbIEConfig(vocab_size=50257, block_size=1024, **shape, **blocks))
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 4
    return model


def hugging_face(model: AbbIE, iters: int):
    """The model at one r, as the harness expects a Hugging Face model."""
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    shape = {"max_position_embeddings": model.config.block_size, "vocab_size": model.config.vocab_size}

    class Wrapped(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self):
            super().__init__(PretrainedConfig(**shape))
            self.inner = model
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, input_ids, attention_mask=None, **kwargs):
            return CausalLMOutput(logits=model(input_ids, iters=iters)[0])

    return Wrapped()


def gpt2_tokenizer(vocab: Path):
    """Hugging Face's GPT-2 tokenizer from the original files, under their own names or tiktoken's."""
    from transformers import GPT2TokenizerFast

    names = {
        "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    }
    for name, key in names.items():
        there = (vocab / name).exists() or (vocab / key).exists()
        check(there, f"{vocab} holds neither {name} nor {key}\ngive the folder of both with --vocab")
    encoder, merges = (next(p for p in (vocab / n, vocab / key) if p.exists()) for n, key in names.items())
    lines = merges.read_text().splitlines()
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
    return GPT2TokenizerFast(vocab=json.loads(encoder.read_text()), merges=pairs, **special)


def harness_task(name: str, data_dir: Path) -> dict:
    """The harness's own definition, with nothing changed but where the rows lie."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    split = TASKS[name].split
    config = load_yaml(TaskManager().task_index[name].yaml_path, resolve_func=True)
    config.update(
        task=name, dataset_path="json", dataset_name=None, training_split=None, validation_split=None
    )
    config["dataset_kwargs"] = {"data_files": {split: str(data_dir / name / f"{split}.jsonl")}}
    config[f"{split}_split"] = split
    return config


def run_harness(model, name: str, args):
    """-> seconds of scoring, metrics, and per example its log-likelihoods, each with whether it is greedy."""
    from lm_eval import simple_evaluate

    seconds, inner = [], model.loglikelihood

    def timed(requests, **kwargs):
        start = time.process_time()
        result = inner(requests, **kwargs)
        seconds.append(time.process_time() - start)
        return result

    model.loglikelihood = timed
    found = simple_evaluate(
        model, tasks=[harness_task(name, args.data_dir)], limit=args.limit, log_samples=True,
        bootstrap_iters=args.bootstrap_iters,
    )  # fmt: skip
    model.loglikelihood = inner
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    scores = [(float(ll), str(hit) == "True") for sample in samples for [(ll, hit)] in sample["resps"]]
    metrics = {key.split(",")[0]: value for key, value in found["results"][name].items() if "," in key}
    return sum(seconds), metrics, scores


def in_double(model: AbbIE, request: tuple[list[int], list[int]], iters: int) -> float:
    """The log-likelihood of one request with everything in fp64."""
    context, continuation = request
    ids = torch.tensor([(context + continuation)[:-1]])
    logits = copy.deepcopy(model).double()(ids, iters=iters)[0][0, -len(continuation) :]
    return logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()


def measure_parity(args) -> dict:
    """Every task of which there are rows, example by example."""
    try:
        import transformers
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError(
            "parity needs packages\npip install lm_eval==0.4.13 transformers accelerate"
        ) from None
    check(args.vocab is not None, "parity needs GPT-2's two vocabulary files: --vocab DIR")
    logging.disable(logging.WARNING)
    model, tokenizer, iters = make_model(), get_tokenizer("gpt2"), 3
    theirs = HFLM(hugging_face(model, iters), tokenizer=gpt2_tokenizer(args.vocab), batch_size=32)
    there = [name for name in DOWNLOADED if Path(args.data_dir, name, f"{TASKS[name].split}.jsonl").is_file()]
    check(bool(there), f"{args.data_dir} holds no task\npython prepare_data.py icl --out {args.data_dir}")
    result = {
        "iters": iters, "n_params": model.n_params(), "bootstrap_iters": args.bootstrap_iters,
        "torch": torch.__version__, "transformers": transformers.__version__, "lm_eval": version("lm_eval"),
        "tasks": {},
    }  # fmt: skip
    for name in there:
        examples = load_tasks([name], None, args.data_dir, model.config.block_size, args.limit)[name]
        seconds, metrics, scores = run_harness(theirs, name, args)
        start = time.process_time()
        requests = encode_requests(
            tokenizer, [request for example in examples for request in example.requests]
        )
        lls, greedy, truncated, _ = score(model, requests, [iters])
        ours, lls, greedy = time.process_time() - start, lls[:, 0], greedy[:, 0]
        difference = np.abs(lls - [ll for ll, _ in scores])
        own = run_task(model, tokenizer, name, examples, [iters], bootstrap_iters=args.bootstrap_iters)
        own = own["iters"][str(iters)]
        result["tasks"][name] = entry = {
            "examples": len(examples),
            "requests": len(requests),
            "truncated": len(truncated),
            "max_abs_difference": float(difference.max()),
            "above_1e-4": int((difference > 1e-4).sum()),
            "lowest_loglikelihood": float(lls.min()),
            "mean_loglikelihood": float(lls.mean()),
            "greedy_differs": int((greedy != [hit for _, hit in scores]).sum()),
            "metrics": {
                metric: {"ours": own[metric], "harness": metrics[metric]}
                for metric in own
                if metric != "mean_iters"
            },
            "cpu_seconds": {"ours": ours, "harness": seconds},
            "times_as_fast": seconds / ours,
        }
        worst = np.flatnonzero(difference > 1e-4)
        if len(worst):  # which side is off? The harness adds up in fp32
            true = np.array([in_double(model, requests[i], iters) for i in worst])
            entry["against_fp64"] = {
                "ours": float(np.abs(lls[worst] - true).max()),
                "harness": float(np.abs([scores[i][0] for i in worst] - true).max()),
            }
        print(name, json.dumps(entry), flush=True)
    spent = [entry["cpu_seconds"] for entry in result["tasks"].values()]
    result["times_as_fast"] = sum(s["harness"] for s in spent) / sum(s["ours"] for s in spent)
    return result


MEASURES = {"tiny": measure_tiny, "speed": measure_speed, "parity": measure_parity}


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.evaluation", description=__doc__)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--ckpt", help="tiny: the model")
    parser.add_argument("--iters", default="1,2,3,4,8,16,32", help="tiny: where it is read")
    parser.add_argument("--data_dir", type=Path, default=Path("data/icl"))
    parser.add_argument("--vocab", type=Path, help="parity: folder of GPT-2's two vocabulary files")
    parser.add_argument("--limit", type=int, help="rows of each task")
    parser.add_argument("--rounds", type=int, default=5, help="speed: measurements of each side (5)")
    parser.add_argument("--bootstrap_iters", type=int, default=2000, help="parity: resamples for perplexity")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the records (results)")
    args = parser.parse_args(argv)
    if args.what != "tiny":
        torch.set_num_threads(1)
    command = "python -m experiments.evaluation " + shlex.join(argv)
    append("evaluation", {"what": args.what, "command": command, **MEASURES[args.what](args)}, args.results)


if __name__ == "__main__":
    cli(main)
