"""Hugging Face folders in: a Llama's weights, or a looped model that hf/export.py wrote; and tokenizers.

    python sample.py --ckpt hf:HuggingFaceTB/SmolLM2-135M --iters 2            # a repository, or hf:FOLDER
    python train.py config/abbie_124m.py --init_from=hf:FOLDER --iters=2       # the retrofit

Our block is the Llama block, so a Llama of n layers is an AbbIE of n blocks once it is known where to cut:
into thirds, unless n_head_blocks, n_body_blocks and n_tail_blocks sum to n. At r = 1 it computes what it
always has. Pickles are not read, and Python files of a folder are never run.
"""

import json
import re
import shutil
from dataclasses import asdict, fields
from itertools import takewhile
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
DOWNLOADED = (*TOKENIZER_FILES, "config.json", "model*.safetensors")
MAX_BLOCK_SIZE = 2048  # where block_size is not given: a cache may hold as much; Llama 3.2 has 131072
CUT = ("n_head_blocks", "n_body_blocks", "n_tail_blocks")

# Our names of what a Llama's config.json holds, and its values where it does not say.
KEYS = {
    "vocab_size": "vocab_size", "n_embd": "hidden_size", "ffn_dim": "intermediate_size",
    "n_body_blocks": "num_hidden_layers",  # all of them, before they are cut
    "n_attn_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "block_size": "max_position_embeddings", "norm_eps": "rms_norm_eps", "rope_base": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
DEFAULTS = {
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False
}  # fmt: skip
STRETCH = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of llama3
# Keys that change what a Llama computes, and the value at which our block does the same.
SUPPORTED = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": None, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "sliding_window": None, "use_sliding_window": False,
    "layer_types": None, "pretraining_tp": 1, "partial_rotary_factor": 1.0, "rope_interleaved": False,
    "quantization_config": None,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- the folder


def read_folder(name: str, changes: dict) -> tuple[dict, dict[str, Tensor], dict]:
    """A folder or OWNER/REPO -> config and weights as in a checkpoint of ours, and the changes of the config
    that are still to be made, as a Llama is cut already. Raises UserError for a folder that is damaged, or
    that asks for what our block does not compute."""
    folder = find_folder(name)
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") == "abbie":
        meta = {**raw, "rope_scaling": raw.get("llama3_rope")}
        for field in fields(AbbIEConfig):
            typed(field.name, meta.get(field.name), f"{path}: {field.name}={meta.get(field.name)!r}")
        state = {key.removeprefix("model."): tensor for key, tensor in read_tensors(folder).items()}
    else:
        config, changes = config_from_llama(path, raw, changes)
        meta, state = asdict(config), from_llama(folder, config, read_tensors(folder))
    if meta["tie_embeddings"] and "embed.weight" in state:
        state["unembed.weight"] = state["embed.weight"]
    meta["ckpt"] = f"hf:{name}"
    meta["tokenizer"] = meta.get("tokenizer") or meta["ckpt"]
    return meta, state, changes


def find_folder(name: str) -> Path:
    """A folder, or the local copy of a repository of the Hugging Face Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    is_repository = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    check(is_repository, f"hf:{name}: there is no such folder")
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=DOWNLOADED))
    except Exception as error:  # those of the hub, of its HTTP library, of the disk
        raise UserError(
            f"hf:{name} is no folder here, and cannot be downloaded ({type(error).__name__})\n"
            "download it where there is network, and give its folder: hf:FOLDER"
        ) from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the several files that stand for it."""
    load_file, tensors = optional("safetensors.torch").load_file, {}
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("model*.safetensors"))
    check(len(files) > 0, f"{folder} has no model.safetensors\nweights must be .safetensors: no pickles")
    for file in files:
        try:
            tensors |= load_file(file)
        except Exception as error:  # safetensors' own, or the system's
            raise UserError(f"{file} is damaged: {error}") from None
    return tensors


# -------------------------------------------------------------------------------------------------- the Llama


def config_from_llama(path: Path, raw: dict, changes: dict) -> tuple[AbbIEConfig, dict]:
    """config.json of a Llama -> the config, its layers cut, and the changes that remain. What we cannot
    compute is refused by name."""
    # transformers 5 writes rope_parameters; older versions rope_theta and rope_scaling.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    check(isinstance(rope, dict), f"{path}: its rotary embedding, {rope!r}, is no dictionary")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    given = {key: value for key, value in {**raw, **rope}.items() if value is not None}
    llama = {**DEFAULTS, "num_key_value_heads": given.get("num_attention_heads"), **given}

    unsupported = []
    for name, value in SUPPORTED.items():
        if llama.get(name, value) != value:
            unsupported.append(f"{name}={llama[name]!r}")
    if rope_type not in ("default", "llama3"):
        unsupported.append(f"rope_type={rope_type!r}")
    check(not unsupported, f"{path} asks for what this model does not have: {', '.join(unsupported)}")
    shape = {}
    for ours, theirs in KEYS.items():
        shape[ours] = typed(ours, llama.get(theirs), f"{path}: {theirs}={llama.get(theirs)!r}")
    shape["block_size"] = min(shape["block_size"], MAX_BLOCK_SIZE)
    if rope_type == "llama3":
        shape["rope_scaling"] = {"rope_type": rope_type, **{name: rope.get(name) for name in STRETCH}}
    head_dim = llama.get("head_dim")
    standard = head_dim is None or (
        type(head_dim) is int and head_dim * shape["n_attn_heads"] == shape["n_embd"]
    )
    check(standard, f"{path}: head_dim={head_dim} is not hidden_size / num_attention_heads")
    cut, changes = cut_layers(shape["n_body_blocks"], changes)
    return AbbIEConfig(**{**shape, **cut, "iters": 1}), changes  # r = 1 is what it was trained at


