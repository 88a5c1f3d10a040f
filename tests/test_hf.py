"""The specification of hf/: our models in transformers at any r, and Llama folders in and out.

Folders of Llamas are written by transformers itself, with random weights. Nothing needs the network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

import huggingface_hub  # noqa: E402
import tiktoken  # noqa: E402
from common import ROOT, make, save, tokens  # noqa: E402
from hub import Hub  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import eval_icl  # noqa: E402
import train  # noqa: E402
from checkpoint import load_model  # noqa: E402
from data import Shards, get_tokenizer  # noqa: E402
from decode import generate  # noqa: E402
from hf import export  # noqa: E402
from hf.llama import HFTokenizer  # noqa: E402
from model import RULES, UserError  # noqa: E402

TEXT = "naïve café 中文 🙂\n\tdef f(x): return x ** 2  # <|endoftext|> is text here\n"
STRETCH = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9], [100, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
MERGED = [token.encode() for token in ("th", "the", " th", " the", "aa", "aaaa", "aaa", "he", " a")]
MERGED += ["中".encode()[:2], "中".encode()]
BPE = tiktoken.Encoding(  # byte-level BPE of GPT-2's pattern, and 11 merges
    "small",
    pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    mergeable_ranks={token: i for i, token in enumerate([bytes([i]) for i in range(256)] + MERGED)},
    special_tokens={"<|endoftext|>": 267},
)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Neither the network nor the home folder is touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
        yield


def ours(tokenizer="bytes", **keys):
    model = make(vocab_size=257, **keys).eval()
    model.meta = {"tokenizer": tokenizer}
    return model


def exported(folder, **keys):
    """A model of ours, and what transformers makes of its export."""
    model = ours(**keys)
    export.export(model, folder)
    return model, load_theirs(folder)


def load_theirs(folder, **keys):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **keys).eval()
    model.generation_config.eos_token_id = None  # decoding goes on to the end
    return model


def greedy(model, prompts=PROMPTS, n=12, **keys):
    """transformers' greedy decoding of a batch that is padded on the left -> the new ids of each row."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[256] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    keys = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 256, **keys}
    return model.generate(ids, attention_mask=mask, **keys)[:, longest:].tolist()


def cut(model):
    return [len(part) for part in (model.head, model.body, model.tail)]


def run(*args, **env):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
    )  # fmt: skip


