"""Llama weights in and out, as Hugging Face folders: config.json, *.safetensors, tokenizer.json.

    python sample.py --ckpt hf:HuggingFaceTB/SmolLM2-135M --iters 2            # a repository, or hf:FOLDER
    python train.py config/abbie_124m.py --init_from=hf:FOLDER --iters=2       # the retrofit
    python llama.py --ckpt out/NAME --export FOLDER                            # for transformers to load

Our block is the Llama block, so a Llama of n layers is an AbbIE of n blocks once it is known where to cut:
into thirds, unless n_head_blocks and n_body_blocks say otherwise. At r = 1 it computes what it always has.
Needs pip install safetensors tokenizers, and huggingface_hub to download. Pickled weights are not read.
"""

import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from model import AbbIE, AbbIEConfig, UserError, find_checkpoint

COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_BLOCK_SIZE = 2048  # where block_size is not given: a cache holds block_size tokens; Llama 3.2 has 131072

# Keys of a config.json that change what is computed, and the one value at which our block computes the same.
PLAIN = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": None, "hidden_act": "silu",
         "attention_bias": False, "mlp_bias": False, "sliding_window": None, "use_sliding_window": False,
         "layer_types": None, "pretraining_tp": 1, "partial_rotary_factor": 1.0, "rope_interleaved": False,
         "quantization_config": None}


def table(c: AbbIEConfig):
    """The two naming schemes side by side: yields (our name, first row, their name, shape). Their tensor is
    the rows from `first` on of ours: their q, k, v make our qkv, and our vocabulary is padded at its end."""
    D, F, KV, vocab = c.n_embd, c.ffn_dim, c.n_kv_heads * c.attn_head_dim, (c.vocab_size, c.n_embd)
    block = [("attn_norm", "input_layernorm", (D,)),
             ("attn.qkv", "self_attn.q_proj", (D, D)),
             ("attn.qkv", "self_attn.k_proj", (KV, D)),
             ("attn.qkv", "self_attn.v_proj", (KV, D)),
             ("attn.proj", "self_attn.o_proj", (D, D)),
             ("mlp_norm", "post_attention_layernorm", (D,)),
             ("mlp.gate_up", "mlp.gate_proj", (F, D)),
             ("mlp.gate_up", "mlp.up_proj", (F, D)),
             ("mlp.down", "mlp.down_proj", (D, F))]
    pairs = [("embed", "model.embed_tokens", vocab), ("norm", "model.norm", (D,))]
    pairs += [] if c.tie_embeddings else [("unembed", "lm_head", vocab)]
    for i, name in enumerate(c.block_names):  # their layer i is our head.i, body.(i - n_head_blocks), ...
        pairs += [(f"{name}.{ours}", f"model.layers.{i}.{theirs}", shape) for ours, theirs, shape in block]
    filled = Counter()
    for ours, theirs, shape in pairs:
        yield f"{ours}.weight", filled[ours], f"{theirs}.weight", shape
        filled[ours] += shape[0]


# -------------------------------------------------------------------------------------------------------- in

def load_llama(path: str, device="cpu", n_head_blocks: int | None = None, n_body_blocks: int | None = None,
               **changes) -> AbbIE:
    """'hf:FOLDER' or 'hf:OWNER/REPO' -> the model in fp32; `changes` are keys of AbbIEConfig (rule, iters,
    block_size). What a rule adds (zero_pt's projection) starts at random. Raises UserError for a folder that
    is damaged, or that asks for anything which our block does not compute."""
    folder = find_folder(path.removeprefix("hf:"))
    config = read_config(folder / "config.json", n_head_blocks, n_body_blocks, changes)
    files, pieces = open_tensors(folder), list(table(config))
    names = {theirs for _, _, theirs, _ in pieces}
    spare = {name for name in files if name.endswith("rotary_emb.inv_freq")}  # old versions; computed here
    spare |= {"lm_head.weight"} if config.tie_embeddings else set()  # some write it, a copy of the embedding
    for what, found in (("lacks", names - set(files)), ("has unexpected", set(files) - names - spare)):
        if found:
            raise UserError(f"{folder} {what} tensors ({len(found)}, such as {min(found)})\n"
                            "its config.json and its weights do not belong together, or a file is missing")
    for _, _, theirs, shape in pieces:  # before memory is taken for them
        header = files[theirs].get_slice(theirs)
        if tuple(header.get_shape()) != shape or header.get_dtype() not in ("F32", "BF16", "F16"):
            raise UserError(f"{folder}: {theirs} is {header.get_dtype()} {list(header.get_shape())}\n"
                            f"it should be F32, BF16 or F16 {list(shape)}, says config.json")
    model = AbbIE(config)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        model.embed.weight.zero_(), model.unembed.weight.zero_()  # the rows that pad the vocabulary
        for ours, first, theirs, shape in pieces:
            tensor = files[theirs].get_tensor(theirs)
            if not tensor.isfinite().all():
                raise UserError(f"{folder} is damaged: {theirs} is not finite")
            weights[ours][first:first + shape[0]] = tensor
    if spare & {"lm_head.weight"} & set(files):
        head = files["lm_head.weight"].get_tensor("lm_head.weight").float()
        if not torch.equal(head, model.embed.weight[:config.vocab_size]):
            raise UserError(f"{folder}: lm_head is not the embedding, although tie_word_embeddings is true")
    model.meta = {**asdict(config), "tokenizer": f"hf:{path.removeprefix('hf:')}", "ckpt": path}
    return model.to(device)


