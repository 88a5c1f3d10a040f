"""Hugging Face folders in: a Llama's weights, or a looped model that hf/export.py wrote.

    python sample.py --ckpt hf:HuggingFaceTB/SmolLM2-135M --iters 2            # a repository, or hf:FOLDER
    python train.py config/abbie_124m.py --init_from=hf:FOLDER --iters=2       # the retrofit

Our block is the Llama block, so a Llama of n layers is an AbbIE of n blocks once it is known where to cut:
into thirds, unless n_head_blocks and n_body_blocks say otherwise. At r = 1 it computes what it always has.
Needs pip install safetensors tokenizers, and huggingface_hub to download. Pickles are not read, and Python
files of a folder are never run.
"""

import json
import math
import re
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from checkpoint import block_names, sha256
from model import AbbIE, AbbIEConfig, UserError, check

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WANTED = (
    *TOKENIZER_FILES, "config.json", "generation_config.json", "manifest.json", "model.py",
    "modeling_abbie.py", "model*.safetensors", "model.safetensors.index.json",
)  # fmt: skip
MAX_BLOCK_SIZE = 2048  # where block_size is not given: a cache holds block_size tokens; Llama 3.2 has 131072

# Keys of a Llama's config.json that change what is computed, and the value at which our block does the same.
SUPPORTED = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": None, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "sliding_window": None, "use_sliding_window": False,
    "layer_types": None, "pretraining_tp": 1, "partial_rotary_factor": 1.0, "rope_interleaved": False,
    "quantization_config": None,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the weights


def load_llama(path: str, device="cpu", **changes) -> AbbIE:
    """'hf:FOLDER' or 'hf:OWNER/REPO' -> the model in fp32; `changes` are keys of AbbIEConfig (rule, iters,
    block_size, the cut). What a rule adds (zero_pt's projection) starts at random. Raises UserError for a
    folder that is damaged, or that asks for anything which our block does not compute."""
    source = "hf:" + path.removeprefix("hf:")
    folder = find_folder(source[3:])
    raw = read_json(folder / "config.json")
    if raw.get("model_type") == "abbie":
        verify(folder)
        saved, tokenizer, head = (
            our_config(folder, raw),
            raw.get("tokenizer") or source,
            "model.unembed.weight",
        )
        config = replace(saved, **changes)
        places = list(our_places(saved, config))
        check(
            saved.n_blocks == config.n_blocks, f"{folder} has {saved.n_blocks} blocks, not {config.n_blocks}"
        )
    else:
        config, tokenizer, head = llama_config(folder, raw, changes), source, "lm_head.weight"
        places = list(llama_places(config))
    files = open_tensors(folder)
    check_tensors(folder, files, places, head, config)
    model = AbbIE(config)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        model.embed.weight.zero_(), model.unembed.weight.zero_()  # the rows that pad the vocabulary
        for ours, first, theirs, shape in places:
            tensor = files[theirs].get_tensor(theirs)
            check(bool(tensor.isfinite().all()), f"{folder} is damaged: {theirs} is not finite")
            weights[ours][first : first + shape[0]] = tensor
    if config.tie_embeddings and head in files:
        copy = files[head].get_tensor(head).float()
        same = torch.equal(copy, model.embed.weight[: len(copy)])
        check(same, f"{folder}: {head} is not the embedding, although config.json ties them")
    model.meta = {**asdict(config), "tokenizer": tokenizer, "ckpt": source}
    return model.to(device)


def llama_places(config: AbbIEConfig):
    """The two naming schemes side by side: yields (our name, first row, their name, shape). Their tensor is
    the rows from `first` on of ours: their q, k, v make our qkv, and our vocabulary is padded at its end."""
    D, M, KV = config.n_embd, config.ffn_dim, config.n_kv_heads * config.attn_head_dim
    vocabulary = (config.vocab_size, D)
    block = [
        ("attn_norm", "input_layernorm", (D,)),
        ("attn.qkv", "self_attn.q_proj", (D, D)),
        ("attn.qkv", "self_attn.k_proj", (KV, D)),
        ("attn.qkv", "self_attn.v_proj", (KV, D)),
        ("attn.proj", "self_attn.o_proj", (D, D)),
        ("mlp_norm", "post_attention_layernorm", (D,)),
        ("mlp.gate_up", "mlp.gate_proj", (M, D)),
        ("mlp.gate_up", "mlp.up_proj", (M, D)),
        ("mlp.down", "mlp.down_proj", (D, M)),
    ]
    pairs = [("embed", "model.embed_tokens", vocabulary), ("norm", "model.norm", (D,))]
    if not config.tie_embeddings:
        pairs.append(("unembed", "lm_head", vocabulary))
    for i, name in enumerate(block_names(config)):
        pairs += [(f"{name}.{ours}", f"model.layers.{i}.{theirs}", shape) for ours, theirs, shape in block]
    filled = Counter()
    for ours, theirs, shape in pairs:
        yield f"{ours}.weight", filled[ours], f"{theirs}.weight", shape
        filled[ours] += shape[0]


