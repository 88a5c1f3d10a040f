"""The same model through eval_icl.py and through the real lm-evaluation-harness: are all scores equal, and
which is faster? Writes results/eval_parity.json, which holds no row of any task.

    pip install lm_eval==0.4.13 transformers accelerate
    python results/parity.py --data_dir data/icl --vocab DIR [--limit 200]    # GPT-2's two vocabulary files

The harness's side is as far from ours as can be: its own task files on the same rows, its Hugging Face model
class around our network, Hugging Face's tokenizer, right-padded batches of whole sequences. The network has
random weights, large enough for its answers to differ from example to example. Seconds are of CPU time on one
thread, which other work on the machine disturbs little; the two sides take turns, task by task.
"""

import copy
import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from config import ArgumentParser, cli  # noqa: E402
from eval_icl import TASKS, encode, load_tasks, run_task, score  # noqa: E402
from model import AbbIE, AbbIEConfig  # noqa: E402
from prepare_data import get_tokenizer  # noqa: E402


def make_model(seed: int = 0) -> AbbIE:
    torch.manual_seed(seed)
    model = AbbIE(AbbIEConfig(vocab_size=50257, block_size=1024, n_embd=64, n_attn_heads=2, ffn_dim=176,
                              n_head_blocks=1, n_body_blocks=2, n_tail_blocks=1))
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 4
    return model


def hugging_face(model: AbbIE, iters: int):
    """The model at one r, as the harness expects a Hugging Face model."""
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Wrapped(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self):
            super().__init__(PretrainedConfig(max_position_embeddings=model.config.block_size,
                                              vocab_size=model.config.vocab_size))
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
    names = {"encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
             "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"}
    encoder, merges = (next(p for p in (vocab / n, vocab / key) if p.exists()) for n, key in names.items())
    lines = merges.read_text().splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return GPT2TokenizerFast(vocab=json.loads(encoder.read_text()), merges=merges, unk_token="<|endoftext|>",
                             bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def harness_tasks(names: list[str], data_dir: Path) -> list[dict]:
    """The harness's own definitions, with nothing changed but where the rows lie."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    index, configs = TaskManager().task_index, []
    for name in names:
        split = TASKS[name].split
        config = load_yaml(index[name].yaml_path, resolve_func=True)
        config.update(task=name, dataset_path="json", dataset_name=None, training_split=None,
                      validation_split=None,
                      dataset_kwargs={"data_files": {split: str(data_dir / name / f"{split}.jsonl")}})
        config[f"{split}_split"] = split
        configs.append(config)
    return configs


def run_harness(model, name: str, data_dir: Path, limit: int | None, bootstrap_iters: int):
    """-> seconds of scoring, metrics, and per example its log-likelihoods, each with whether it is greedy."""
    from lm_eval import simple_evaluate
    seconds, inner = [], model.loglikelihood

    def timed(requests, **kwargs):
        start = time.process_time()
        result = inner(requests, **kwargs)
        seconds.append(time.process_time() - start)
        return result

    model.loglikelihood = timed
    found = simple_evaluate(model, tasks=harness_tasks([name], data_dir), limit=limit, log_samples=True,
                            bootstrap_iters=bootstrap_iters)
    model.loglikelihood = inner
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    scores = [[(float(ll), str(hit) == "True") for [(ll, hit)] in sample["resps"]] for sample in samples]
    metrics = {key.split(",")[0]: value for key, value in found["results"][name].items() if "," in key}
    return sum(seconds), metrics, scores


def in_double(model: AbbIE, request: tuple[list[int], list[int]], iters: int) -> float:
    """The log-likelihood of one request with everything in fp64."""
    context, continuation = request
    ids = torch.tensor([(context + continuation)[:-1]])
    logits = copy.deepcopy(model).double()(ids, iters=iters)[0][0, -len(continuation):]
    return logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()


def main(argv: list[str]):
    parser = ArgumentParser(prog="results/parity.py", description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data/icl"))
    parser.add_argument("--vocab", type=Path, required=True, help="folder of GPT-2's two vocabulary files")
    parser.add_argument("--limit", type=int, help="rows of each task (default: all)")
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--bootstrap_iters", type=int, default=2000)
    parser.add_argument("--out", default="results/eval_parity.json")
    args = parser.parse_args(argv)
    import transformers
    from lm_eval.models.huggingface import HFLM
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, tokenizer = make_model(), get_tokenizer("gpt2")
    theirs = HFLM(hugging_face(model, args.iters), tokenizer=gpt2_tokenizer(args.vocab), batch_size=32)
    names = [name for name, task in TASKS.items() if (args.data_dir / name / f"{task.split}.jsonl").is_file()]
    limit = f" --limit {args.limit}" if args.limit else ""
    result = {"command": f"python results/parity.py --data_dir DIR --vocab DIR{limit}", "iters": args.iters,
              "n_params": model.n_params(), "bootstrap_iters": args.bootstrap_iters,
              "torch": torch.__version__, "transformers": transformers.__version__,
              "lm_eval": version("lm_eval"), "tasks": {}}
    for name in names:
        examples = load_tasks([name], None, args.data_dir, model.config.block_size, args.limit)[name]
        seconds, metrics, scores = run_harness(theirs, name, args.data_dir, args.limit, args.bootstrap_iters)
        start = time.process_time()
        requests = encode(tokenizer, [request for example in examples for request in example.requests])
        lls, greedy, truncated = score(model, requests, [args.iters])
        ours = time.process_time() - start
        lls, flat = lls[:, 0], [pair for example in scores for pair in example]
        difference = np.abs(lls - [ll for ll, _ in flat])
        own = run_task(model, tokenizer, name, examples, [args.iters], bootstrap_iters=args.bootstrap_iters)
        own = own["iters"][str(args.iters)]
        result["tasks"][name] = entry = {
            "examples": len(examples), "requests": len(requests), "truncated": len(truncated),
            "max_abs_difference": float(difference.max()), "above_1e-4": int((difference > 1e-4).sum()),
            "lowest_loglikelihood": float(lls.min()), "mean_loglikelihood": float(lls.mean()),
            "greedy_differs": int((greedy[:, 0] != [g for _, g in flat]).sum()),
            "metrics": {metric: {"ours": own[metric], "harness": metrics[metric]} for metric in own},
            "cpu_seconds": {"ours": ours, "harness": seconds}, "times_as_fast": seconds / ours}
        if len(worst := np.flatnonzero(difference > 1e-4)):  # which side is off? The harness adds up in fp32
            true = np.array([in_double(model, requests[i], args.iters) for i in worst])
            entry["against_fp64"] = {"ours": float(np.abs(lls[worst] - true).max()),
                                     "harness": float(np.abs([flat[i][0] for i in worst] - true).max())}
        print(name, json.dumps(entry), flush=True)
    seconds = [entry["cpu_seconds"] for entry in result["tasks"].values()]
    result["times_as_fast"] = sum(s["harness"] for s in seconds) / sum(s["ours"] for s in seconds)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['times_as_fast']:.2f} times as fast; {args.out}")


if __name__ == "__main__":
    cli(main)
