"""Hugging Face folders in: a Llama's weights, or a looped model that hf/export.py wrote.

    python sample.py --ckpt hf:HuggingFaceTB/SmolLM2-135M --iters 2            # a repository, or hf:FOLDER
    python train.py config/abbie_124m.py --init_from=hf:FOLDER --iters=2       # the retrofit

Our block is the Llama block, so a Llama of n layers is an AbbIE of n blocks once it is known where to cut:
into thirds, unless n_head_blocks and n_body_blocks say otherwise. At r = 1 it computes what it always has.
Pickles are not read, and Python files of a folder are never run.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoint import block_names, sha256
from config import optional
from model import AbbIEConfig, UserError, check

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OTHER_FILES = ("config.json", "generation_config.json", "manifest.json", "model.py", "modeling_abbie.py")
WANTED = (*TOKENIZER_FILES, *OTHER_FILES, "model*.safetensors")
MAX_BLOCK_SIZE = 2048  # where block_size is not given: a cache holds block_size tokens; Llama 3.2 has 131072

# Our names of the numbers in a Llama's config.json, and their values where it does not say.
KEYS = {
    "vocab_size": "vocab_size", "n_embd": "hidden_size", "ffn_dim": "intermediate_size",
    "n_blocks": "num_hidden_layers", "n_attn_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "block_size": "max_position_embeddings",
    "norm_eps": "rms_norm_eps", "rope_base": "rope_theta",
}  # fmt: skip
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
STRETCH = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of llama3
# Keys that change what a Llama computes, and the value at which our block does the same.
SUPPORTED = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": None, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "sliding_window": None, "use_sliding_window": False,
    "layer_types": None, "pretraining_tp": 1, "partial_rotary_factor": 1.0, "rope_interleaved": False,
    "quantization_config": None,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- the folder


def read_folder(name: str, changes: dict) -> tuple[dict, dict[str, Tensor]]:
    """A folder or OWNER/REPO -> config and weights as in a checkpoint of ours; a Llama is cut as `changes`
    says. Raises UserError for a folder that is damaged, or that asks for what our block does not compute."""
    folder, source = find_folder(name), f"hf:{name}"
    raw = read_json(folder / "config.json")
    if raw.get("model_type") == "abbie":
        verify(folder)
        meta = {**raw, "rope_scaling": raw.get("llama3_rope")}
        tensors = read_tensors(folder)
        state = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    else:
        config = config_from_llama(folder / "config.json", raw, changes)
        meta = asdict(config)
        state = from_llama(folder, config, read_tensors(folder))
    if meta["tie_embeddings"]:
        state["unembed.weight"] = state["embed.weight"]
    meta["tokenizer"] = meta.get("tokenizer") or source
    meta["ckpt"] = source
    return meta, state


def find_folder(name: str) -> Path:
    """A folder, or the local copy of a repository of the Hugging Face Hub."""
    if Path(name).is_dir():
        return Path(name)
    is_repository = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    check(is_repository, f"hf:{name}: there is no such folder")
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # those of the hub, of its HTTP library, of the disk
        raise UserError(
            f"hf:{name} is no folder here, and cannot be downloaded ({type(error).__name__})\n"
            "download it where there is network, and give its folder: hf:FOLDER"
        ) from None


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None


def verify(folder: Path):
    """Check each file that hf/export.py wrote against manifest.json. Where there is none, as after
    transformers' save_pretrained, nothing is promised."""
    if not (folder / "manifest.json").exists():
        return
    for name, expected in read_json(folder / "manifest.json").items():
        path = folder / name
        sound = path.is_file() and sha256(path) == expected
        why = "its SHA-256 is not that of the export"
        restore = "get the folder again; or, if you meant to change it, remove its manifest.json"
        check(sound, f"{path} is missing or damaged: {why}\n{restore}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the several files that stand for it."""
    load_file, tensors = optional("safetensors.torch").load_file, {}
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("model*.safetensors"))
    check(bool(files), f"{folder} has no model.safetensors\nweights must be .safetensors: no pickles")
    for file in files:
        try:
            tensors |= load_file(file)
        except Exception as error:  # safetensors' own, or the system's
            raise UserError(f"{file} is damaged: {error}") from None
    for name, tensor in tensors.items():
        check(bool(tensor.isfinite().all()), f"{folder} is damaged: {name} is not finite")
    return tensors


# -------------------------------------------------------------------------------------------------- the Llama


