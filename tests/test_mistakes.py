"""What users get wrong, and files that are not what they should be: every script says in three lines
what is wrong, ends with status 2, and leaves everything as it was."""

import importlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import transformers
from common import ROOT, make, save

import prepare_data
from config import cli
from hf import export
from model import UserError

SMALL = """
data = "shards"
block_size, n_embd, n_attn_heads, ffn_dim = 32, 32, 4, 48
n_head_blocks, n_body_blocks, n_tail_blocks = 1, 1, 1
tokens_per_step, micro_batch, max_steps, device, dtype = 64, 2, 2, "cpu", "float32"
"""
TEXT = "the bee flies home again, and the ox sleeps on\n"
CHOICES = {"text": ["a", "b"], "label": ["A", "B"]}
ROWS = {
    "icl/piqa/validation.jsonl": {"goal": "Find", "sol1": "a bee", "sol2": "an ox", "label": 1},
    "icl/arc_easy/test.jsonl": {"question": "Who?", "answerKey": "B", "choices": CHOICES},
    "icl/lambada_openai/test.jsonl": {"text": "It rained again"},
}
FILES = {path: json.dumps(row) for path, row in ROWS.items()}
FILES |= {"small.py": SMALL, "misspelt.py": "n_embed = 3", "typed.py": "seed = 1.0"}
FILES |= {"cut.py": "n_embd = = 3", "my.txt": "some text", "my.csv": "a,b", "latin.txt": "caf\xe9"}
FILES |= {"text.txt": TEXT * 20, "val.txt": TEXT * 10}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """The working folder: config files, texts, rows of tasks, shards, a run, an export, a Llama."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("place"))
        for name, text in FILES.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text, "latin-1")
        prepare_data.main("text --input text.txt --val_input val.txt --out shards".split())
        model = make(vocab_size=257, block_size=64)
        save(Path("out/run"), 1, model, data="shards")
        model.meta = {"tokenizer": "bytes"}
        export.export(model, Path("export"))
        shape = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        llama = transformers.LlamaConfig(**shape, num_attention_heads=4)
        shutil.copytree("export", "llama")
        transformers.LlamaForCausalLM(llama).save_pretrained("llama")
        model.norm.weight.data *= 1e38
        model.embed.weight.data *= 1e5
        save(Path("diverged"), 1, model, data="shards")
        yield


def files() -> list:
    """Everything below the working folder, and when it was changed."""
    return sorted((str(path), path.is_dir() or path.stat().st_mtime_ns) for path in Path().rglob("*"))


def start(command: str):
    """Run 'train small.py --lr=1' or 'experiments.plot loss' in this process."""
    script, *argv = shlex.split(command)
    importlib.import_module(script).main(argv)


MISTAKES = {
    "train abbie_tiny": "did you mean config/abbie_tiny.py",
    "train misspelt.py": "misspelt.py: unknown key n_embed (did you mean n_embd?)",
    "train typed.py": "typed.py: seed=1.0 is not int",
    "train cut.py": "cut.py: SyntaxError",
    "train small.py --itrs=2": "did you mean --iters",
    "train small.py --rule=abie_d": "rule='abie_d' is none of abbie_d",
    "train small.py --rule=abbie_d_literal --iters=2-64": "abbie_d_literal runs at 48 iterations at most",
    "train small.py --micro_batch=3 --tokens_per_step=256": "micro_batch 3",
    "train small.py --compile=yes": "compile='yes' is none of auto, on, off",
    "train small.py --block_size=1048576 --tokens_per_step=1048576": "no window of 1048576 + 1",
    "train small.py --data=nowhere": "prepare_data.py text --input FILE_OR_DIR --out nowhere",
    "train small.py --data=data/c4": "prepare_data.py c4 --out data/c4",
    "train small.py --data=icl": "prepare_data.py text --input icl --out data/icl",
    "train small.py --data=my.txt": "prepare_data.py text --input my.txt --out data/my",
    "train small.py --out_dir=new --init_from=nowhere": "nowhere is no checkpoint",
    "train small.py --out_dir=new --resume=nowhere": "nowhere is no checkpoint",
    "train small.py --out_dir=my.txt/run": "my.txt/run",
    f"train {ROOT}/config/chains.py": "python -m experiments.chains",
    "sample --ckpt=nowhere": "nowhere is no checkpoint: it has no model.pt\ngive a run folder",
    "sample --ckpt=export": "is hf:export",
    "sample --ckpt=owner/repo": "is hf:owner/repo",
    "sample --ckpt=hf:nowhere": "hf:nowhere: there is no such folder",
    "sample --prompt_file=nowhere": "No such file or directory: nowhere",
    "sample --prompt_file=latin.txt": "the prompt is no UTF-8 text",
    "sample --ckpt=diverged": "predictions are not finite",
    "sample --promt=a": "did you mean --prompt?",
    "sample --draft_iters=1 --cache=last": "drafting needs cache=full",
    "sample --draft_iters=1 --exit=kl:1": "exclude each other",
    "sample --exit=u:1e-2": "--exit=u:1e-2: give kl:1e-2",
    "sample --cache=half": "neither full nor last",
    "eval_icl --ckpt=diverged --limit=2 --out=r.json": "the model is not finite: at iters [1, 2, 4, 8]",
    "eval_icl --tasks=arc_esy": "did you mean arc_easy",
    "eval_icl --tasks=sciq --data_dir=icl": "python prepare_data.py icl --out icl",
    "eval_icl --iters=1,x": "give integers",
    "eval_icl --limit=0": "at least 1",
    "eval_icl --batch_size=0": "at least 1",
    "eval_icl --limit=2 --out=nowhere/r.json": "nowhere/r.json cannot be written",
    "eval_icl --ppl=nowhere": "--ppl of eval_icl.py",
    "prepare_data text --input nowhere.txt --out new": "nowhere.txt",
    "prepare_data text --input my.csv --out new": "my.csv: no file that can be read",
    "prepare_data text --input my.txt --val_input . --out new": "my.txt is in both",
    "prepare_data text --input my.txt --out new --val_fraction=1": "--val_fraction",
    "prepare_data text --input my.txt --out new --tokenizer=gpt3": "unknown tokenizer 'gpt3'",
    "prepare_data text --input my.txt --out shards": "shards holds other data",
    "prepare_data text --input my.txt --out my.txt": "my.txt",
    "prepare_data c4 --out new --shards=2000": "1024",
    "prepare_data icl --out new --tasks=hellaswag,hellswag": "hellswag",
    "hf.export --out=new --iters=200": "from 1 to 128",
    "hf.export --out=shards": "shards is there already",
    "hf.export --out=my.txt/new": "my.txt/new could not be saved",
    "experiments.study --row=abbie_e": "no row abbie_e (did you mean abbie_d",
    "experiments.study --max_steps=3": "need --row",
    "experiments.plot loss --results=nowhere": "experiments.study --row abbie_d_2_8k",
    "experiments.speed nanogpt": "git clone https://github.com/karpathy/nanoGPT",
    "experiments.chains --ckpt=nowhere": "nowhere is no checkpoint",
    "experiments.gpu --parts=step": "no part step",
}
# Values out of bounds: their key is named.
BOUNDS = {
    "train small.py": "max_steps=1.5 tie_embeddings=maybe lr=nan decay_frac=2 beta2=1 tokens_per_step=77",
    "train small.py --out_dir=new": "n_embd=36 tokens_per_param=inf vocab_size=256 device=mps",
    "sample": "draft_iters=2 temperature=nan top_p=0 max_new_tokens=0 device=banana",
    "eval_icl": "device=mps",
    "experiments.speed kernels": "rounds=0",
}
for script, flags in BOUNDS.items():
    MISTAKES |= {f"{script} --{flag}": flag for flag in flags.split()}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_touched(command, capsys, monkeypatch):
    before = files()
    with pytest.raises((UserError, OSError)) as error:
        start(command)
    assert files() == before and len(str(error.value).splitlines()) <= 3
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        cli(lambda argv: start(command))
    assert end.value.code == 2 and MISTAKES[command] in capsys.readouterr().err


# What stands in place of a value of a JSON file, and of the whole file.
WRONG = (None, 3, -1, 2.5, "x", True, [], {}, [1], {"a": 1})
DAMAGED = (b"", b"{", b"[" * 100_000, b"\xff\xfe\0", b"[1, 2]", b"7")


def variants(value):
    """Copies of a JSON value in which one part is missing or another."""
    yield from WRONG
    if isinstance(value, dict) and len(value) < 100:  # not within a vocabulary
        for key, inner in value.items():
            yield {name: value[name] for name in value if name != key}
            for changed in variants(inner):
                yield {**value, key: changed}


READERS = {  # file: a command that reads it
    "out/run/step_00000001/config.json": "eval_icl --tasks=lastword",
    "shards/meta.json": "eval_icl --tasks=lastword --ppl",
    "export/config.json": "sample --ckpt=hf:export",
    "llama/config.json": "sample --ckpt=hf:llama",
    "llama/generation_config.json": "sample --ckpt=hf:llama",
    "llama/tokenizer.json": "sample --ckpt=hf:llama",
}
READERS |= {path: f"eval_icl --data_dir=icl --tasks={path.split('/')[1]}" for path in ROWS}


@pytest.mark.parametrize("path", READERS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_one_short_error_and_a_forged_one_at_most(path):
    """Where a key is missing, or has a value of another type, a traceback never ends it."""
    path, command = Path(path), READERS[path]
    command += " --limit=2 --iters=1" if command.startswith("eval_icl") else " --max_new_tokens=1"
    whole, refused = path.read_bytes(), set()
    forged = [json.dumps(value).encode() for value in variants(json.loads(whole))]
    for data in (*forged, *DAMAGED):
        path.write_bytes(data)
        try:
            start(command)
        except UserError as error:
            assert 1 <= len(str(error).splitlines()) <= 3
            refused.add(data)
    assert refused >= set(DAMAGED)
    path.write_bytes(whole)
    start(command)