def find_folder(name: str) -> Path:
    """A folder, or the local copy of a repository of the Hugging Face Hub."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"hf:{name}: there is no such folder")
    try:
        from huggingface_hub import snapshot_download
        wanted = ["config.json", *COPIED, "model*.safetensors", "model.safetensors.index.json"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except ImportError:
        raise UserError(f"hf:{name} is no folder here, and downloading needs a package\n"
                        "pip install huggingface_hub") from None
    except Exception as error:  # those of the hub, of its HTTP library, of the disk
        raise UserError(f"hf:{name} is no folder here, and cannot be downloaded ({type(error).__name__})\n"
                        "download it where there is network, and give its folder: hf:FOLDER") from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value


def read_config(path: Path, n_head_blocks: int | None, n_body_blocks: int | None, changes) -> AbbIEConfig:
    """config.json -> the shape, with the layers cut. What we cannot compute is refused by name."""
    raw = read_json(path)
    # transformers 5 writes rope_parameters; older versions rope_theta and rope_scaling.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: the rope parameters {rope!r} are no object")
    raw = {**raw, **rope}

    def number(name, default=None, kind=int):
        value = default if raw.get(name) is None else raw[name]
        if type(value) not in (int, kind) or not 0 < value < math.inf:
            raise UserError(f"{path}: {name}={value!r} is no positive {kind.__name__}")
        return kind(value)

    layers, width, heads = number("num_hidden_layers"), number("hidden_size"), number("num_attention_heads")
    lacking = [f"{name}={raw[name]!r}" for name, plain in PLAIN.items()
               if raw.get(name, plain) not in (plain, None)]
    if number("head_dim", width // heads) * heads != width:
        lacking.append(f"head_dim={raw.get('head_dim')} (not hidden_size / num_attention_heads)")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {"rope_type": kind, **{key: number(key, kind=float) for key in keys}}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise UserError(f"{path}: low_freq_factor must be less than high_freq_factor")
    elif kind != "default":
        lacking.append(f"rope_type={kind!r}")
    if lacking:
        raise UserError(f"{path} asks for what this model does not have: {', '.join(lacking)}\n"
                        "only plain Llama models can be loaded")
    if not isinstance(tied := raw.get("tie_word_embeddings", False), bool):
        raise UserError(f"{path}: tie_word_embeddings={tied!r} is neither true nor false")

    head = layers // 3 if n_head_blocks is None else n_head_blocks  # what thirds leave over goes to the Body
    body = layers - 2 * (layers // 3) if n_body_blocks is None else n_body_blocks
    config = AbbIEConfig(**{
        "vocab_size": number("vocab_size"), "n_embd": width, "ffn_dim": number("intermediate_size"),
        "n_attn_heads": heads, "n_kv_heads": number("num_key_value_heads", heads), "tie_embeddings": tied,
        "n_head_blocks": head, "n_body_blocks": body, "n_tail_blocks": max(0, layers - head - body),
        "norm_eps": number("rms_norm_eps", 1e-6, float), "rope_scaling": scaling,
        "rope_base": number("rope_theta", 10000.0, float),
        "block_size": min(number("max_position_embeddings", 2048), MAX_BLOCK_SIZE), **changes})
    if config.n_blocks != layers:
        raise UserError(f"{path} has {layers} layers, which cannot be cut into {config.n_head_blocks} + "
                        f"{config.n_body_blocks} + {config.n_tail_blocks}\nset n_head_blocks, n_body_blocks")
    return config


def open_tensors(folder: Path) -> dict:
    """Name of a tensor -> the open file that holds it; only headers are read so far."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError("reading hf:FOLDER needs a package\npip install safetensors tokenizers") from None
    index, where, files = folder / "model.safetensors.index.json", None, {"model.safetensors"}
    if not (folder / "model.safetensors").exists() and index.exists():
        where = read_json(index).get("weight_map")
        name = r"\w[\w.-]*\.safetensors"  # no path, so nothing outside the folder
        if not isinstance(where, dict) or not all(re.fullmatch(name, str(f)) for f in where.values()):
            raise UserError(f"{index} must name .safetensors files of its own folder")
        files = set(where.values())
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder} has no {file}\nweights must be .safetensors: no pickles")
    tensors = {}
    for file in files:
        try:
            opened = safe_open(folder / file, framework="pt")
        except Exception as error:  # safetensors' own, or the system's
            raise UserError(f"{folder / file} is damaged: {error}") from None
        for name in opened.keys():
            if where is not None and where.get(name) != file:
                raise UserError(f"{index} says that {name} is in {where.get(name)}, not in {file}")
            tensors[name] = opened
    return tensors


# ------------------------------------------------------------------------------------------------- tokenizer