def config_from_llama(path: Path, raw: dict, changes: dict) -> AbbIEConfig:
    """config.json of a Llama -> the config, its layers cut. What we cannot compute is refused by name."""
    # transformers 5 writes rope_parameters; older versions rope_theta and rope_scaling.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    found = {key: value for key, value in {**raw, **rope}.items() if value is not None}
    llama = {**DEFAULTS, "num_key_value_heads": found.get("num_attention_heads"), **found}

    wrong = []
    for name, value in SUPPORTED.items():
        if llama.get(name, value) != value:
            wrong.append(f"{name}={llama[name]!r}")
    if rope_type not in ("default", "llama3"):
        wrong.append(f"rope_type={rope_type!r}")
    asked = ", ".join(wrong)
    check(not wrong, f"{path} asks for what this model does not have: {asked}")
    stretch = STRETCH if rope_type == "llama3" else ()
    for name in (*KEYS.values(), *stretch):
        value = llama.get(name)
        valid = type(value) in (int, float) and value > 0
        check(valid, f"{path}: {name}={value!r} is no positive number")

    shape = {ours: llama[theirs] for ours, theirs in KEYS.items()}
    shape["block_size"] = min(shape["block_size"], MAX_BLOCK_SIZE)
    layers, width, heads = shape.pop("n_blocks"), shape["n_embd"], shape["n_attn_heads"]
    standard = llama.get("head_dim", width // heads) * heads == width
    check(standard, f"{path}: head_dim={llama.get('head_dim')} is not hidden_size / num_attention_heads")
    head = changes.get("n_head_blocks", layers // 3)
    body = changes.get("n_body_blocks", layers - 2 * (layers // 3))  # with what thirds leave over
    advice = "set n_head_blocks, n_body_blocks"
    check(head + body <= layers, f"{path} has {layers} layers, fewer than {head} + {body}\n{advice}")
    shape["n_head_blocks"] = head
    shape["n_body_blocks"] = body
    shape["n_tail_blocks"] = layers - head - body
    if stretch:
        scaling = {name: llama[name] for name in stretch}
        shape["rope_scaling"] = {"rope_type": rope_type, **scaling}
    shape["tie_embeddings"] = llama.get("tie_word_embeddings", False)
    return AbbIEConfig(**shape, iters=1)  # what it was trained at


def llama_names(config: AbbIEConfig) -> dict[str, dict[str, int]]:
    """Our name of each weight -> a Llama's names of its parts, in the order of their rows, and how many rows
    each has. Ours may have more, which pad the vocabulary."""
    D, M, KV = config.n_embd, config.ffn_dim, config.n_kv_heads * config.attn_head_dim
    names = {"embed": {"model.embed_tokens": config.vocab_size}, "norm": {"model.norm": D}}
    if not config.tie_embeddings:
        names["unembed"] = {"lm_head": config.vocab_size}
    for i, block in enumerate(block_names(config)):
        layer = f"model.layers.{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        names[f"{block}.attn_norm"] = {f"{layer}.input_layernorm": D}
        names[f"{block}.attn.qkv"] = {f"{attn}.q_proj": D, f"{attn}.k_proj": KV, f"{attn}.v_proj": KV}
        names[f"{block}.attn.proj"] = {f"{attn}.o_proj": D}
        names[f"{block}.mlp_norm"] = {f"{layer}.post_attention_layernorm": D}
        names[f"{block}.mlp.gate_up"] = {f"{mlp}.gate_proj": M, f"{mlp}.up_proj": M}
        names[f"{block}.mlp.down"] = {f"{mlp}.down_proj": D}
    return names


def to_llama(config: AbbIEConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights, or their gradients, under a Llama's names."""
    tensors = {}
    for name, parts in llama_names(config).items():
        rows = list(parts.values())
        pieces = weights[f"{name}.weight"][: sum(rows)].split(rows)
        for part, piece in zip(parts, pieces):
            tensors[f"{part}.weight"] = piece.clone()
    return tensors


def from_llama(folder: Path, config: AbbIEConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Llama's weights under our names. They must be exactly those that its config asks for."""
    names = llama_names(config)
    wanted = {f"{part}.weight" for parts in names.values() for part in parts}
    found = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}  # old; computed here
    if config.tie_embeddings:
        found.discard("lm_head.weight")  # some write it all the same
    odd = sorted(wanted ^ found)
    some = ", ".join(odd[:3])
    check(not odd, f"{folder}: config.json and the weights disagree on {len(odd)} tensors\n{some}")
    if config.tie_embeddings and "lm_head.weight" in tensors:
        same = torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
        check(same, f"{folder}: lm_head.weight is not the embedding, although config.json ties them")
    padding = config.padded_vocab_size - config.vocab_size
    state = {}
    for name, parts in names.items():
        tensor = torch.cat([tensors[f"{part}.weight"] for part in parts])
        if name in ("embed", "unembed"):
            tensor = F.pad(tensor, (0, 0, 0, padding))
        state[f"{name}.weight"] = tensor
    return state


# -------------------------------------------------------------------------------------------------- tokenizer

# Byte-level BPE prints a byte as a character: printable Latin-1 as itself, the others as U+0100, U+0101, ...
PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTED]
BYTE = {chr(b): b for b in PRINTED} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


def token_bytes(token: str, byte_level: bool) -> bytes:
    if byte_level and all(c in BYTE for c in token):
        return bytes(BYTE[c] for c in token)
    if byte_level:  # an added token is printed as it is, and may hold a space
        return token.encode()
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # SentencePiece, for what its vocabulary lacks
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


class HFTokenizer:
    """The tokenizer.json of a folder or repository, behind the part of tiktoken's interface that we use.
    Special tokens in a text are read as text. n_vocab counts the model's ids, or the tokenizer's if more."""

    def __init__(self, name: str):
        folder = find_folder(name)
        path = folder / "tokenizer.json"
        tokenizers = optional("tokenizers")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # a bare Exception is what it raises
            raise UserError(f"{path} is missing or damaged: {error}") from None
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocab = tokenizer.get_vocab()
        decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"])
        spells = "ByteLevel" in decoder or "ByteFallback" in decoder
        check(spells, f"{folder}: its tokenizer does not spell bytes (ByteLevel or ByteFallback)")
        self.tokenizer = tokenizer
        self.bytes = {i: token_bytes(token, "ByteLevel" in decoder) for token, i in vocab.items()}

        settings = {}
        for file in (folder / "tokenizer_config.json", folder / "config.json"):
            if file.exists():
                settings |= read_json(file)
        self.n_vocab = max(settings.get("vocab_size", 0), max(self.bytes) + 1)
        eot = settings.get("eos_token_id")
        if isinstance(eot, list):  # Llama 3 has several
            eot = eot[0]
        if eot is None:  # then it is known by its spelling
            end = settings.get("eos_token")
            eot = vocab.get(end["content"] if isinstance(end, dict) else end)
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