def our_places(saved: AbbIEConfig, config: AbbIEConfig):
    """The same for a folder of hf/export.py: our names after "model.", from where the cut was before."""
    before = dict(zip(block_names(config), block_names(saved)))
    with torch.device("meta"):
        parameters = dict(AbbIE(config).named_parameters())
    if saved.rule != "zero_pt":
        parameters.pop("project.weight", None)  # new: it starts at random
    for name, p in parameters.items():
        block = ".".join(name.split(".")[:2])
        yield name, 0, "model." + name.replace(block, before.get(block, block), 1), tuple(p.shape)


def check_tensors(folder: Path, files: dict, places: list, head: str, config: AbbIEConfig):
    """Whether the files hold exactly these tensors, before memory is taken for them."""
    names = {theirs for _, _, theirs, _ in places}
    spare = {name for name in files if name.endswith("rotary_emb.inv_freq")}  # old versions; computed here
    spare.add("model.project.weight")  # of a zero_pt that is read under another rule
    if config.tie_embeddings:
        spare.add(head)  # some write it, a copy of the embedding
    for what, found in (("lacks", names - set(files)), ("has unexpected", set(files) - names - spare)):
        check(
            not found,
            f"{folder} {what} tensors ({len(found)}, such as {min(found, default='')})\n"
            "its config.json and its weights do not belong together, or a file is missing",
        )
    for _, _, theirs, shape in places:
        header = files[theirs].get_slice(theirs)
        kind, found = header.get_dtype(), header.get_shape()
        check(
            tuple(found) == shape and kind in ("F32", "BF16", "F16"),
            f"{folder}: {theirs} is {kind} {list(found)}\n"
            f"it should be F32, BF16 or F16 {list(shape)}, says config.json",
        )


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
        sound = isinstance(where, dict) and all(re.fullmatch(name, str(file)) for file in where.values())
        check(sound, f"{index} must name .safetensors files of its own folder")
        files = set(where.values())
    tensors = {}
    for file in sorted(files):
        check((folder / file).is_file(), f"{folder} has no {file}\nweights must be .safetensors: no pickles")
        try:
            opened = safe_open(folder / file, framework="pt")
        except Exception as error:  # safetensors' own, or the system's
            raise UserError(f"{folder / file} is damaged: {error}") from None
        for name in opened.keys():
            there = file if where is None else where.get(name)
            check(there == file, f"{index} says that {name} is in {there}, not in {file}")
            tensors[name] = opened
    return tensors


# ------------------------------------------------------------------------------------------------- the folder


