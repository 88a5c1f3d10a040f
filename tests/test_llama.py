"""The specification of llama.py. Folders are written by transformers itself, with random weights."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

from transformers.initialization import no_init_weights  # noqa: E402

import eval_icl  # noqa: E402
import llama  # noqa: E402
import prepare_data  # noqa: E402
from llama import HFTokenizer  # noqa: E402
from model import AbbIE, AbbIEConfig, KVCache, UserError, save_checkpoint  # noqa: E402
from prepare_data import get_tokenizer  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-5)
STRETCH = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", **STRETCH}
TEXT = "naïve café 中文 🙂\n\tdef f(x): return x ** 2  # <|endoftext|> is text here\n"


def write_llama(folder, max_shard_size="1GB", dtype=torch.float32, **keys):
    """Have transformers write a random Llama -> what it reads back, in fp32."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **keys})).eval()
    with torch.no_grad():
        for p in model.parameters():  # of the size that training reaches, so that everything matters
            noise = torch.randn_like(p)
            p.copy_(noise / p.shape[-1] ** 0.5 if p.dim() == 2 else 1 + 0.2 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_tokenizer(folder) -> None:
    """A tokenizer.json of byte-level BPE, of 280 ids, set to truncate, to pad and to begin with a token."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(["the cat sat on the mat, the dog on the log"], tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    bpe.add_tokens(["two words"])
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)


def edit(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def tensors_of(folder):
    return safetensors_torch.load_file(folder / "model.safetensors")


def write_tensors(folder, tensors):
    safetensors_torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def greedy(model, idx, count):
    """Greedy decoding of one row at iters = 1, through the cache."""
    cache, out = KVCache(model.config, max_iters=1), []
    for _ in range(count):
        idx = model.step(idx, cache, iters=1).argmax(-1, keepdim=True)
        out.append(idx.item())
    return out


def tokens(vocab_size, batch=1, length=24):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_the_same_model(ours, theirs, vocab_size):
    idx = tokens(vocab_size, batch=2)
    with torch.no_grad():
        assert torch.allclose(ours(idx, iters=1)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)
    theirs.generation_config.eos_token_id = None  # both go on to the end
    generated = theirs.generate(idx[:1], attention_mask=torch.ones(1, 24), max_new_tokens=12, do_sample=False)
    assert generated[0, 24:].tolist() == greedy(ours, idx[:1], 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, eos_token_id=0)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


def load(folder, **keys):
    return AbbIE.from_checkpoint(f"hf:{folder}", **keys)


# --------------------------------------------------------------------------------------------------------- in

SHAPES = {
    "tied, grouped heads": dict(),
    "untied, no groups": dict(tie_word_embeddings=False, vocab_size=300, num_key_value_heads=4),
    "sharded": dict(max_shard_size="20KB", tie_word_embeddings=False),
    "another base and epsilon": dict(rope_theta=5e5, rms_norm_eps=1e-2, num_key_value_heads=1),
    "stretched wavelengths": dict(rope_parameters={**LLAMA3, "rope_theta": 500.0}),
    "bfloat16": dict(dtype=torch.bfloat16),
    "two layers": dict(num_hidden_layers=2),
}


@pytest.mark.parametrize("keys", SHAPES.values(), ids=SHAPES)
def test_one_iteration_is_the_llama_in_logits_and_greedy_generation(tmp_path, keys):
    theirs = write_llama(tmp_path, **keys)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("max_shard_size" in keys)
    ours = load(tmp_path)
    assert_the_same_model(ours, theirs, ours.config.vocab_size)
    padding = [part.weight[ours.config.vocab_size:] for part in (ours.embed, ours.unembed)]
    assert not any(rows.any() for rows in padding)
    assert ours.n_params() == theirs.num_parameters() + (1 if ours.config.tie_embeddings else 2) * 20 * 32


def test_the_shape_of_smollm2_135m(tmp_path):
    torch.manual_seed(0)
    with no_init_weights():
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
            rope_theta=100000.0, rms_norm_eps=1e-5)).eval()
    theirs.tie_weights()
    for p in theirs.parameters():
        p.data.fill_(1) if p.dim() == 1 else p.data.normal_(std=0.02)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # half a gigabyte
    assert ours.n_params() == 134_515_008 and ours.config.block_size == 2048  # of 8192: see MAX_BLOCK_SIZE
    assert [len(part) for part in (ours.head, ours.body, ours.tail)] == [10, 10, 10]
    assert_the_same_model(ours, theirs, 49152)


@pytest.mark.parametrize("rope", [
    {"rope_type": "default"}, {**LLAMA3, "original_max_position_embeddings": 512}])
def test_a_long_context_is_as_exact(tmp_path, rope):  # angles of a thousand radians show every rounding
    theirs = write_llama(tmp_path, hidden_size=128, max_position_embeddings=2048,
                         rope_parameters={**rope, "rope_theta": 5e5})
    idx = tokens(300, length=2048)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path)(idx, iters=1)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_rope_in_the_form_of_older_configs(tmp_path):
    theirs = write_llama(tmp_path, rope_parameters={**LLAMA3, "rope_theta": 500.0})
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    for key in ("type", "rope_type"):
        raw |= {"rope_theta": 500.0, "rope_scaling": {**STRETCH, key: "llama3"}}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert_the_same_model(load(tmp_path), theirs, 300)
    raw["rope_scaling"] = None
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = load(tmp_path).config
    assert config.rope_base == 500.0 and config.rope_scaling is None


@pytest.mark.parametrize("layers, keys, cut", [
    (5, {}, (1, 3, 1)), (6, {}, (2, 2, 2)), (2, {}, (0, 2, 0)), (1, {}, (0, 1, 0)), (16, {}, (5, 6, 5)),
    (5, dict(n_head_blocks=2, n_body_blocks=1), (2, 1, 2)),
    (5, dict(n_head_blocks=0, n_body_blocks=5), (0, 5, 0)),
])
def test_the_cut(tmp_path, layers, keys, cut):
    theirs = write_llama(tmp_path, num_hidden_layers=layers)
    model = load(tmp_path, **keys)
    assert tuple(len(part) for part in (model.head, model.body, model.tail)) == cut
    idx = tokens(300)
    expected = theirs(idx).logits
    assert torch.allclose(model(idx, iters=1)[0], expected, atol=1e-5, rtol=1e-5)
    assert (model(idx, iters=2)[0] - expected).abs().max() > 0.01  # and it iterates


def test_the_recurrence_and_context_are_chosen_at_loading(folder):
    model = load(folder, rule="recall", iters="1-3", block_size=32)
    assert (model.config.rule, model.config.iters, model.config.block_size) == ("recall", "1-3", 32)
    assert load(folder).config.block_size == 64  # max_position_embeddings
    assert model.meta["tokenizer"] == model.meta["ckpt"] == f"hf:{folder}"
    idx = tokens(300)
    assert torch.equal(model(idx, iters=1)[0], load(folder)(idx, iters=1)[0])
    with pytest.raises(UserError, match="has 5 layers, .* cut into 2 . 4 . 0\nset n_head_blocks, n_body"):
        load(folder, n_head_blocks=2, n_body_blocks=4)


def test_tensors_that_other_versions_write_are_understood(damaged):
    expected, weights = load(damaged), tensors_of(damaged)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    write_tensors(damaged, weights)
    assert torch.equal(load(damaged)(tokens(300))[0], expected(tokens(300))[0])
    weights["lm_head.weight"][7, 7] += 1
    write_tensors(damaged, weights)
    with pytest.raises(UserError, match="lm_head is not the embedding, although tie_word_embeddings is true"):
        load(damaged)


# -------------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("keys, named", [
    (dict(attention_bias=True), "attention_bias=True"), (dict(mlp_bias=True), "mlp_bias=True"),
    (dict(hidden_act="gelu"), "hidden_act='gelu'"), (dict(sliding_window=4096), "sliding_window=4096"),
    (dict(head_dim=16), "head_dim=16"), (dict(pretraining_tp=2), "pretraining_tp=2"),
    (dict(quantization_config={"bits": 4}), "quantization_config="),
    (dict(model_type="mistral"), "model_type='mistral'"),
    (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    (dict(auto_map={"AutoModel": "code.Model"}), "auto_map="),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}), "rope_type='yarn'"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_type='linear'"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
])
def test_what_our_block_lacks_is_refused_by_name(damaged, keys, named):
    edit(damaged, **keys)
    with pytest.raises(UserError, match=named) as caught:
        load(damaged)
    assert "asks for what this model does not have" in str(caught.value)


@pytest.mark.parametrize("keys, message", [
    (dict(hidden_size="32"), "hidden_size='32' is no positive int"),
    (dict(vocab_size=None), "vocab_size=None"), (dict(vocab_size=300.5), "vocab_size=300.5"),
    (dict(num_hidden_layers=-5), "num_hidden_layers=-5"), (dict(num_hidden_layers=True), "=True is no"),
    (dict(num_hidden_layers=6), "lacks tensors .9, such as model.layers.5"),
    (dict(num_hidden_layers=4), "has unexpected tensors .9, such as model.layers.4"),
    (dict(num_attention_heads=3), "head_dim"), (dict(num_key_value_heads=3), "n_kv_heads=3"),
    (dict(rms_norm_eps=0), "rms_norm_eps=0"), (dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings='no' is neither"),
    (dict(tie_word_embeddings=False), "lacks tensors .1, such as lm_head.weight"),
    (dict(rope_parameters=[1]), "no object"), (dict(rope_theta=-1, rope_parameters=None), "rope_theta=-1"),
    (dict(rope_parameters={**LLAMA3, "factor": "8"}), "factor='8'"),
    (dict(rope_parameters={**LLAMA3, "high_freq_factor": 1.0}), "low_freq_factor must be less"),
    (dict(intermediate_size=50), r"mlp.gate_proj.weight is F32 \[48, 32\]\nit should be .* \[50, 32\]"),
    (dict(intermediate_size=10 ** 12), "mlp.gate_proj.weight is F32"),  # refused before memory is taken
])
def test_a_config_that_does_not_fit_is_refused(damaged, keys, message):
    edit(damaged, **keys)
    with pytest.raises(UserError, match=message) as caught:
        load(damaged)
    assert len(str(caught.value).splitlines()) <= 3


def change(edit_tensors):
    def damage(folder):
        weights = tensors_of(folder)
        edit_tensors(weights)
        write_tensors(folder, weights)
    return damage


def cut_short(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def flip_header(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    at = data.index(b'"data_offsets":[') + 16
    data[at] ^= 1
    path.write_bytes(data)


def index_with(folder, name, target=None):
    """Replace the single file by an index whose first entry names another file."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    where = dict.fromkeys(safetensors_torch.load_file(folder / "model-00001-of-00001.safetensors"),
                          "model-00001-of-00001.safetensors")
    where[min(where)] = name
    if target is not None:
        shutil.copy(folder / "model-00001-of-00001.safetensors", target(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


NAME = "model.layers.1.mlp.up_proj.weight"
DAMAGE = {
    "cut short": (partial(cut_short, keep=30000), "model.safetensors is damaged"),
    "cut in its header": (partial(cut_short, keep=100), "model.safetensors is damaged"),
    "empty": (partial(cut_short, keep=0), "model.safetensors is damaged"),
    "a changed offset": (flip_header, "model.safetensors is damaged"),
    "a missing tensor": (change(lambda w: w.pop(NAME)), f"lacks tensors .1, such as {NAME}"),
    "an unexpected tensor": (change(lambda w: w.update(bias=torch.zeros(3))), "unexpected .*1, such as bias"),
    "a wrong shape": (change(lambda w: w.update({NAME: w[NAME].view(32, 48)})), rf"{NAME} is F32 \[32, 48\]"),
    "a wrong dtype": (change(lambda w: w.update({NAME: w[NAME].to(torch.int8)})), f"{NAME} is I8"),
    "not a number": (change(lambda w: w[NAME].fill_(float("nan"))), f"{NAME} is not finite"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no pickles"),
    "an index that climbs": (partial(index_with, name="../out.safetensors",
                                     target=lambda f: f.parent / "out.safetensors"), "of its own folder"),
    "an index with an absolute path": (partial(index_with, name="/tmp/x.safetensors"), "of its own folder"),
    "an index into a subfolder": (partial(index_with, name="a/x.safetensors"), "of its own folder"),
    "an index with a number": (partial(index_with, name=7), "of its own folder"),
    "an index to a missing file": (partial(index_with, name="model-00002.safetensors"), "has no model-00002"),
    "an index that is wrong": (partial(index_with, name="b.safetensors",
                                       target=lambda f: f / "b.safetensors"),
                               "says that .* is in .*.safetensors, not in .*.safetensors"),
    "an index of nothing": (lambda f: (f / "model.safetensors").unlink() or (
        f / "model.safetensors.index.json").write_text("{}"), "of its own folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read: No such file"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(damaged, damage, message):
    damage(damaged)
    with pytest.raises(UserError, match=message) as caught:
        load(damaged)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("package", ["safetensors", "tokenizers", "huggingface_hub"])
def test_a_missing_package_is_named(folder, monkeypatch, package, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"pip install .*{package}"):
        if package == "tokenizers":
            get_tokenizer(f"hf:{folder}")
        else:
            load(folder if package == "safetensors" else "owner/repo")


def test_a_folder_that_is_not_there():
    with pytest.raises(UserError, match="hf:/no/such/folder: there is no such folder"):
        load("/no/such/folder")


# ----------------------------------------------------------------------------------------------- repositories

class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub's protocol that a download needs, serving one folder as owner/repo."""
    protocol_version, commit, folder, asked = "HTTP/1.1", "0123456789" * 4, None, []

    def do_GET(self):
        self.asked.append(self.path)
        names = sorted(p.name for p in self.folder.iterdir())
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        if self.path.startswith("/api/models/owner/repo/tree/"):
            body = json.dumps([{"type": "file", "path": n, "oid": n, "size": (self.folder / n).stat().st_size}
                               for n in names]).encode()
        elif self.path.startswith("/api/models/owner/repo"):
            body = json.dumps({"id": "owner/repo", "sha": self.commit,
                               "siblings": [{"rfilename": n} for n in names]}).encode()
        elif self.path.startswith("/owner/repo/resolve/") and name in names:
            body = (self.folder / name).read_bytes()
        else:
            body = None
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder):
    Hub.folder, Hub.asked = folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(*args, **env):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def test_a_repository_is_downloaded_once_and_a_missing_one_is_a_short_error(hub, folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(b"not to be downloaded")
    where = dict(HF_HOME=str(tmp_path / "hub"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    export = partial(run, "llama.py", "--export")
    done = export(tmp_path / "out", "--ckpt", "hf:owner/repo", HF_ENDPOINT=hub, **where)
    assert done.returncode == 0, done.stderr
    assert any("model.safetensors" in path for path in Hub.asked)
    assert not any("pytorch_model" in path for path in Hub.asked)
    assert torch.equal(load(tmp_path / "out")(tokens(300))[0], load(folder)(tokens(300))[0])

    again = export(tmp_path / "again", "--ckpt", "hf:owner/repo", HF_HUB_OFFLINE="1", **where)
    assert again.returncode == 0, again.stderr  # from the copy on disk
    missing = export(tmp_path / "x", "--ckpt", "hf:owner/other", HF_ENDPOINT=hub, **where)
    assert missing.returncode == 2 and not (tmp_path / "x").exists()
    assert missing.stderr.startswith("error: hf:owner/other is no folder here, and cannot be downloaded")
    assert len(missing.stderr.splitlines()) <= 3


# -------------------------------------------------------------------------------------------------- tokenizer

def test_the_tokenizer_reads_and_spells_exactly(folder):
    tokenizer = get_tokenizer(f"hf:{folder}")
    ids = tokenizer.encode_ordinary(TEXT)
    assert tokenizer.name == f"hf:{folder}" and tokenizer.n_vocab == 300 and tokenizer.eot_token == 0
    assert tokenizer.decode(ids) == TEXT and tokenizer.decode_bytes(ids) == TEXT.encode()
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == TEXT.encode()
    assert tokenizer.decode(tokenizer.encode_ordinary("中")[:1]) == "\ufffd"  # a part of a character
    every_byte = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer.encode_ordinary(every_byte)) == every_byte
    assert len(ids) > 8 and tokenizer.eot_token not in ids  # nothing is cut or added; specials are text
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary("two words")) == b"two words"  # one added token
    assert tokenizer.decode([0]) == "<|endoftext|>" and tokenizer.decode([299]) == ""  # an id without a token
    plain = transformers.AutoTokenizer.from_pretrained(folder)("the cat", add_special_tokens=False).input_ids
    assert tokenizer.encode_ordinary("the cat") == plain and len(plain) < 7


def test_a_sentencepiece_tokenizer_spells_exactly(damaged):
    vocab = {"</s>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.save(str(damaged / "tokenizer.json"))
    tokenizer = HFTokenizer(str(damaged))
    ids = tokenizer.encode_ordinary("a a🙂\n")
    assert ids[:2] == [259, 259] and len(ids) == 7
    assert tokenizer.decode_bytes(ids) == " a a🙂\n".encode()  # SentencePiece begins a text with a space
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(damaged / "tokenizer.json"))
    with pytest.raises(UserError, match="does not spell bytes"):
        HFTokenizer(str(damaged))


def test_the_token_that_ends_a_text(damaged):
    for eos, expected in ((5, 5), ([7, 8], 7), (None, 0)):  # None: <|endoftext|> of tokenizer_config.json
        edit(damaged, eos_token_id=eos)
        assert HFTokenizer(str(damaged)).eot_token == expected
    (damaged / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert HFTokenizer(str(damaged)).eot_token == 0
    (damaged / "tokenizer_config.json").unlink()
    for eos in (None, 10 ** 6, -1, [], "x"):
        edit(damaged, eos_token_id=eos)
        with pytest.raises(UserError, match="which token ends a text"):
            HFTokenizer(str(damaged))


def test_a_missing_or_damaged_tokenizer_is_refused(damaged):
    (damaged / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        HFTokenizer(str(damaged))
    (damaged / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json"):
        HFTokenizer(str(damaged))


# -------------------------------------------------------------------------------------------------------- out

def a_checkpoint(run, tokenizer="bytes", **keys) -> AbbIE:
    torch.manual_seed(0)
    model = AbbIE(AbbIEConfig(**{**dict(vocab_size=257, block_size=64, n_embd=32, n_attn_heads=4, ffn_dim=48,
                                        n_head_blocks=1, n_body_blocks=2, n_tail_blocks=1), **keys}))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + torch.randn_like(p))
    save_checkpoint(run, 1, model.state_dict(), {}, {**vars(model.config), "tokenizer": tokenizer})
    return model


@pytest.mark.parametrize("keys", [
    dict(), dict(rule="abbie_c", n_kv_heads=1, norm_eps=1e-3), dict(rule="recall", tie_embeddings=False),
    dict(rope_base=500.0, rope_scaling=LLAMA3),
])
def test_an_exported_checkpoint_is_the_same_model_for_transformers_and_for_us(tmp_path, capsys, keys):
    ours = a_checkpoint(tmp_path / "run", **keys)
    out = tmp_path / "out"
    llama.main(["--ckpt", str(tmp_path / "run"), f"--export={out}"])
    assert "a Llama of 4 layers; no tokenizer.json: its tokens are bytes" in capsys.readouterr().err
    assert not (tmp_path / "out/tokenizer.json").exists()
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert isinstance(theirs, transformers.LlamaForCausalLM) and not any(report.values())
    assert theirs.config.vocab_size == 257 and theirs.config.eos_token_id is None  # nothing stops it
    assert_the_same_model(ours, theirs.eval(), 257)

    c, raw = ours.config, json.loads((out / "config.json").read_text())
    assert (raw["rope_theta"], raw["rope_scaling"]) == (c.rope_base, c.rope_scaling)  # for transformers 4
    again = load(out, rule=c.rule, n_head_blocks=c.n_head_blocks, n_body_blocks=c.n_body_blocks)
    assert again.config == c
    assert all(torch.equal(ours(tokens(257), iters=r)[0], again(tokens(257), iters=r)[0]) for r in (1, 2, 4))


def test_a_llama_goes_out_as_it_came_in_with_its_tokenizer(folder, tmp_path, capsys):
    llama.main(["--ckpt", f"hf:{folder}", "--export", str(tmp_path / "out")])
    assert "tokenizer" not in capsys.readouterr().err
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    assert all(new[key] == value for key, value in old.items() if key in new) and new["eos_token_id"] == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.decode(theirs("the cat").input_ids, skip_special_tokens=True) == "the cat"


@pytest.mark.parametrize("rule, reason", [
    ("abbie_d_literal", "its Tail reads B"), ("zero_pt", "it projects")])
def test_rules_that_are_no_llama_at_one_iteration_are_not_exported(tmp_path, rule, reason):
    a_checkpoint(tmp_path / "run", rule=rule)
    with pytest.raises(UserError, match=f"of rule {rule} cannot be exported: .*{reason}"):
        llama.main(["--ckpt", str(tmp_path / "run"), "--export", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_export_overwrites_nothing(tmp_path):
    a_checkpoint(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for taken in ("full", "full/mine.txt"):
        with pytest.raises(UserError, match="is there already, and no empty folder"):
            llama.main(["--ckpt", str(tmp_path / "run"), "--export", str(tmp_path / taken)])
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    llama.main(["--ckpt", str(tmp_path / "run"), "--export", str(tmp_path / "empty")])
    assert (tmp_path / "empty/config.json").exists()


def test_a_user_meets_short_errors(damaged, tmp_path):
    cut_short(damaged, 100)
    done = run("llama.py", "--ckpt", f"hf:{damaged}", "--export", tmp_path / "x")
    assert done.returncode == 2 and done.stdout == "" and "is damaged" in done.stderr
    assert len(done.stderr.splitlines()) <= 3 and done.stderr.startswith("error: ")
    with pytest.raises(UserError, match="unrecognized arguments: --exprt.*did you mean --export"):
        llama.main(["--exprt", "x", "--export", "y"])


# ---------------------------------------------------------------------------------------------- with the rest

@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    """Text in the tokens of the tiny Llama."""
    path = tmp_path_factory.mktemp("data")
    text = "".join(f"the dog {i} sat on the log, naïve 中 {i % 7}\n\n" for i in range(800))
    (path / "text.txt").write_text(text)
    prepare_data.main(["text", "--input", str(path / "text.txt"), "--tokenizer", f"hf:{folder}",
                       "--val_fraction", "0.2", "--out", str(path / "data")])
    return path / "data"


def test_a_retrofit_starts_at_the_llama_and_resumes_exactly(folder, data, tmp_path, monkeypatch):
    import train
    monkeypatch.chdir(tmp_path)
    command = [str(ROOT / "config/abbie_tiny.py"), f"--init_from=hf:{folder}", f"--data={data}",
               "--out_dir=out/x", "--iters=2", "--device=cpu", "--dtype=float32", "--block_size=64",
               "--tokens_per_step=512", "--micro_batch=4", "--max_steps=4", "--save_every=2",
               "--eval_every=4", "--eval_iters=1,2", "--lr=2e-3", "--warmup_steps=0"]
    train.main(command)
    log = [json.loads(line) for line in Path("out/x/log.jsonl").read_text().splitlines()]
    start, end = (line["val_loss"] for line in log if "val_loss" in line)

    shards = prepare_data.Shards(data, "val", 64)
    x, y = shards.batch(range(shards.n_windows))
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert start["1"] == pytest.approx(loss, abs=1e-5) and end["2"] < start["2"] - 0.05

    def saved():
        step = Path("out/x/step_00000004")
        return [torch.load(step / name, weights_only=True) for name in ("model.pt", "train.pt")]

    whole, model = saved(), AbbIE.from_checkpoint("out/x")
    assert model.config == load(folder).config  # cut in thirds
    shutil.rmtree("out/x/step_00000004")
    train.main(command)  # from step 2
    assert '"resumed_at": 2' in Path("out/x/log.jsonl").read_text()
    torch.testing.assert_close(saved(), whole, rtol=0, atol=0)

    llama.main(["--ckpt", "out/x", "--export", "exported"])  # and back out, tokenizer included
    exported = transformers.LlamaForCausalLM.from_pretrained("exported").eval()
    assert_the_same_model(model, exported, 300)
    assert transformers.AutoTokenizer.from_pretrained("exported")("the cat").input_ids[0] == 0


def test_sampling_speaks_as_the_llama_does(folder):
    theirs, tokenizer = transformers.LlamaForCausalLM.from_pretrained(folder).eval(), HFTokenizer(str(folder))
    ids = torch.tensor([tokenizer.encode_ordinary("the cat 中")])
    ids = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    done = run("sample.py", "--ckpt", f"hf:{folder}", "--iters=1", "--temperature=0", "--max_new_tokens=12",
               "--prompt", "the cat 中")
    assert done.returncode == 0, done.stderr
    assert "the cat 中" + done.stdout == tokenizer.decode(ids[0].tolist()) + "\n"


def test_a_llama_is_evaluated_with_its_own_tokenizer(folder, tmp_path, capsys):
    (tmp_path / "lambada_openai").mkdir()
    (tmp_path / "lambada_openai/test.jsonl").write_text(json.dumps({"text": "the cat sat on the mat"}) + "\n")
    out = tmp_path / "r.json"
    eval_icl.main(["--ckpt", f"hf:{folder}", "--iters", "1", "--tasks", "lambada_openai",
                   "--data_dir", str(tmp_path), "--out", str(out)])
    theirs, tokenizer = transformers.LlamaForCausalLM.from_pretrained(folder).eval(), HFTokenizer(str(folder))
    context, word = (tokenizer.encode_ordinary(text) for text in ("the cat sat on the", " mat"))
    with torch.no_grad():
        logp = theirs(torch.tensor([context + word])).logits[0, len(context) - 1:-1].log_softmax(-1)
    nll = -sum(row[i].item() for row, i in zip(logp, word))
    result = json.loads(out.read_text())["tasks"]["lambada_openai"]["iters"]["1"]
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