# -------------------------------------------------------------------- the looped model in transformers


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_our_logits_at_every_r_and_comes_back(tmp_path, rule):
    model, theirs = exported(tmp_path / "x", rule=rule, iters="1-3", rope_scaling=STRETCH)
    idx = tokens(vocab=257)
    with torch.no_grad():
        for r in (1, 2, 4, 8):
            assert torch.allclose(theirs(idx, iters=r).logits, model(idx, iters=r)[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(theirs(idx).logits, theirs(idx, iters=2).logits)  # the mean of 1-3
        assert load_theirs(tmp_path / "x", iters=4)(idx).logits.equal(theirs(idx, iters=4).logits)
    again = load_model(f"hf:{tmp_path / 'x'}")
    assert again.config == model.config and again.meta["tokenizer"] == "bytes"
    assert torch.equal(again(idx)[0], model(idx)[0])
    recut = load_model(f"hf:{tmp_path / 'x'}", rule="recall", n_head_blocks=2, n_body_blocks=1)
    assert cut(recut) == [2, 1, 1]


@pytest.mark.parametrize("rule", ["abbie_d", "recall", "zero_pt"])
def test_generate_is_our_decoding_with_either_cache_and_without_in_padded_batches(tmp_path, rule):
    model, theirs = exported(tmp_path / "x", rule=rule)
    for r in (1, 2, 4):  # more and fewer than config.iters
        expected = generate(model, PROMPTS, 12, r)
        assert greedy(theirs, iters=r) == expected
        assert greedy(theirs, iters=r, use_cache=False) == expected
    beams = dict(num_beams=3, iters=4)
    assert greedy(theirs, **beams) == greedy(theirs, use_cache=False, **beams)
    last = load_theirs(tmp_path / "x", iters=4, cache_mode="last")
    assert greedy(last) == generate(model, PROMPTS, 12, 4, cache_mode="last") != greedy(theirs, iters=4)


def test_the_cache_has_a_slot_per_iteration_and_block_and_knows_what_it_holds(tmp_path):
    _, theirs = exported(tmp_path / "x")
    idx = tokens(vocab=257)
    out = theirs(idx, iters=3)
    cache = getattr(out, "cache", None) or out.past_key_values
    assert len(cache) == 2 + 3 * 2 and theirs.config.num_hidden_layers == 2 + 2 * 2
    assert load_theirs(tmp_path / "x", cache_mode="last").config.num_hidden_layers == 2 + 2
    more = theirs(idx[:, :3], past_key_values=cache, iters=3).logits  # several tokens after others
    assert torch.allclose(more, theirs(torch.cat((idx, idx[:, :3]), 1), iters=3).logits[:, -3:], atol=1e-5)
    with pytest.raises(ValueError, match="holds 27 tokens, but not of so many iterations"):
        theirs(idx[:, :1], past_key_values=cache, iters=4)
    with pytest.raises(ValueError, match="33 tokens do not fit into a context of 32"):
        theirs(tokens(length=33))
    with pytest.raises(ValueError, match="rule abbie_d runs at any integer from 1 to 128"):
        theirs(idx, iters=0)


@pytest.mark.parametrize("tied", [True, False])
def test_it_trains_and_a_save_of_transformers_is_the_same_model(tmp_path, tied):
    model, theirs = exported(tmp_path / "x", rule="recall", tie_embeddings=tied)
    idx = tokens(vocab=257)
    loss = theirs(idx, labels=idx, iters=2).loss
    assert loss.item() == pytest.approx(model(idx[:, :-1], idx[:, 1:], iters=2)[1].item(), abs=1e-5)
    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for _ in range(10):
        last = theirs(idx, labels=idx, iters=2).loss
        last.backward()
        assert all(p.grad is not None for p in theirs.parameters())
        optimizer.step(), optimizer.zero_grad()
    assert last < loss - 0.5
    theirs.eval().save_pretrained(tmp_path / "y")
    again = load_theirs(tmp_path / "y")
    assert torch.equal(again(idx).logits, theirs(idx).logits)
    assert (again.model.embed.weight is again.model.unembed.weight) == tied
    assert again.num_parameters() == model.n_params()
    assert torch.equal(load_model(f"hf:{tmp_path / 'y'}")(idx)[0], theirs(idx).logits)
    half = load_theirs(tmp_path / "y", torch_dtype=torch.bfloat16)
    logits = half(idx, iters=4).logits
    assert logits.dtype == torch.bfloat16 and half.model.rope_on(idx.device)[0].dtype == torch.float32
    torch.testing.assert_close(logits.float(), theirs(idx, iters=4).logits, atol=0.2, rtol=0.2)


def test_the_harness_scores_every_example_as_we_do(tmp_path):
    pytest.importorskip("accelerate")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model, _ = exported(tmp_path / "x", rule="recall", block_size=64)
    texts = "the cat| sat", "the cat| sat on the mat", "naïve| café", "x" * 90 + "| y", "|a b"
    pairs = [tuple(text.split("|")) for text in texts]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    harness = huggingface.HFLM(
        pretrained=str(tmp_path / "x"), trust_remote_code=True, iters=4, device="cpu", batch_size=2
    )
    encoded = eval_icl.encode_requests(get_tokenizer("bytes"), pairs)
    scores, is_greedy, *_ = eval_icl.score(model, encoded, [4])
    for (theirs, greedily), score, ours_greedily in zip(harness.loglikelihood(requests), scores, is_greedy):
        assert theirs == pytest.approx(score[0], abs=1e-4) and greedily == ours_greedily[0]


# --------------------------------------------------------------------------------- the folder we write


def test_the_command_writes_a_folder_that_explains_itself(tmp_path):
    save(tmp_path / "run", 1, ours())
    done = run("-m", "hf.export", "--ckpt", tmp_path / "run", "--out", tmp_path / "x", "--iters=4")
    assert done.returncode == 0, done.stderr
    assert "abbie_d, 1 + 2 x r + 1 blocks, iters 4" in done.stdout
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert names > {"model.py", "modeling_abbie.py", "config.json", "model.safetensors", "tokenizer.json"}
    assert all(name in done.stdout for name in names)
    assert (tmp_path / "x/model.py").read_bytes() == (ROOT / "model.py").read_bytes()
    assert "--iters=4`" in (tmp_path / "x/README.md").read_text()
    assert load_theirs(tmp_path / "x").config.iters == 4
    with pytest.raises(UserError, match="is there already, and no empty folder"):
        export.main(["--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / "x")])


FILES = ["config.json", "model.py", "modeling_abbie.py", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("missing", [True, False])
def test_a_changed_or_missing_file_is_refused(tmp_path, name, missing):
    export.export(ours(), tmp_path / "x")
    path = tmp_path / "x" / name
    data = path.read_bytes()
    path.unlink() if missing else path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(UserError, match=f"{name} (is missing|is damaged|cannot be read)") as caught:
        load_model(f"hf:{tmp_path / 'x'}")
    assert len(str(caught.value).splitlines()) <= 3


def test_the_tokenizer_of_bytes(tmp_path):
    export.export(ours(), tmp_path / "x")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "x", trust_remote_code=True)
    text, mine = "".join(map(chr, range(1, 300))), get_tokenizer("bytes")
    assert theirs(text).input_ids == mine.encode_ordinary(text)
    assert theirs.decode(theirs(text).input_ids) == text
    assert theirs("<|endoftext|>").input_ids == [theirs.eos_token_id] == [mine.eot_token] == [256]
    assert theirs(["a", "abc"], padding=True).attention_mask == [[0, 0, 1], [1, 1, 1]]
    assert HFTokenizer(str(tmp_path / "x")).encode_ordinary(TEXT) == mine.encode_ordinary(TEXT)


def test_merges_are_found_again_in_the_ranks():
    theirs = tokenizers.Tokenizer.from_str(json.dumps(export.tokenizer_json(BPE)))
    for text in (
        "the then thaaaaaaaaa aa\n  the",
        "中 中中 he'll  aaaaa 12",
        TEXT.replace("<|endoftext|>", ""),
    ):
        assert theirs.encode(text).ids == BPE.encode_ordinary(text)
    assert theirs.decode(theirs.encode("the 中 aaaa").ids) == "the 中 aaaa"


# ---------------------------------------------------------------------------------- Llama's folders in

LLAMA = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-5,
)  # fmt: skip


def write_llama(folder, max_shard_size="1GB", dtype=torch.float32, **keys):
    """Have transformers write a random Llama -> what it reads back, in fp32."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **keys})).eval()
    with torch.no_grad():
        for p in model.parameters():  # of the size that training reaches, so that everything matters
            noise = torch.randn_like(p)
            p.copy_(noise / p.shape[-1] ** 0.5 if p.dim() == 2 else 1 + 0.2 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return transformers.LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def write_tokenizer(folder):
    """The tokenizer.json of BPE, with an added token, set to truncate, to pad and to begin with a token."""
    bpe = tokenizers.Tokenizer.from_str(json.dumps(export.tokenizer_json(BPE)))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 267)]
    )
    bpe.add_tokens(["two words"])
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(
        folder
    )


def edit(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, eos_token_id=267)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def damaged(llama, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "damaged"))


def assert_the_same(model, theirs):
    idx = tokens(vocab=257)
    with torch.no_grad():
        assert torch.allclose(model(idx, iters=1)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)
    theirs.generation_config.eos_token_id = None
    assert greedy(theirs) == generate(model, PROMPTS, 12, 1)


SHAPES = {
    "tied, grouped heads": dict(),
    "untied, sharded, no groups": dict(
        tie_word_embeddings=False, num_key_value_heads=4, max_shard_size="20KB"
    ),
    "another base and epsilon": dict(rope_theta=5e5, rms_norm_eps=1e-2, num_key_value_heads=1),
    "stretched wavelengths": dict(rope_parameters={**STRETCH, "rope_theta": 500.0}),
    "bfloat16, two layers": dict(dtype=torch.bfloat16, num_hidden_layers=2),
}


@pytest.mark.parametrize("keys", SHAPES.values(), ids=SHAPES)
def test_one_iteration_is_the_llama(tmp_path, keys):
    theirs = write_llama(tmp_path, **keys)
    model = load_model(f"hf:{tmp_path}")
    assert_the_same(model, theirs)
    assert not model.embed.weight[300:].any() and not model.unembed.weight[300:].any()  # padding


def test_a_long_context_is_as_exact(tmp_path):  # angles of a thousand radians show every rounding
    rope = {**STRETCH, "original_max_position_embeddings": 512, "rope_theta": 5e5}
    theirs = write_llama(tmp_path, hidden_size=128, max_position_embeddings=8192, rope_parameters=rope)
    model, idx = load_model(f"hf:{tmp_path}"), tokens(vocab=300, batch=1, length=2048)
    assert model.config.block_size == 2048  # of 8192: a cache holds as many
    with torch.no_grad():
        assert torch.allclose(model(idx, iters=1)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_what_older_versions_write_is_understood(tmp_path):
    theirs = write_llama(tmp_path, rope_parameters={**STRETCH, "rope_theta": 500.0})
    weights = safetensors_torch.load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    scaling = {"type": "llama3", **{k: v for k, v in STRETCH.items() if k != "rope_type"}}
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    assert_the_same(load_model(f"hf:{tmp_path}"), theirs)
    weights["lm_head.weight"][7, 7] += 1
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight is not the embedding, although"):
        load_model(f"hf:{tmp_path}")


def test_the_cut_and_the_recurrence_are_chosen_at_loading(llama):
    path, idx = f"hf:{llama}", tokens(vocab=300)
    model = load_model(path, rule="recall", iters="1-3", block_size=32)
    assert cut(model) == [1, 3, 1]  # thirds; what they leave over goes to the Body
    assert (model.config.rule, model.config.iters, model.config.block_size) == ("recall", "1-3", 32)
    assert model.meta["tokenizer"] == model.meta["ckpt"] == path
    other = load_model(path, n_head_blocks=2, n_body_blocks=1)
    assert cut(other) == [2, 1, 2]
    assert torch.equal(model(idx, iters=1)[0], other(idx, iters=1)[0])
    assert (model(idx, iters=2)[0] - other(idx, iters=2)[0]).abs().max() > 0.01
    with pytest.raises(UserError, match="has 5 layers, .* cut into 2 . 4 . 0\nset n_head_blocks, n_body"):
        load_model(path, n_head_blocks=2, n_body_blocks=4)


def rope(**keys):
    return {"rope_parameters": {"rope_theta": 1e4, **keys}}


REFUSED = [
    (dict(attention_bias=True, hidden_act="gelu"), "not have: hidden_act='gelu', attention_bias=True"),
    (dict(head_dim=16), "head_dim=16"),
    (dict(model_type="mistral", auto_map={"AutoModel": "x.Y"}), "model_type='mistral', auto_map="),
    (rope(rope_type="yarn", factor=2.0), "rope_type='yarn'"),
    (rope(**{**STRETCH, "factor": "8"}), "factor='8'"),
    (rope(**{**STRETCH, "high_freq_factor": 1.0}), "low_freq_factor must be less"),
    (dict(hidden_size="32"), "hidden_size='32' is no positive int"),
    (dict(num_hidden_layers=6), "lacks tensors .9, such as model.layers.5"),
    (dict(num_hidden_layers=4), "has unexpected tensors .9, such as model.layers.4"),
    (dict(num_key_value_heads=3), "n_kv_heads=3"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings='no' is neither"),
    (dict(intermediate_size=10**12), r"is F32 \[48, 32\]\nit should be"),  # before memory is taken
]


@pytest.mark.parametrize("keys, message", REFUSED)
def test_what_our_block_does_not_compute_is_refused_by_name(damaged, keys, message):
    edit(damaged, **keys)
    with pytest.raises(UserError, match=message) as caught:
        load_model(f"hf:{damaged}")
    assert len(str(caught.value).splitlines()) <= 3


def test_a_damaged_folder_is_refused(damaged):
    path, index = damaged / "model.safetensors", damaged / "model.safetensors.index.json"
    data = path.read_bytes()
    weights = safetensors_torch.load(data)

    def refused(message):
        with pytest.raises(UserError, match=message) as caught:
            load_model(f"hf:{damaged}")
        assert len(str(caught.value).splitlines()) <= 3

    path.write_bytes(data[:30000])
    refused("model.safetensors is damaged")
    weights["model.norm.weight"][3] = float("nan")
    safetensors_torch.save_file(weights, path)
    refused("model.norm.weight is not finite")
    path.rename(damaged / "pytorch_model.bin")
    refused("has no model.safetensors\nweights must be .safetensors: no pickles")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "../x.safetensors")}))
    refused("must name .safetensors files of its own folder")
    (damaged / "config.json").write_text("{")
    refused("config.json is damaged")
    shutil.rmtree(damaged)
    refused("there is no such folder")


@pytest.mark.parametrize("package", ["safetensors", "tokenizers", "huggingface_hub"])
def test_a_missing_package_is_named(llama, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install .*{package}"):
        load_model("hf:owner/repo") if package == "huggingface_hub" else load_model(f"hf:{llama}")
        get_tokenizer(f"hf:{llama}")


def test_a_repository_is_downloaded_once_without_its_pickles(damaged, tmp_path, monkeypatch):
    (damaged / "pytorch_model.bin").write_bytes(b"not to be downloaded")
    files, commit = {path.name: path.read_bytes() for path in damaged.iterdir()}, "c" * 40
    tree = [{"type": "file", "path": n, "oid": n, "size": len(data)} for n, data in files.items()]
    about = {"id": "owner/repo", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    hub, api, constants = Hub(), "/api/models/owner/repo", huggingface_hub.constants
    hub.files[f"{api}/revision/main"] = json.dumps(about).encode()
    hub.files[f"{api}/tree/{commit}?recursive=true&expand=false"] = json.dumps(tree).encode()
    hub.files |= {f"/owner/repo/resolve/{commit}/{name}": data for name, data in files.items()}
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    there = load_model("hf:owner/repo")
    hub.http.shutdown(), hub.http.server_close()
    asked = [name for name, _ in hub.log]
    assert "model.safetensors" in asked and "pytorch_model.bin" not in asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for again in (load_model("hf:owner/repo"), load_model(f"hf:{damaged}")):
        assert torch.equal(again(tokens())[0], there(tokens())[0])
    with pytest.raises(UserError, match="hf:owner/other is no folder here, and cannot be downloaded"):
        load_model("hf:owner/other")


# ----------------------------------------------------------------------------------- Llama's tokenizer


def test_the_tokenizer_reads_and_spells_exactly(llama):
    tokenizer = get_tokenizer(f"hf:{llama}")
    ids = tokenizer.encode_ordinary(TEXT)
    assert tokenizer.name == f"hf:{llama}" and tokenizer.n_vocab == 300 and tokenizer.eot_token == 267
    assert tokenizer.decode(ids) == TEXT
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == TEXT.encode()
    assert tokenizer.decode(tokenizer.encode_ordinary("🙂")[:1]) == "\ufffd"  # a part of a character
    assert len(ids) > 8 and 267 not in ids  # nothing is cut or added; specials are text
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary("two words")) == b"two words"  # one added token
    assert (
        tokenizer.decode([267]) == "<|endoftext|>" and tokenizer.decode([299]) == ""
    )  # an id without a token


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
    for eos, expected in ((5, 5), ([7, 8], 7), (None, 267)):  # None: <|endoftext|> of tokenizer_config.json
        edit(damaged, eos_token_id=eos)
        assert HFTokenizer(str(damaged)).eot_token == expected
    edit(damaged, eos_token_id=10**6)
    with pytest.raises(UserError, match="which token ends a text"):
        HFTokenizer(str(damaged))
    (damaged / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        HFTokenizer(str(damaged))


# --------------------------------------------------------------------------------- Llama's folders out


@pytest.mark.parametrize(
    "keys", [dict(rule="abbie_c", n_kv_heads=1), dict(rope_scaling=STRETCH, tie_embeddings=False)]
)
def test_one_iteration_goes_out_as_a_llama_and_comes_back(tmp_path, keys):
    model = ours(**keys)
    export.export(model, tmp_path / "x", "llama")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert isinstance(theirs, transformers.LlamaForCausalLM) and not any(report.values())
    assert_the_same(model, theirs.eval())
    c = model.config
    again = load_model(f"hf:{tmp_path / 'x'}", rule=c.rule, n_head_blocks=1, n_body_blocks=2)
    assert again.config == c and torch.equal(model(tokens(), iters=4)[0], again(tokens(), iters=4)[0])


@pytest.mark.parametrize("rule", ["abbie_d_literal", "zero_pt"])
def test_rules_that_are_no_llama_are_not_exported_as_one(tmp_path, rule):
    with pytest.raises(UserError, match=f"rule {rule} is no Llama at r = 1"):
        export.export(ours(rule=rule), tmp_path / "x", "llama")
    assert not (tmp_path / "x").exists()


def test_a_llama_becomes_a_looped_model_and_goes_out_with_its_tokenizer(llama, tmp_path, monkeypatch):
    import prepare_data

    monkeypatch.chdir(tmp_path)
    text = "".join(f"the dog {i} sat on the log, naïve 中 {i % 7}\n\n" for i in range(800))
    Path("text.txt").write_text(text)
    prepare_data.main(f"text --input text.txt --tokenizer hf:{llama} --val_fraction 0.2 --out data".split())
    flags = "--iters=2 --device=cpu --dtype=float32 --block_size=64 --tokens_per_step=512 --micro_batch=4"
    flags += " --lr=2e-3 --max_steps=4 --eval_every=4 --eval_iters=1,2 --warmup_steps=0"
    flags += " --out_dir=out/x --data=data"
    train.main([str(ROOT / "config/abbie_tiny.py"), f"--init_from=hf:{llama}", *flags.split()])
    log = [json.loads(line) for line in Path("out/x/log.jsonl").read_text().splitlines()]
    start, end = (line["val_loss"] for line in log if "val_loss" in line)
    shards = Shards("data", "val", 64)
    x, y = shards.batch(range(shards.n_windows))
    theirs = transformers.LlamaForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert start["1"] == pytest.approx(loss, abs=1e-5) and end["2"] < start["2"] - 0.05

    export.main(["--ckpt", "out/x", "--out", "exported"])
    looped, folder = load_theirs("exported"), f"hf:{llama}"
    assert torch.allclose(looped(x[:2]).logits, load_model("out/x")(x[:2])[0], atol=1e-5)
    again = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
    ids = again("the cat", add_special_tokens=False).input_ids
    assert ids == get_tokenizer(folder).encode_ordinary("the cat")
