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
from config import cli, load_config
from hf import export
from model import UserError

SMALL = """
data = "shards"
block_size, n_embd, n_attn_heads, ffn_dim = 32, 32, 4, 48
n_head_blocks, n_body_blocks, n_tail_blocks = 1, 1, 1
tokens_per_step, micro_batch, max_steps, device, dtype = 64, 2, 2, "cpu", "float32"
"""
PIQA = {"goal": "Find honey", "sol1": "ask a bee", "sol2": "ask an ox", "label": 1}
ARC = {"question": "Who?", "answerKey": "B", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
TASKS = {"piqa/validation": PIQA, "arc_easy/test": ARC, "lambada_openai/test": {"text": "It rained again"}}
# What stands in place of a value of a JSON file, or of the whole file.
WRONG = (None, 3, -1, 2.5, "x", True, [], {}, [1], {"a": 1})
DAMAGED = (b"", b"{", b"[" * 100_000, b"\xff\xfe\0", b"[1, 2]", b"7")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The working folder: a config file, shards, a run, a model's export, rows of tasks, and odd files."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("text.txt", "val.txt"):
        (folder / name).write_text(f"the bee of {name} flies home again, and the ox sleeps on\n" * 20)
    texts = ["--input", str(folder / "text.txt"), "--val_input", str(folder / "val.txt")]
    prepare_data.main(["text", *texts, "--out", str(folder / "shards")])
    model = make(vocab_size=257, block_size=64)
    save(folder / "out/run", 1, model, data="shards")
    model.meta = {"tokenizer": "bytes"}
    export.export(model, folder / "export")
    shape = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_attention_heads=4))
    shutil.copytree(folder / "export", folder / "llama")
    llama.save_pretrained(folder / "llama")
    model.norm.weight.data *= 1e38
    model.embed.weight.data *= 1e5
    save(folder / "diverged", 1, model, data="shards")
    for name, row in TASKS.items():
        (folder / f"icl/{name}.jsonl").parent.mkdir(parents=True)
        (folder / f"icl/{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = {"small.py": SMALL, "misspelt.py": "n_embed = 3"}
    files |= {"typed.py": "seed = 1.0", "cut.py": "n_embd = = 3"}
    files |= {"my.txt": "some text\n", "my.csv": "a,b\n", "bad.jsonl": '{"text": 3}\n', "empty.txt": ""}
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def files() -> list:
    """Everything below the working folder, and when it was changed."""
    return sorted((str(path), path.is_dir() or path.stat().st_mtime_ns) for path in Path().rglob("*"))


def start(command: str):
    """Run 'train small.py --lr=1' or 'experiments.plot loss' in this process."""
    script, *argv = shlex.split(command)
    importlib.import_module(script).main(argv)


MISTAKES = {
    # config files and flags of train.py
    "train": "CONFIG.py",
    "train abbie_tiny": "did you mean config/abbie_tiny.py",
    "train misspelt.py": "misspelt.py: unknown key n_embed (did you mean n_embd?)",
    "train typed.py": "typed.py: seed=1.0 is not int",
    "train cut.py": "cut.py: SyntaxError",
    "train small.py --itrs=2": "did you mean --iters",
    "train small.py --max_steps=1.5": "--max_steps=1.5 is not int",
    "train small.py --tie_embeddings=maybe": "--tie_embeddings=maybe is not bool",
    "train small.py --rule=abie_d": "rule='abie_d' is none of abbie_d",
    "train small.py --rule=abbie_d_literal --iters=2-64": "abbie_d_literal runs at 48 iterations at most",
    "train small.py --rule=abbie_d_literal --eval_iters=64": "abbie_d_literal runs at 48 iterations at most",
    "train small.py --iters=3-1": "iters='3-1': give an integer from 1 to 128",
    "train small.py --eval_iters=1,x": "eval_iters='1,x'",
    "train small.py --tokens_per_step=77": "tokens_per_step=77 is no multiple",
    "train small.py --micro_batch=3 --tokens_per_step=256": "micro_batch 3",
    "train small.py --compile=yes": "compile='yes' is none of auto, on, off",
    "train small.py --decay_frac=2": "decay_frac=2.0 must be from 0 to 1",
    "train small.py --beta2=1": "beta2=1.0 must be from 0 to 0.99999",
    "train small.py --lr=nan": "--lr=nan is not float",
    "train small.py --tokens_per_param=inf": "--tokens_per_param=inf is not float",
    f"train small.py --seed={2**64}": f"seed={2**64} must be from 0",
    "train small.py --vocab_size=256": "less than the 257 of the data",
    "train small.py --n_embd=36": "n_embd=36 is no even multiple of n_attn_heads=4",
    "train small.py --block_size=1048576 --tokens_per_step=1048576": "no window of 1048576 + 1",
    # places
    "train small.py --data=nowhere": "prepare_data.py text --input FILE_OR_DIR --out nowhere",
    "train small.py --data=data/c4": "prepare_data.py c4 --out data/c4",
    "train small.py --data=icl": "prepare_data.py text --input icl --out data/icl",
    "train small.py --data=my.txt": "prepare_data.py text --input my.txt --out data/my",
    "train small.py --out_dir=new --device=mps": "device=mps cannot be used",
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
    "sample --ckpt=diverged --lens --prompt=abc": "predictions are not finite",
    # sample.py's flags
    "sample --promt=a": "did you mean --prompt?",
    "sample --draft_iters=2": "draft_iters=2 must be below iters=2",
    "sample --draft_iters=1 --cache=last": "drafting needs cache=full",
    "sample --draft_iters=1 --exit=kl:1": "exclude each other",
    "sample --exit=u:1e-2": "--exit: invalid kl_nats value: 'u:1e-2'",
    "sample --exit=kl:-1": "early_exit=-1.0 must be at least 0",
    "sample --temperature=nan": "temperature=nan",
    "sample --top_p=0": "top_p=0",
    "sample --max_new_tokens=0": "max_new_tokens=0",
    "sample --cache=half": "neither full nor last",
    "sample --iters=129": "iters='129'",
    "sample --device=banana": "device=banana cannot be used",
    # eval_icl.py
    "eval_icl --ckpt=diverged --limit=2 --out=r.json": "the model is not finite: at iters [1, 2, 4, 8]",
    "eval_icl --tasks=arc_esy": "did you mean arc_easy",
    "eval_icl --tasks=sciq --data_dir=icl": "python prepare_data.py icl --out icl",
    "eval_icl --limit=0": "at least 1",
    "eval_icl --batch_size=0": "at least 1",
    "eval_icl --iters=1,x": "give integers",
    "eval_icl --limit=2 --out=nowhere/r.json": "nowhere/r.json cannot be written",
    "eval_icl --limit=2 --log_samples=.": ". cannot be written",
    "eval_icl --ppl=nowhere": "--ppl of eval_icl.py",
    # prepare_data.py
    "prepare_data": "COMMAND",
    "prepare_data text --input nowhere.txt --out new": "nowhere.txt",
    "prepare_data text --input my.csv --out new": "my.csv: no file that can be read",
    "prepare_data text --input my.txt --val_input . --out new": "my.txt is in both",
    "prepare_data text --input my.txt --out new --val_fraktion=1": "--val_fraction",
    "prepare_data text --input my.txt --out new --val_fraction=1": "--val_fraction",
    "prepare_data text --input my.txt --out new --tokenizer=gpt3": "unknown tokenizer 'gpt3'",
    "prepare_data text --input my.txt --out shards": "shards holds other data",
    "prepare_data text --input my.txt --out my.txt": "my.txt",
    "prepare_data c4 --out new --shards=2000": "1024",
    "prepare_data icl --out new --tasks=hellaswag,hellswag": "hellswag",
    # the rest
    "hf.export": "--out",
    "hf.export --out=new --iters=200": "from 1 to 128",
    "hf.export --out=shards": "shards is there already",
    "hf.export --out=my.txt/new": "my.txt/new could not be written",
    "experiments.study --row=abbie_e": "no row abbie_e (did you mean abbie_d",
    "experiments.study --max_steps=3": "need --row",
    "experiments.study --row=std --max_step=3 --out=new --results=new": "did you mean --max_steps",
    "experiments.plot nope": "no figure nope",
    "experiments.plot loss --results=nowhere": "experiments.study --row abbie_d_2_8k",
    "experiments.speed nanogpt": "git clone https://github.com/karpathy/nanoGPT",
    "experiments.speed hugging_face --rounds=0": "--rounds=0 must be at least 1",
    "experiments.chains --ckpt=nowhere": "nowhere is no checkpoint",
    "experiments.gpu --parts=step": "no part step",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_touched(place, command, capsys, monkeypatch):
    before = files()
    with pytest.raises((UserError, OSError)) as error:
        start(command)
    assert files() == before
    assert len(str(error.value).splitlines()) <= 3
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        cli(lambda argv: start(command))
    assert end.value.code == 2 and MISTAKES[command] in capsys.readouterr().err


def variants(value, keys=()):
    """(keys, a copy of the JSON value in which what stands there is missing or wrong), one at a time."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*keys, key), {name: value[name] for name in value if name != key}
            for at, changed in variants(inner, (*keys, key)):
                yield at, {**value, key: changed}
    for wrong in WRONG:
        yield keys, wrong


RUN, EVAL = "out/run/step_00000001", "eval_icl --iters=1 --tasks="
SAMPLE = "sample --max_new_tokens=1 --ckpt=hf:"
FORGED = {  # file: a command that reads it, keys without which it is refused
    f"{RUN}/config.json": (f"{EVAL}lastword --limit=2", {"n_embd", "rule", "tokenizer", "data"}),
    "shards/meta.json": (f"{EVAL}lastword --limit=2 --ppl", {"tokenizer", "splits"}),
    "export/config.json": (f"{SAMPLE}export", {"block_size", "iters"}),
    "llama/config.json": (f"{SAMPLE}llama", {"hidden_size"}),
    "llama/generation_config.json": (f"{SAMPLE}llama", set()),
    "llama/tokenizer_config.json": (f"{SAMPLE}llama", set()),
}
for task, row in TASKS.items():
    name = task.partition("/")[0]
    FORGED[f"icl/{task}.jsonl"] = (f"{EVAL}{name} --data_dir=icl", set(row))


@pytest.mark.parametrize("path", FORGED)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_one_short_error_or_none(place, path, capsys):
    """A key that is missing, or a value of another type: where it matters it is refused, and never a
    traceback."""
    path, (command, needed) = Path(path), FORGED[path]
    whole, refused = path.read_bytes(), set()
    contents = [(keys, json.dumps(value).encode()) for keys, value in variants(json.loads(whole))]
    contents += [((), data) for data in DAMAGED]
    try:
        for keys, data in contents:
            path.write_bytes(data)
            try:
                start(command)
            except UserError as error:
                assert 1 <= len(str(error).splitlines()) <= 3
                refused.add(keys[:1])
    finally:
        path.write_bytes(whole)
    assert {(key,) for key in needed} <= refused
    start(command)


def test_a_tokenizer_json_that_is_none_is_named(place):
    path = Path("llama/tokenizer.json")
    whole = path.read_bytes()
    for data in (*DAMAGED, whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="tokenizer.json is missing or damaged"):
            start("sample --ckpt=hf:llama")
    path.write_bytes(whole)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_config_file_loads(path):
    assert load_config([str(path)]).model_config(257)