def find_folder(name: str) -> Path:
    """A folder, or the local copy of a repository of the Hugging Face Hub."""
    if Path(name).is_dir():
        return Path(name)
    check(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None, f"hf:{name}: there is no such folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=WANTED))
    except ImportError:
        raise UserError(
            f"hf:{name} is no folder here, and downloading needs a package\npip install huggingface_hub"
        ) from None
    except Exception as error:  # those of the hub, of its HTTP library, of the disk
        raise UserError(
            f"hf:{name} is no folder here, and cannot be downloaded ({type(error).__name__})\n"
            "download it where there is network, and give its folder: hf:FOLDER"
        ) from None


def verify(folder: Path):
    """Check each file that hf/export.py wrote against manifest.json. Where there is none, as after
    transformers' save_pretrained, nothing is promised."""
    if (folder / "manifest.json").exists():
        for name, expected in read_json(folder / "manifest.json").items():
            sound = (folder / name).is_file() and sha256(folder / name) == expected
            check(
                sound,
                f"{folder / name} is missing, or is not what was exported (its SHA-256 differs)\n"
                "get the folder again; or, if you meant to change it, remove its manifest.json",
            )


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        value = None
    check(isinstance(value, dict), f"{path} is damaged: it holds no JSON object")
    return value


def our_config(folder: Path, raw: dict) -> AbbIEConfig:
    """config.json of hf/export.py -> the config that was exported."""
    raw = {**raw, "rope_scaling": raw.get("llama3_rope")}
    try:
        return AbbIEConfig(**{f.name: raw[f.name] for f in fields(AbbIEConfig) if f.name in raw})
    except TypeError as error:
        raise UserError(f"{folder / 'config.json'} is damaged: {error}") from None


def llama_config(folder: Path, raw: dict, changes: dict) -> AbbIEConfig:
    """config.json of a Llama -> the config, with the layers cut. What we cannot compute is refused by
    name."""
    path = folder / "config.json"
    # transformers 5 writes rope_parameters; older versions rope_theta and rope_scaling.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    check(isinstance(rope, dict), f"{path}: the rope parameters {rope!r} are no object")
    raw = {**raw, **rope}

    def number(name, default=None, kind=int):
        value = default if raw.get(name) is None else raw[name]
        valid = type(value) in (int, kind) and 0 < value < math.inf
        check(valid, f"{path}: {name}={value!r} is no positive {kind.__name__}")
        return kind(value)

    layers, width, heads = number("num_hidden_layers"), number("hidden_size"), number("num_attention_heads")
    lacking = [
        f"{name}={raw[name]!r}"
        for name, value in SUPPORTED.items()
        if raw.get(name) is not None and raw[name] != value
    ]
    if number("head_dim", width // heads) * heads != width:
        lacking.append(f"head_dim={raw.get('head_dim')} (not hidden_size / num_attention_heads)")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {"rope_type": kind, **{key: number(key, kind=float) for key in keys}}
        ordered = scaling["low_freq_factor"] < scaling["high_freq_factor"]
        check(ordered, f"{path}: low_freq_factor must be less than high_freq_factor")
    elif kind != "default":
        lacking.append(f"rope_type={kind!r}")
    check(
        not lacking,
        f"{path} asks for what this model does not have: {', '.join(lacking)}\n"
        "only plain Llama models can be loaded",
    )
    tied = raw.get("tie_word_embeddings", False)
    check(isinstance(tied, bool), f"{path}: tie_word_embeddings={tied!r} is neither true nor false")

    head = changes.get("n_head_blocks", layers // 3)
    body = changes.get("n_body_blocks", layers - 2 * (layers // 3))  # with what thirds leave over
    values = {
        "vocab_size": number("vocab_size"), "n_embd": width, "ffn_dim": number("intermediate_size"),
        "n_attn_heads": heads, "n_kv_heads": number("num_key_value_heads", heads), "tie_embeddings": tied,
        "n_head_blocks": head, "n_body_blocks": body, "n_tail_blocks": max(0, layers - head - body),
        "norm_eps": number("rms_norm_eps", 1e-6, float), "rope_scaling": scaling,
        "rope_base": number("rope_theta", 10000.0, float),
        "block_size": min(number("max_position_embeddings", 2048), MAX_BLOCK_SIZE),
    }  # fmt: skip
    config = AbbIEConfig(**{**values, **changes})
    cut = f"{config.n_head_blocks} + {config.n_body_blocks} + {config.n_tail_blocks}"
    check(
        config.n_blocks == layers,
        f"{path} has {layers} layers, which cannot be cut into {cut}\nset n_head_blocks, n_body_blocks",
    )
    return config


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
        spells = re.search("ByteLevel|ByteFallback", decoder) is not None
        check(spells, f"{folder}: its tokenizer does not spell bytes (ByteLevel or ByteFallback)")
        self.bytes = {i: token_bytes(token, "ByteLevel" in decoder) for token, i in vocab.items()}

        model, own = (
            read_json(folder / name) if (folder / name).exists() else {}
            for name in ("config.json", "tokenizer_config.json")
        )
        eot, end, size = model.get("eos_token_id"), own.get("eos_token"), model.get("vocab_size")
        if eot is None:  # then it is known by its spelling
            eot = vocab.get(end.get("content") if isinstance(end, dict) else end)
        if isinstance(eot, list) and eot:  # Llama 3 has several
            eot = eot[0]
        self.n_vocab = max(size if type(size) is int else 0, max(vocab.values(), default=-1) + 1)
        known = type(eot) is int and 0 <= eot < self.n_vocab
        check(known, f"{folder}: which token ends a text?\nset eos_token_id in its config.json")
        self.eot_token = eot

    def encode_ordinary(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids) -> bytes:
        """The exact bytes, so that a character may be spread over tokens. Ids without a token are empty."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")
