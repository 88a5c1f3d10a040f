"""Hugging Face folders in: a Llama's weights, or a looped model that hf/export.py wrote; and tokenizers.

    python sample.py --ckpt hf:HuggingFaceTB/SmolLM2-135M --iters 2            # a repository, or hf:FOLDER
    python train.py config/abbie_124m.py --init_from=hf:FOLDER --iters=2       # the retrofit

Our block is the Llama block, so a Llama of n layers is an AbbIE of n blocks once it is known where to cut. At
r = 1 it computes what it always has. Pickles are not read, and Python files of a folder are never run.
"""

import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoint import read_json, write_json
from config import optional, typed
from model import AbbIEConfig, UserError, check

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GENERATION,
)  # fmt: skip
# Our names of what a Llama's config.json holds, its own, and what it means where it does not say.
KEYS = {
    "vocab_size": ("vocab_size", None),
    "block_size": ("max_position_embeddings", 2048),
    "n_embd": ("hidden_size", None),
    "n_attn_heads": ("num_attention_heads", None),
    "n_kv_heads": ("num_key_value_heads", None),
    "ffn_dim": ("intermediate_size", None),
    "n_body_blocks": ("num_hidden_layers", None),
    "rope_base": ("rope_theta", 10000.0),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False),
}
# Keys that change what a Llama computes, and the value at which our block does the same.
SUPPORTED = {
    "model_type": "llama", "auto_map": None, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "partial_rotary_factor": 1.0, "quantization_config": None,
}  # fmt: skip
# Our names of a block's weights, and a Llama's of their parts, in the order of their rows.
PARTS = {
    "attn_norm": ["input_layernorm"],
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}


# ------------------------------------------------------------------------------------------------- the folder


def read_folder(name: str, changes: dict) -> tuple[dict, dict[str, Tensor], dict]:
    """A folder or OWNER/REPO -> config and weights as in a checkpoint of ours, and the changes of the config,
    in which a Llama is cut: into thirds, unless they name three depths that sum to its layers. Raises
    UserError for what is damaged, or asks for what our block does not compute."""
    folder = find_folder(name)
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") == "abbie":
        meta = {**raw, "rope_scaling": raw.get("llama3_rope")}
        state = {key.removeprefix("model."): tensor for key, tensor in read_tensors(folder).items()}
    else:
        config = config_from_llama(path, raw)
        meta, state = asdict(config), weights_from_llama(folder, config)
        layers, third = config.n_blocks, config.n_blocks // 3
        cut = {"n_head_blocks": third, "n_body_blocks": layers - 2 * third, "n_tail_blocks": third}
        if sum(changes.get(name, 0) for name in cut) != layers:  # those of a config for another model
            changes = {**changes, **cut}
    if meta.get("tie_embeddings") and "embed.weight" in state:
        state["unembed.weight"] = state["embed.weight"]
    meta["ckpt"] = f"hf:{name}"
    meta["tokenizer"] = meta.get("tokenizer") or meta["ckpt"]
    return meta, state, changes


def find_folder(name: str) -> Path:
    """A folder, or the local copy of a repository of the Hugging Face Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    check(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name), f"hf:{name}: there is no such folder")
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.jinja", "model*.safetensors"]))
    except Exception as error:  # those of the hub, of its HTTP library, of the disk
        raise UserError(
            f"hf:{name} is no folder here, and cannot be downloaded ({type(error).__name__})\n"
            "download it where there is network, and give its folder: hf:FOLDER"
        ) from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the several files that stand for it."""
    safetensors, tensors = optional("safetensors.torch"), {}
    whole = folder / "model.safetensors"
    for file in [whole] if whole.exists() else sorted(folder.glob("model*.safetensors")):
        try:
            tensors |= safetensors.load_file(file)
        except Exception as error:  # safetensors' own, or the system's
            raise UserError(f"{file} is damaged: {error}") from None
    check(tensors, f"{folder} has no model.safetensors\nweights must be .safetensors: no pickles")
    return tensors


# -------------------------------------------------------------------------------------------------- the Llama


def config_from_llama(path: Path, raw: dict) -> AbbIEConfig:
    """config.json of a Llama -> its shape, all layers in the Body. What we cannot compute is refused."""
    # transformers 5 writes rope_parameters; older versions rope_theta and rope_scaling.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    check(isinstance(rope, dict), f"{path}: its rotary embedding, {rope!r}, is no dictionary")
    llama = {key: value for key, value in {**raw, **rope}.items() if value is not None}
    for key, ours in SUPPORTED.items():
        value = llama.get(key, ours)
        check(value == ours, f"{path}: {key}={value!r} is not what this model computes")
    shape = {"n_head_blocks": 0, "n_tail_blocks": 0, "iters": 1}  # r = 1 is what it was trained at
    for ours, (theirs, default) in KEYS.items():
        value = llama.get(theirs, default)
        shape[ours] = typed(ours, value, f"{path}: {theirs}={value!r}")
    shape["block_size"] = min(shape["block_size"], 2048)  # a cache may hold as much; Llama 3.2 has 131072
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    known = rope_type in ("default", "llama3")
    check(known, f"{path}: rope_type={rope_type!r} is not what this model computes")
    if rope_type == "llama3":
        shape["rope_scaling"] = {**rope, "rope_type": rope_type}
    config = AbbIEConfig(**shape)
    standard = llama.get("head_dim", config.attn_head_dim) == config.attn_head_dim
    check(standard, f"{path}: head_dim is not hidden_size / num_attention_heads")
    return config