def cut_layers(layers: int, changes: dict) -> tuple[dict, dict]:
    """Where to cut so many layers, and the changes that remain. `changes` may name some of the three depths,
    which is refused later where they do not fit; all three that do not are another model's: thirds."""
    third = layers // 3
    cut = {name: changes[name] for name in CUT if name in changes}
    complete = len(cut) == len(CUT)
    cut.setdefault("n_head_blocks", third)
    if "n_body_blocks" not in cut:
        cut.setdefault("n_tail_blocks", third)
    for name in CUT:
        cut.setdefault(name, layers - sum(cut.values()))
    fits = sum(cut.values()) == layers and cut["n_body_blocks"] > 0 and cut["n_tail_blocks"] >= 0
    if not fits:
        cut = dict(zip(CUT, (third, layers - 2 * third, third)))
    if fits or complete:
        changes = {name: value for name, value in changes.items() if name not in CUT}
    return cut, changes


def llama_names(config: AbbIEConfig) -> dict[str, dict[str, tuple]]:
    """Our name of each weight -> a Llama's names of its parts, in the order of their rows, and their shapes.
    Ours may have more rows, which pad the vocabulary."""
    D, M, V, KV = config.n_embd, config.ffn_dim, config.vocab_size, config.n_kv_heads * config.attn_head_dim
    names = {"embed": {"model.embed_tokens": (V, D)}, "norm": {"model.norm": (D,)}}
    if not config.tie_embeddings:
        names["unembed"] = {"lm_head": (V, D)}
    for i in range(config.n_blocks):
        ours, layer = f"blocks.{i}", f"model.layers.{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        names[f"{ours}.attn_norm"] = {f"{layer}.input_layernorm": (D,)}
        names[f"{ours}.attn.qkv"] = {
            f"{attn}.q_proj": (D, D), f"{attn}.k_proj": (KV, D), f"{attn}.v_proj": (KV, D)
        }  # fmt: skip
        names[f"{ours}.attn.out"] = {f"{attn}.o_proj": (D, D)}
        names[f"{ours}.mlp_norm"] = {f"{layer}.post_attention_layernorm": (D,)}
        names[f"{ours}.mlp.gate_up"] = {f"{mlp}.gate_proj": (M, D), f"{mlp}.up_proj": (M, D)}
        names[f"{ours}.mlp.down"] = {f"{mlp}.down_proj": (D, M)}
    return names


def from_llama(folder: Path, config: AbbIEConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Llama's weights under our names. They must be exactly those that its config asks for."""
    names = llama_names(config)
    shapes = {f"{part}.weight": shape for parts in names.values() for part, shape in parts.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    given = {name: shape for name, shape in given.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        given.pop("lm_head.weight", None)  # some write it all the same; transformers ignores it too
    differing = sorted({name for name, _ in shapes.items() ^ given.items()})
    check(
        not differing,
        f"{folder}: config.json and the weights disagree on {len(differing)} tensors\n"
        + ", ".join(differing[:3]),
    )
    state = {}
    for name, parts in names.items():
        tensor = torch.cat([tensors[f"{part}.weight"] for part in parts])
        if name in ("embed", "unembed"):
            tensor = F.pad(tensor, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
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


def read_json_if_any(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def end_tokens(folder: Path, vocab: dict[str, int]) -> list[int]:
    """All ids that end a text, the one that ends a document first."""
    ends = []
    for file in ("config.json", GENERATION):
        ids = read_json_if_any(folder / file).get("eos_token_id")  # Llama 3 has several
        ends += ids if isinstance(ids, list) else [ids]
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

        vocab_size = read_json_if_any(folder / "config.json").get("vocab_size", 0)
        check(type(vocab_size) is int, f"{folder}/config.json: vocab_size={vocab_size!r} is no integer")
        self.n_vocab = max(vocab_size, max(self.bytes) + 1)
        ends = end_tokens(folder, vocab)
        known = all(type(i) is int and 0 <= i < self.n_vocab for i in ends)
        check(known, f"{folder}: which token ends a text?\nset eos_token_id in its config.json")
        self.eot_token, self.eot_tokens = ends[0], frozenset(ends)
        text = tokenizer.encode("a")
        added = takewhile(lambda pair: pair[1], zip(text.ids, text.special_tokens_mask))
        self.bos_tokens = [i for i, _ in added]

    def encode_ordinary(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids) -> bytes:
        """The exact bytes, so that a character may be spread over tokens. Ids without a token are empty."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def copy_tokenizer(name: str, folder: Path):
    """Copy the files from which HFTokenizer(folder) and transformers give the same tokens."""
    tokenizer, origin = HFTokenizer(name), find_folder(name)
    for file in TOKENIZER_FILES:
        if (origin / file).exists():
            shutil.copyfile(origin / file, folder / file)
    # What ends a text may stand in the model's config.json, which is not the tokenizer's to copy.
    ends = [tokenizer.eot_token, *sorted(tokenizer.eot_tokens - {tokenizer.eot_token})]
    generation = read_json_if_any(folder / GENERATION)
    write_json(folder / GENERATION, {**generation, "eos_token_id": ends})