# Byte-level BPE prints a byte as a character: printable Latin-1 as itself, the others as U+0100, U+0101, ...
PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTED]
BYTE = {chr(b): b for b in PRINTED} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


def token_bytes(token: str, byte_level: bool) -> bytes:
    if byte_level:  # an added token is printed as it is, and may hold a space
        return bytes(BYTE[c] for c in token) if all(c in BYTE for c in token) else token.encode()
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # SentencePiece, for what its vocabulary lacks
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


class HFTokenizer:
    """The tokenizer.json of a folder or repository, behind the part of tiktoken's interface that we use.
    Special tokens in a text are read as text. n_vocab counts the model's ids, or the tokenizer's if more."""

    def __init__(self, path: str):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("the tokenizer of hf:FOLDER needs a package\npip install tokenizers") from None
        self.name, folder = f"hf:{path}", find_folder(path)
        try:
            self.tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"{folder} has no tokenizer.json") from None
        except Exception as error:  # a bare Exception is what it raises
            raise UserError(f"{folder / 'tokenizer.json'} is damaged: {error}") from None
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        vocab, spec = self.tokenizer.get_vocab(), json.loads(self.tokenizer.to_str())
        decoder = json.dumps(spec["decoder"])
        if not re.search("ByteLevel|ByteFallback", decoder):
            raise UserError(f"{folder}: its tokenizer does not spell bytes (ByteLevel or ByteFallback)")
        self.bytes = {i: token_bytes(token, "ByteLevel" in decoder) for token, i in vocab.items()}

        model, own = (read_json(folder / name) if (folder / name).exists() else {}
                      for name in ("config.json", "tokenizer_config.json"))
        eot, end, size = model.get("eos_token_id"), own.get("eos_token"), model.get("vocab_size")
        if eot is None:  # then it is known by its spelling
            eot = vocab.get(end.get("content") if isinstance(end, dict) else end)
        self.eot_token = eot = eot[0] if isinstance(eot, list) and eot else eot  # Llama 3 has several
        self.n_vocab = max(size if type(size) is int else 0, max(vocab.values(), default=-1) + 1)
        if type(eot) is not int or not 0 <= eot < self.n_vocab:
            raise UserError(f"{folder}: which token ends a text?\nset eos_token_id in its config.json")

    def encode_ordinary(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids) -> bytes:
        """The exact bytes, so that a character may be spread over tokens. Ids without a token are empty."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


# ------------------------------------------------------------------------------------------------------- out

def export(model: AbbIE, folder: Path):
    """Write the model at r = 1 as a folder that transformers loads, whole or not at all."""
    c, source = model.config, model.meta.get("tokenizer", "")
    reason = {"abbie_d_literal": "at r = 1 its Tail reads B(h) + h", "zero_pt": "it projects [s ; h] to D"}
    if c.rule in reason:
        raise UserError(f"a checkpoint of rule {c.rule} cannot be exported: {reason[c.rule]}, no Llama does")
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("exporting needs a package\npip install safetensors") from None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already, and no empty folder\ngive another, or remove it")
    temp = folder.absolute().parent / f".{folder.absolute().name}.tmp"
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # without a value: 1, 2, none
    if source.startswith("hf:"):
        origin = find_folder(source[3:])
        special |= {k: v for k, v in read_json(origin / "config.json").items() if k in special}
        for name in COPIED:
            if (origin / name).exists():
                shutil.copyfile(origin / name, temp / name)
    state, rope = model.state_dict(), {"rope_type": "default", **(c.rope_scaling or {})}
    tensors = {theirs: state[ours][first:first + shape[0]].clone() for ours, first, theirs, shape in table(c)}
    save_file(tensors, temp / "model.safetensors", metadata={"format": "pt"})
    (temp / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "vocab_size": c.vocab_size, "hidden_size": c.n_embd, "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.n_blocks, "num_attention_heads": c.n_attn_heads, "head_dim": c.attn_head_dim,
        "num_key_value_heads": c.n_kv_heads, "max_position_embeddings": c.block_size, "attention_bias": False,
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embeddings, "mlp_bias": False,
        "hidden_act": "silu", "rope_theta": c.rope_base, "rope_scaling": c.rope_scaling,  # transformers 4; 5:
        "rope_parameters": {**rope, "rope_theta": c.rope_base}, **special}, indent=2) + "\n")
    os.replace(temp, folder)
    tokens = "" if source.startswith("hf:") else f"; no tokenizer.json: its tokens are {source or 'unknown'}"
    print(f"{folder}: the model at iters = 1, a Llama of {c.n_blocks} layers{tokens}", file=sys.stderr)


def main(argv: list[str]):
    from config import ArgumentParser
    parser = ArgumentParser(prog="llama.py", description=__doc__)
    parser.add_argument("--ckpt", help="run folder, checkpoint or hf:FOLDER (default: the newest under out/)")
    parser.add_argument("--export", metavar="FOLDER", type=Path, required=True, help="write the model there")
    args = parser.parse_args(argv)
    export(AbbIE.from_checkpoint(args.ckpt or find_checkpoint()), args.export)


if __name__ == "__main__":
    from config import cli
    cli(main)