def weights_from_llama(folder: Path, config: AbbIEConfig) -> dict[str, Tensor]:
    """A Llama's weights under our names. They must be exactly those that its config asks for."""
    tensors = read_tensors(folder)
    names = {"embed": ["model.embed_tokens"], "norm": ["model.norm"]}  # ours -> a Llama's of its parts
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)  # some write a copy all the same
    else:
        names["unembed"] = ["lm_head"]
    for i in range(config.n_blocks):
        for ours, parts in PARTS.items():
            names[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{part}" for part in parts]
    wanted = {f"{part}.weight" for parts in names.values() for part in parts}
    given = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}  # of older versions
    differing = sorted(wanted ^ given)
    check(not differing, f"{folder}: config.json and the weights disagree on {', '.join(differing[:3])}")

    state = {}
    for ours, parts in names.items():
        try:
            rows = torch.cat([tensors[f"{part}.weight"] for part in parts])
            if ours in ("embed", "unembed"):
                rows = F.pad(rows, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
        except RuntimeError as error:
            raise UserError(f"{folder}: the shapes of {', '.join(parts)} are wrong: {error}") from None
        state[f"{ours}.weight"] = rows
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


def read_json_if_any(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def end_tokens(folder: Path, vocab: dict[str, int]) -> list[int]:
    """All ids that end a text, the one that ends a document first."""
    ends = []
    for file in ("config.json", GENERATION):
        ids = read_json_if_any(folder / file).get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]  # Llama 3 has several
    ends = [i for i in ends if i is not None]
    if not ends:  # then it is known by its spelling
        token = read_json_if_any(folder / "tokenizer_config.json").get("eos_token")
        spelling = token.get("content") if isinstance(token, dict) else token
        ends = [vocab.get(str(spelling))]
    return ends


class HFTokenizer:
    """The tokenizer.json of a folder or repository, behind the part of tiktoken's interface that we use.

    Special tokens in a text are read as text. n_vocab counts the model's ids, or the tokenizer's if more.
    eot_token ends a document, each of eot_tokens a text. bos_tokens: what the tokenizer puts before a text
    that a model is to continue; encode_ordinary does not."""

    def __init__(self, name: str):
        self.folder = folder = find_folder(name)
        path, tokenizers = folder / "tokenizer.json", optional("tokenizers")
        try:
            self.tokenizer = tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # a bare Exception is what it raises
            raise UserError(f"{path} is missing or damaged: {error}") from None
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocab, decoder = tokenizer.get_vocab(), str(tokenizer.decoder)
        spells = "ByteLevel" in decoder or "ByteFallback" in decoder
        check(spells, f"{folder}: its tokenizer does not spell bytes (ByteLevel or ByteFallback)")
        self.bytes = {i: token_bytes(token, "ByteLevel" in decoder) for token, i in vocab.items()}

        vocab_size = read_json_if_any(folder / "config.json").get("vocab_size", 0)
        self.n_vocab = max(vocab_size, max(self.bytes) + 1)
        ends = end_tokens(folder, vocab)
        known = all(type(i) is int and 0 <= i < self.n_vocab for i in ends)
        check(known, f"{folder}: which token ends a text?\nset eos_token_id in its config.json")
        self.eot_token, self.eot_tokens = ends[0], list(dict.fromkeys(ends))
        text = tokenizer.encode("a")
        self.bos_tokens = text.ids[: [*text.special_tokens_mask, 0].index(0)]

    def encode_ordinary(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids) -> bytes:
        """The exact bytes, so that a character may be spread over tokens. Ids without a token are empty."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def copy_tokenizer(name: str, folder: Path):
    """Copy the files from which HFTokenizer(folder) and transformers give the same tokens."""
    tokenizer = HFTokenizer(name)
    for file in TOKENIZER_FILES:
        if (tokenizer.folder / file).exists():
            shutil.copyfile(tokenizer.folder / file, folder / file)
    # What ends a text may stand in the model's config.json, which is not the tokenizer's to copy.
    generation = read_json_if_any(folder / GENERATION)
    write_json(folder / GENERATION, {**generation, "eos_token_id": tokenizer.eot_tokens})
