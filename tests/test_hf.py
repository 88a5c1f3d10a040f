"""The specification of hf/: our models in transformers at any r, and Llama folders in and out.

Folders of Llamas are written by transformers itself, with random weights. Nothing needs the network."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import tiktoken
import tokenizers
import torch
import transformers
from common import ROOT, make, save, tokens
from hub import Hub
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_icl
import prepare_data
import train
from checkpoint import load_model
from config import load_config
from data import Shards, get_tokenizer
from decode import generate
from hf import export
from model import RULES, AbbIE, UserError

END = "<|endoftext|>"
TEXT = f"naïve café 中文 🙂\n\tdef f(x): return x ** 2  # {END} is text here, he'll  thaaaaaaaaa  12\n"
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
    special_tokens={END: 267},
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def ours(**keys):
    model = make(vocab_size=257, **keys).eval()
    model.meta = {"tokenizer": "bytes"}
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


def greedy(model, **keys):
    """transformers' greedy decoding of PROMPTS, padded on the left -> 12 new ids of each row."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[256] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    keys |= {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    return model.generate(ids, attention_mask=(ids != 256).long(), **keys)[:, longest:].tolist()


def same(ours, theirs, tolerance=1e-5):
    return torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance)


def cut(model):
    return [len(part) for part in (model.head, model.body, model.tail)]


def refused(message, function, *args, **keys):
    with pytest.raises(UserError, match=message) as caught:
        function(*args, **keys)
    assert len(str(caught.value).splitlines()) <= 3


# -------------------------------------------------------------------- the looped model in transformers


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_our_logits_at_every_r_and_comes_back(tmp_path, rule):
    model, theirs = exported(tmp_path / "x", rule=rule, iters="1-3", rope_scaling=STRETCH)
    idx = tokens(vocab=257)
    for r in (1, 2, 4, 8):
        assert same(theirs(idx, iters=r).logits, model(idx, iters=r)[0])
    assert torch.equal(theirs(idx).logits, theirs(idx, iters=2).logits)  # the mean of 1-3
    assert load_theirs(tmp_path / "x", iters=4)(idx).logits.equal(theirs(idx, iters=4).logits)
    again = load_model(f"hf:{tmp_path / 'x'}")
    assert again.config == model.config and again.meta["tokenizer"] == "bytes"
    assert torch.equal(again(idx)[0], model(idx)[0])


@pytest.mark.parametrize("rule", ["abbie_d", "zero_pt"])
def test_generate_is_our_decoding_with_either_cache_and_without_in_padded_batches(tmp_path, rule):
    model, theirs = exported(tmp_path / "x", rule=rule)
    for r in (1, 2, 4):  # more and fewer than config.iters
        expected = generate(model, PROMPTS, 12, r)
        assert greedy(theirs, iters=r) == expected == greedy(theirs, iters=r, use_cache=False)
    beams = greedy(theirs, num_beams=3, iters=4)
    assert beams == greedy(theirs, num_beams=3, iters=4, use_cache=False)
    last = load_theirs(tmp_path / "x", iters=4, cache_mode="last")
    assert greedy(last) == generate(model, PROMPTS, 12, 4, cache_mode="last") != greedy(theirs, iters=4)


def test_the_cache_has_a_slot_per_iteration_and_block_and_knows_what_it_holds(tmp_path):
    _, theirs = exported(tmp_path / "x")
    assert theirs.config.num_hidden_layers == 2 + 2 * 2
    assert load_theirs(tmp_path / "x", cache_mode="last").config.num_hidden_layers == 2 + 2
    idx, cache = tokens(vocab=257), transformers.DynamicCache()
    whole = theirs(idx, iters=3).logits
    parts = [theirs(part, past_key_values=cache, iters=3).logits for part in idx.split((20, 3, 1), 1)]
    assert same(torch.cat(parts, 1), whole)
    with pytest.raises(ValueError, match="holds 24 tokens, but not of so many iterations"):
        theirs(idx[:, :1], past_key_values=cache, iters=4)
    with pytest.raises(ValueError, match="33 tokens do not fit into a context of 32"):
        theirs(tokens(length=33))


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
    again, half = load_theirs(tmp_path / "y"), load_theirs(tmp_path / "y", torch_dtype=torch.bfloat16)
    assert torch.equal(again(idx).logits, theirs(idx).logits)
    assert (again.model.embed.weight is again.model.unembed.weight) == tied
    assert again.num_parameters() == model.n_params()
    assert torch.equal(load_model(f"hf:{tmp_path / 'y'}")(idx)[0], theirs(idx).logits)
    logits = half(idx, iters=4).logits
    assert logits.dtype == torch.bfloat16 and half.model.rope_on(idx.device)[0].dtype == torch.float32
    assert same(logits.float(), theirs(idx, iters=4).logits, 0.2)


