"""A checkpoint as a folder for transformers, which runs the looped model at any r:

    python -m hf.export --ckpt out/NAME --out FOLDER [--iters R]       # R: its r where a call does not say

It carries model.py, unchanged, and modeling_abbie.py, which wraps it; so it needs trust_remote_code=True.
Needs pip install safetensors tokenizers. What to do with the folder: hf/README.md.
"""

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python hf/export.py`

from checkpoint import load_model, read_json, sync, write_json, write_whole
from config import ArgumentParser, cli, optional
from data import get_tokenizer
from hf.llama import BYTE, HFTokenizer, copy_tokenizer
from model import AbbIE, UserError, check

ROOT = Path(__file__).resolve().parents[1]
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
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=False)
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


def write_tokenizer(meta: dict, folder: Path) -> int | None:
    """The tokenizer files of a model -> the id that ends a text."""
    name, path = meta["tokenizer"], folder / "tokenizer_config.json"
    # The names that generate takes: by default transformers 4 has token_type_ids too.
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["model_input_names"] = ["input_ids", "attention_mask"]
    if name.startswith("hf:"):
        copy = Path(meta.get("ckpt", "")) / "tokenizer.json"  # a checkpoint keeps one
        origin = str(copy.parent) if copy.exists() else name[3:]
        copy_tokenizer(origin, folder)
        write_json(path, {**config, **(read_json(path) if path.exists() else {})})
        return HFTokenizer(origin).eot_token
    if name not in ("bytes", "gpt2"):
        print(f"no tokenizer.json is written: of tiktoken's encodings only gpt2 has one, not {name}")
        return None
    encoding = get_tokenizer(name)
    (folder / "tokenizer.json").write_text(fast_tokenizer(encoding).to_str(pretty=True), encoding="utf-8")
    config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    write_json(path, {**config, "padding_side": "left", "clean_up_tokenization_spaces": False})
    return encoding.eot_token


# ----------------------------------------------------------------------------------------------------- export


def config_of(model: AbbIE, eot_token: int | None) -> dict:
    shape, tokenizer = asdict(model.config), model.meta["tokenizer"]
    shape["llama3_rope"] = shape.pop("rope_scaling")  # a name that transformers rewrites
    return {
        "architectures": ["AbbIEForCausalLM"], "model_type": "abbie", "dtype": "float32",
        "auto_map": {
            "AutoConfig": "modeling_abbie.AbbIEPretrainedConfig",
            "AutoModelForCausalLM": "modeling_abbie.AbbIEForCausalLM",
        },
        **shape, "bos_token_id": eot_token, "eos_token_id": eot_token, "pad_token_id": eot_token,
        "tokenizer": None if tokenizer.startswith("hf:") else tokenizer,  # None: the one beside the weights
    }  # fmt: skip


def write_folder(model: AbbIE, folder: Path, title: str, command: str):
    config = config_of(model, write_tokenizer(model.meta, folder))
    write_json(folder / "config.json", config)
    weights = {f"model.{name}": tensor for name, tensor in model.named_parameters()}  # tied ones once
    data = optional("safetensors.torch").save(weights, metadata={"format": "pt"})
    write_whole(folder / "model.safetensors", data)
    for source in (ROOT / "model.py", ROOT / "hf/modeling_abbie.py"):
        shutil.copyfile(source, folder / source.name)
    card = CARD.format(**config, name=title, parameters=model.n_params(), command=command)
    (folder / "README.md").write_text(card)
    sync(folder)


def export(model: AbbIE, folder: Path, command: str = "python -m hf.export"):
    """Write the model as a folder that transformers loads, whole or not at all."""
    folder = folder.expanduser().absolute()
    free = not folder.exists() or folder.is_dir() and not any(folder.iterdir())
    check(free, f"{folder} is there already, and no empty folder\ngive another, or remove it")
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_folder(model, temporary, folder.name, command)
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error.strerror or error})\nmake room") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m hf.export", description=__doc__)
    parser.add_argument("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="write the model there")
    parser.add_argument("--iters", type=int, help="its r where a call does not say (default: as trained)")
    args = parser.parse_args(argv)
    changes = {} if args.iters is None else {"iters": args.iters}
    model = load_model(args.ckpt, **changes)
    export(model, args.out, " ".join(("python -m hf.export", *argv)))
    c = model.config
    blocks = f"{c.n_head_blocks} + {c.n_body_blocks} x r + {c.n_tail_blocks} blocks"
    print(f"{args.out}: {c.rule}, {blocks}, r = {c.iters}")
    for path in sorted(args.out.iterdir()):
        print(f"{path.stat().st_size:14,d}  {path.name}")


if __name__ == "__main__":
    cli(main)
