"""A checkpoint as a folder for transformers: the looped model itself, or its r = 1 as a plain Llama.

    python -m hf.export --ckpt out/NAME --out FOLDER [--iters R]       # runs at any r; R by default
    python -m hf.export --ckpt out/NAME --out FOLDER --as llama

The first needs trust_remote_code=True: it carries model.py, unchanged, and modeling_abbie.py, which wraps it.
Needs pip install safetensors tokenizers.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from checkpoint import load_model, sha256
from config import ArgumentParser, cli, optional
from data import get_tokenizer
from hf.llama import BYTE, KEYS, TOKENIZER_FILES, find_folder, read_json, to_llama
from model import AbbIE, check

END = "<|endoftext|>"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A recurrent-depth language model (AbbIE, arXiv 2507.08567; rule `{rule}`): {n_head_blocks} blocks of the
Head, {n_body_blocks} of the Body, applied r times with the same weights, {n_tail_blocks} of the Tail. Width
{n_embd}, {parameters:,} parameters, context {block_size}; r = {iters} by default.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    ids = model.generate(**tokenizer("def ", return_tensors="pt"), iters=4, max_new_tokens=50)

Made by `{command}`.
"""


# -------------------------------------------------------------------------------------------------- tokenizer


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a byte-level BPE, in order: that of a token joins the two parts which the merges before
    it leave of the token's bytes."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def fast_tokenizer(encoding):
    """A tiktoken encoding that cuts text by GPT-2's pattern, or that merges nothing, as a Tokenizer."""
    tokenizers = optional("tokenizers")
    printed = {byte: character for character, byte in BYTE.items()}

    def spell(token: bytes) -> str:
        return "".join(printed[byte] for byte in token)

    ranks = encoding._mergeable_ranks
    vocab = {spell(token): rank for token, rank in ranks.items()}
    vocab[END] = encoding.eot_token
    merges = [(spell(a), spell(b)) for a, b in merges_of(ranks)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def write_tokenizer(name: str, folder: Path) -> dict:
    """The tokenizer files of a model -> the ids of its special tokens, for its config.json."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = dict.fromkeys(names)  # None is written too: left out they would be a Llama's, 1 and 2
    if name.startswith("hf:"):
        origin = find_folder(name[3:])
        for file in (*TOKENIZER_FILES, "generation_config.json"):
            if (origin / file).exists():
                shutil.copyfile(origin / file, folder / file)
        config = origin / "config.json"
        found = read_json(config) if config.exists() else {"eos_token_id": get_tokenizer(name).eot_token}
        return special | {key: value for key, value in found.items() if key in special}
    if name not in ("bytes", "gpt2"):
        print(f"no tokenizer.json: the tokens are {name or 'unknown'}")
        return special
    encoding = get_tokenizer(name)
    fast_tokenizer(encoding).save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    about |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    about["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return dict.fromkeys(special, encoding.eot_token)


# ---------------------------------------------------------------------------------------------------- configs


def abbie_config(model: AbbIE) -> dict:
    shape, tokenizer = asdict(model.config), model.meta.get("tokenizer", "")
    shape["llama3_rope"] = shape.pop("rope_scaling")  # a name that transformers rewrites
    if tokenizer.startswith("hf:") and Path(tokenizer[3:]).is_dir():
        tokenizer = None  # a folder of this machine: its copy beside the weights is meant from now on
    return {
        "architectures": ["AbbIEForCausalLM"], "model_type": "abbie", "dtype": "float32",
        "auto_map": {
            "AutoConfig": "modeling_abbie.AbbIEPretrainedConfig",
            "AutoModelForCausalLM": "modeling_abbie.AbbIEForCausalLM",
        },
        **shape, "cache_mode": "full", "tokenizer": tokenizer,
    }  # fmt: skip


def config_to_llama(model: AbbIE) -> dict:
    c = model.config
    rope = {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_base}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        **{theirs: getattr(c, ours) for ours, theirs in KEYS.items()}, "head_dim": c.attn_head_dim,
        "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
        "tie_word_embeddings": c.tie_embeddings,
        "rope_parameters": rope, "rope_scaling": c.rope_scaling,  # transformers 5, and 4 with rope_theta
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- export


def export(model: AbbIE, folder: Path, kind: str = "abbie", command: str = "hf.export"):
    """Write the model as a folder that transformers loads, whole or not at all."""
    save_file, rule = optional("safetensors.torch").save_file, model.config.rule
    name = type(model).__name__
    check(type(model) is AbbIE, f"an export holds model.py alone, which does not compute what {name} does")
    standard = rule not in ("abbie_d_literal", "zero_pt")
    check(kind == "abbie" or standard, f"rule {rule} is no Llama at r = 1\nleave out --as llama")
    free = not folder.exists() or folder.is_dir() and not any(folder.iterdir())
    check(free, f"{folder} is there already, and no empty folder\ngive another, or remove it")
    temporary = folder.absolute().parent / f".{folder.absolute().name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    weights = dict(model.named_parameters())  # tied ones once
    if kind == "llama":
        config, tensors = config_to_llama(model), to_llama(model.config, weights)
    else:
        config = abbie_config(model)
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    config |= write_tokenizer(model.meta.get("tokenizer", ""), temporary)
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    if kind == "abbie":
        here = Path(__file__).parent
        shutil.copyfile(here.parent / "model.py", temporary / "model.py")
        shutil.copyfile(here / "modeling_abbie.py", temporary / "modeling_abbie.py")
        manifest = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        about = {**config, "name": folder.name, "parameters": model.n_params(), "command": command}
        about["iters"] = model.config.mean_iters
        (temporary / "README.md").write_text(CARD.format(**about))
    os.replace(temporary, folder)


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m hf.export", description=__doc__)
    parser.add_argument("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="write the model there")
    parser.add_argument("--iters", type=int, help="what it runs at by default (default: as it was trained)")
    parser.add_argument("--as", dest="kind", choices=("abbie", "llama"), default="abbie")
    args = parser.parse_args(argv)
    check(args.kind == "abbie" or args.iters in (None, 1), "a Llama is the model at --iters 1")
    changes = {"iters": args.iters} if args.iters is not None else {}
    model = load_model(args.ckpt, **changes)
    export(model, args.out, args.kind, " ".join(("python -m hf.export", *argv)))
    c = model.config
    what = f"{c.rule}, {c.n_head_blocks} + {c.n_body_blocks} x r + {c.n_tail_blocks} blocks, iters {c.iters}"
    if args.kind == "llama":
        what = f"a Llama of {c.n_blocks} layers"
    print(f"{args.out}: {what}")
    for path in sorted(args.out.iterdir()):
        print(f"{path.stat().st_size:14,d}  {path.name}")


if __name__ == "__main__":
    cli(main)