def test_the_harness_scores_every_example_as_we_do(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, _ = exported(tmp_path / "x", rule="recall", block_size=64)
    texts = "the cat| sat", "the cat| sat on the mat", "naïve| café", "x" * 90 + "| y", "|a b"
    pairs = [tuple(text.split("|")) for text in texts]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    how = {"trust_remote_code": True, "iters": 4, "device": "cpu", "batch_size": 2}
    found = HFLM(pretrained=str(tmp_path / "x"), **how).loglikelihood(requests)
    encoded = eval_icl.encode_requests(get_tokenizer("bytes"), pairs)
    scores, is_greedy, *_ = eval_icl.score(model, encoded, [4])
    assert [score for score, _ in found] == pytest.approx([score[0] for score in scores], abs=1e-4)
    assert [greedily for _, greedily in found] == [greedily[0] for greedily in is_greedy]


# --------------------------------------------------------------------------------- the folder we write


def test_the_command_writes_a_folder_that_explains_itself(tmp_path, capsys):
    save(tmp_path / "run", 1, ours())
    command = ["--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / "x"), "--iters=4"]
    export.main(command)
    out = capsys.readouterr().out
    assert "abbie_d, 1 + 2 x r + 1 blocks, iters 4" in out
    assert all(path.name in out for path in (tmp_path / "x").iterdir())
    assert (tmp_path / "x/model.py").read_bytes() == (ROOT / "model.py").read_bytes()
    assert "--iters=4`" in (tmp_path / "x/README.md").read_text()
    assert load_theirs(tmp_path / "x").config.iters == 4
    refused("is there already, and no empty folder", export.main, command)


def test_the_tokenizer_of_a_local_folder_goes_along(llama, tmp_path):
    export.export(load_model(f"hf:{llama}", rule="recall"), tmp_path / "x")
    name = load_model(f"hf:{tmp_path / 'x'}").meta["tokenizer"]
    assert name == f"hf:{tmp_path / 'x'}" and get_tokenizer(name).encode_ordinary(
        TEXT
    ) == BPE.encode_ordinary(TEXT)
    assert str(llama) not in (tmp_path / "x/config.json").read_text()


def test_a_changed_or_missing_file_is_refused(tmp_path):
    export.export(ours(), tmp_path / "x")
    for name in ("config.json", "model.py", "modeling_abbie.py", "model.safetensors", "tokenizer.json"):
        path = tmp_path / "x" / name
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        refused(f"{name} is missing or damaged", load_model, f"hf:{tmp_path / 'x'}")
        path.unlink()
        refused(f"{name} is missing or damaged", load_model, f"hf:{tmp_path / 'x'}")
        path.write_bytes(data)


def test_the_tokenizer_of_bytes(tmp_path):
    export.export(ours(), tmp_path / "x")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "x", trust_remote_code=True)
    text, mine = "".join(map(chr, range(1, 300))), get_tokenizer("bytes")
    assert theirs(text).input_ids == mine.encode_ordinary(text)
    assert theirs.decode(theirs(text).input_ids) == text
    assert theirs(END).input_ids == [theirs.eos_token_id] == [mine.eot_token] == [256]
    assert theirs(["a", "abc"], padding=True).attention_mask == [[0, 0, 1], [1, 1, 1]]
    assert get_tokenizer(f"hf:{tmp_path / 'x'}").encode_ordinary(TEXT) == mine.encode_ordinary(TEXT)


# ---------------------------------------------------------------------------------- Llama's folders in

LLAMA = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-5,
)  # fmt: skip


def rope(**keys):
    return {"rope_parameters": {"rope_theta": 500.0, **STRETCH, **keys}}


