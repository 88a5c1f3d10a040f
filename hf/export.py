"""A checkpoint as a folder for transformers, which runs the looped model at any r:

    python -m hf.export --ckpt out/NAME --out FOLDER [--iters R]       # R: its r where a call does not say

It carries model.py, unchanged, and modeling_abbie.py, which wraps it; so it needs trust_remote_code=True.
Needs pip install safetensors tokenizers. What to do with the folder: hf/README.md.
"""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python hf/export.py`

from checkpoint import load_model, whole_folder, write_json, write_whole
from config import ArgumentParser, cli, optional
from data import get_tokenizer, tokenizer_in
from hf.llama import BYTE, copy_tokenizer, read_json_if_any
from model import AbbIE, check

ROOT = Path(__file__).resolve().parents[1]
END = "<|endoftext|>"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# AbbIE

A recurrent-depth language model (arXiv 2507.08567): rule `{rule}`, {n_head_blocks} + {n_body_blocks} x r +
{n_tail_blocks} blocks, {parameters:,} parameters, r = {iters} unless a call says `iters`. It is loaded with
`trust_remote_code=True`.
"""


def fast_tokenizer(encoding):
    """A tiktoken encoding that cuts text by GPT-2's pattern, or that merges nothing, as a Tokenizer."""
    tokenizers = optional("tokenizers")
    printed = {byte: character for character, byte in BYTE.items()}

    def spell(token: bytes) -> str:
        return "".join(printed[byte] for byte in token)

    ranks = encoding._mergeable_ranks
    merges = []  # tiktoken joins two parts wherever the whole is a token, that of the lowest rank first
    for token in sorted(ranks, key=ranks.get):
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((spell(token[:i]), spell(token[i:])))
    vocab = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END])  # whose id is the next one
    return tokenizer


def write_tokenizer(meta: dict, folder: Path) -> int | None:
    """The tokenizer files of a model -> the id that ends a text."""
    name, path = meta["tokenizer"], folder / "tokenizer_config.json"
    # The names that generate takes: by default transformers 4 has token_type_ids too.
    config = {"model_input_names": ["input_ids", "attention_mask"]}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if name.startswith("hf:"):
        tokenizer = tokenizer_in(meta.get("ckpt", ""), name)
        copy_tokenizer(str(tokenizer.folder), folder)
        config |= read_json_if_any(path)
    elif name in ("bytes", "gpt2"):
        tokenizer = get_tokenizer(name)
        write_whole(folder / "tokenizer.json", fast_tokenizer(tokenizer).to_str().encode())
        config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
        config |= {"padding_side": "left", "clean_up_tokenization_spaces": False}
    else:
        print(f"no tokenizer.json is written: of tiktoken's encodings only gpt2 has one, not {name}")
        return None
    write_json(path, config)
    return tokenizer.eot_token


def write_folder(model: AbbIE, folder: Path):
    tokenizer, eot_token = model.meta["tokenizer"], write_tokenizer(model.meta, folder)
    shape = asdict(model.config)
    shape["llama3_rope"] = shape.pop("rope_scaling")  # a name that transformers rewrites
    config = {
        "architectures": ["AbbIEForCausalLM"], "model_type": "abbie", "dtype": "float32",
        "auto_map": {
            "AutoConfig": "modeling_abbie.AbbIEPretrainedConfig",
            "AutoModelForCausalLM": "modeling_abbie.AbbIEForCausalLM",
        },
        **shape, "bos_token_id": eot_token, "eos_token_id": eot_token, "pad_token_id": eot_token,
        "tokenizer": None if tokenizer.startswith("hf:") else tokenizer,  # None: the one beside the weights
    }  # fmt: skip
    write_json(folder / "config.json", config)
    weights = {f"model.{name}": tensor for name, tensor in model.named_parameters()}  # tied ones once
    data = optional("safetensors.torch").save(weights, metadata={"format": "pt"})
    write_whole(folder / "model.safetensors", data)
    for source in (ROOT / "model.py", ROOT / "hf/modeling_abbie.py"):
        shutil.copyfile(source, folder / source.name)
    (folder / "README.md").write_text(CARD.format(**config, parameters=model.n_params()))


def export(model: AbbIE, folder: Path):
    """Write the model as a folder that transformers loads, whole or not at all."""
    folder = folder.expanduser().absolute()
    check(not folder.exists(), f"{folder} is there already\ngive another, or remove it")
    with whole_folder(folder) as temporary:
        write_folder(model, temporary)


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m hf.export", description=__doc__)
    parser.add_argument("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="write the model there")
    parser.add_argument("--iters", type=int, help="its r where a call does not say (default: as trained)")
    args = parser.parse_args(argv)
    changes = {} if args.iters is None else {"iters": args.iters}
    model = load_model(args.ckpt, **changes)
    export(model, args.out)
    c = model.config
    blocks = f"{c.n_head_blocks} + {c.n_body_blocks} x r + {c.n_tail_blocks} blocks"
    print(f"{args.out}: {c.rule}, {blocks}, r = {c.iters}")


if __name__ == "__main__":
    cli(main)