def write_llama(folder, max_shard_size="1GB", dtype=torch.float32, **keys):
    """Have transformers write a random Llama -> what it reads back, in fp32."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **keys}))
    with torch.no_grad():
        for p in model.parameters():  # of the size that training reaches, so that everything matters
            noise = torch.randn_like(p)
            p.copy_(noise / p.shape[-1] ** 0.5 if p.dim() == 2 else 1 + 0.2 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return transformers.LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def write_tokenizer(folder):
    """The tokenizer.json of BPE, with an added token, set to truncate, to pad and to begin with a token."""
    bpe, template = export.fast_tokenizer(BPE), tokenizers.processors.TemplateProcessing
    bpe.post_processor = template(single=f"{END} $A", special_tokens=[(END, 267)])
    bpe.add_tokens(["two words"])
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END).save_pretrained(folder)


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


SHAPES = [
    dict(),
    dict(tie_word_embeddings=False, num_key_value_heads=4, max_shard_size="20KB"),  # in several files
    dict(rope_theta=5e5, rms_norm_eps=1e-2, num_hidden_layers=2, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("keys", SHAPES)
def test_one_iteration_is_the_llama(tmp_path, keys):
    theirs, idx = write_llama(tmp_path, **keys), tokens(vocab=300)
    model = load_model(f"hf:{tmp_path}")
    assert same(model(idx)[0], theirs(idx).logits)  # which is what it does by default


def test_a_long_context_is_as_exact(tmp_path):  # angles of a thousand radians show every rounding
    long = rope(original_max_position_embeddings=512, rope_theta=5e5)
    theirs = write_llama(tmp_path, hidden_size=128, max_position_embeddings=8192, **long)
    model = load_model(f"hf:{tmp_path}")
    idx = tokens(vocab=300, batch=1, length=2048)
    assert model.config.block_size == 2048  # of 8192: a cache holds as many
    assert same(model(idx, iters=1)[0], theirs(idx).logits)


def test_what_older_versions_write_is_understood(tmp_path):
    theirs = write_llama(tmp_path, **rope())
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load(path.read_bytes())
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(weights, path)
    scaling = {"type": "llama3", **{k: v for k, v in STRETCH.items() if k != "rope_type"}}
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    idx = tokens(vocab=300)
    assert same(load_model(f"hf:{tmp_path}")(idx, iters=1)[0], theirs(idx).logits)
    weights["lm_head.weight"][7, 7] += 1
    safetensors.torch.save_file(weights, path)
    refused("lm_head.weight is not the embedding, although", load_model, f"hf:{tmp_path}")


def test_a_subclass_is_not_exported_as_what_it_is_not(tmp_path):
    class Ours(AbbIE):
        pass

    model = Ours(ours().config)
    refused("does not compute what Ours does", export.export, model, tmp_path / "x")


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
    refused("5 layers, fewer than 2 . 4\nset n_head", load_model, path, n_head_blocks=2, n_body_blocks=4)
    refused("has 5 blocks, not 6", load_model, path, n_tail_blocks=2)


REFUSED = [
    (dict(attention_bias=True, hidden_act="gelu"), "not have: hidden_act='gelu', attention_bias=True"),
    (dict(head_dim=16), "head_dim=16"),
    (rope(rope_type="yarn"), "rope_type='yarn'"),
    (rope(factor="8"), "factor='8' is no positive number"),
    (dict(num_hidden_layers=6), "disagree on 9 tensors\nmodel.layers.5"),
    (dict(num_key_value_heads=3), "n_kv_heads=3"),
    (dict(intermediate_size=10**12), "its weights do not fit its config"),  # nor does it fit into memory
]


@pytest.mark.parametrize("keys, message", REFUSED)
def test_what_our_block_does_not_compute_is_refused_by_name(damaged, keys, message):
    edit(damaged, **keys)
    refused(message, load_model, f"hf:{damaged}")


def test_a_damaged_folder_is_refused(damaged):
    path, source = damaged / "model.safetensors", f"hf:{damaged}"
    data = path.read_bytes()
    weights = safetensors.torch.load(data)
    path.write_bytes(data[:30000])
    refused("model.safetensors is damaged", load_model, source)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    safetensors.torch.save_file(weights, path)
    refused("model.norm.weight is not finite", load_model, source)
    path.rename(damaged / "pytorch_model.bin")
    refused("has no model.safetensors\nweights must be .safetensors: no pickles", load_model, source)
    shutil.rmtree(damaged)
    refused("there is no such folder", load_model, source)


def test_a_missing_package_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused("pip install .*tokenizers", get_tokenizer, f"hf:{llama}")


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
    load_model("hf:owner/repo")
    hub.shutdown()
    hub.server_close()
    asked = [name for name, _ in hub.log]
    assert "model.safetensors" in asked and "pytorch_model.bin" not in asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again, original = load_model("hf:owner/repo"), load_model(f"hf:{damaged}")
    assert torch.equal(again(tokens())[0], original(tokens())[0])
    refused("hf:owner/other is no folder here, and cannot be downloaded", load_model, "hf:owner/other")


# ----------------------------------------------------------------------------------- Llama's tokenizer


def test_the_tokenizer_reads_and_spells_exactly(llama):
    tokenizer = get_tokenizer(f"hf:{llama}")
    ids = tokenizer.encode_ordinary(TEXT)
    assert ids == BPE.encode_ordinary(TEXT)  # merges as in tiktoken, nothing cut or added, specials are text
    assert tokenizer.n_vocab == 300
    assert tokenizer.decode(ids) == TEXT
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == TEXT.encode()
    assert tokenizer.decode(tokenizer.encode_ordinary("🙂")[:1]) == "\ufffd"  # a part of a character
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary("two words")) == b"two words"  # one added token
    assert tokenizer.decode([267]) == END and tokenizer.decode([299]) == ""  # an id without a token


def test_a_sentencepiece_tokenizer_spells_exactly(damaged):
    vocab = {"</s>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.save(str(damaged / "tokenizer.json"))
    tokenizer = get_tokenizer(f"hf:{damaged}")
    ids = tokenizer.encode_ordinary("a a🙂\n")
    assert ids[:2] == [259, 259] and len(ids) == 7
    assert tokenizer.decode_bytes(ids) == " a a🙂\n".encode()  # SentencePiece begins a text with a space
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(damaged / "tokenizer.json"))
    refused("does not spell bytes", get_tokenizer, f"hf:{damaged}")


def test_the_token_that_ends_a_text(damaged):
    for eos, expected in ((5, 5), ([7, 8], 7), (None, 267)):  # None: END, of tokenizer_config.json
        edit(damaged, eos_token_id=eos)
        assert get_tokenizer(f"hf:{damaged}").eot_token == expected
    edit(damaged, eos_token_id=10**6)
    refused("which token ends a text", get_tokenizer, f"hf:{damaged}")


# --------------------------------------------------------------------------------- Llama's folders out


@pytest.mark.parametrize("keys", [dict(n_kv_heads=1), dict(rope_scaling=STRETCH, tie_embeddings=False)])
def test_one_iteration_goes_out_as_a_llama_and_comes_back(tmp_path, keys):
    model, idx = ours(rule="abbie_c", **keys), tokens(vocab=257)
    export.export(model, tmp_path / "x", "llama")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert isinstance(theirs, transformers.LlamaForCausalLM) and not any(report.values())
    assert same(theirs.eval()(idx).logits, model(idx, iters=1)[0])
    cut = {"n_head_blocks": 1, "n_body_blocks": 2}
    again = load_model(f"hf:{tmp_path / 'x'}", rule="abbie_c", iters=2, **cut)
    assert again.config == model.config
    assert torch.equal(again(idx, iters=4)[0], model(idx, iters=4)[0])


def test_a_rule_that_is_no_llama_is_not_exported_as_one(tmp_path):
    model = ours(rule="zero_pt")
    refused("rule zero_pt is no Llama at r = 1", export.export, model, tmp_path / "x", "llama")
    assert not (tmp_path / "x").exists()


def test_a_llama_becomes_a_looped_model_and_goes_out_with_its_tokenizer(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(f"the dog {i} sat on the log, naïve 中 {i % 7}\n\n" for i in range(800))
    Path("text.txt").write_text(text)
    prepare_data.main(f"text --input text.txt --tokenizer hf:{llama} --val_fraction 0.2 --out data".split())
    flags = f"--init_from=hf:{llama} --data=data --out_dir=out/x --block_size=64 --tokens_per_step=512"
    flags += " --iters=2 --lr=2e-3 --max_steps=4 --eval_every=4 --eval_iters=1,2 --warmup_steps=0"
    flags += " --device=cpu --dtype=float32 --micro_batch=4"
    train.main([str(ROOT / "config/abbie_tiny.py"), *flags.split()])
    log = [json.loads(line) for line in Path("out/x/log.jsonl").read_text().splitlines()]
    start, end = (line["val_loss"] for line in log if "val_loss" in line)
    shards = Shards("data", "val", 64)
    x, y = shards.batch(range(shards.n_windows))
    theirs = transformers.LlamaForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert start["1"] == pytest.approx(loss, abs=1e-5) and end["2"] < start["2"] - 0.05

    class Ours(AbbIE):
        pass

    config = load_config([str(ROOT / "config/abbie_tiny.py"), *flags.split()])
    assert type(train.new_model(config, shards, Ours)) is Ours  # a Llama may start a subclass too

    export.main(["--ckpt", "out/x", "--out", "exported"])
    assert same(load_theirs("exported")(x[:2]).logits, load_model("out/x")(x[:2])[0])
    again = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
    ids = again("the cat", add_special_tokens=False).input_ids
    assert ids == get_tokenizer(f"hf:{llama}").encode_ordinary("the cat")
