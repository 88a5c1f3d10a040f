"""hf/: our models in transformers at any r, Llama folders in, tokenizers.

The control is a random Llama that transformers writes: at r = 1 both compute the same."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import peft
import pytest
import safetensors.torch
import tiktoken
import tokenizers
import torch
import transformers
from common import ROOT, STRETCH, greedy, make, randomize, refused, save, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import prepare_data
from checkpoint import load_model
from data import documents, get_tokenizer
from hf import export
from hf.llama import HFTokenizer
from model import MAX_ITERS

END = "<|endoftext|>"
TEXT = f"naïve café 中文 🙂\n\tdef f(x): return x ** 2  # {END} is text here, he'll  thaaaaaaaaa  12\n"
LLAMA = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-5,
)  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9], [100, 3], list(range(1, 12))]
MERGED = [token.encode() for token in ("th", "the", " th", " the", "aa", "aaaa", "aaa", "he", " a")]
MERGED += ["中".encode()[:2], "中".encode()]
BPE = tiktoken.Encoding(  # byte-level BPE of GPT-2's pattern, and 11 merges
    "small",
    pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    mergeable_ranks={token: i for i, token in enumerate([bytes([i]) for i in range(256)] + MERGED)},
    special_tokens={END: 267},
)


def rope(**keys):
    return {"rope_parameters": {"rope_theta": 500.0, **STRETCH, **keys}}


def write_llama(folder, max_shard_size="1GB", dtype=torch.float32, **keys):
    """Have transformers write a random Llama -> what it reads back, in fp32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, **keys})
    model = randomize(transformers.LlamaForCausalLM(config))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return theirs(folder, torch_dtype=torch.float32)


def write_tokenizer(folder):
    """The tokenizer.json of BPE, with an added token, set to truncate, to pad and to begin with a token."""
    bpe, template = export.fast_tokenizer(BPE), tokenizers.processors.TemplateProcessing
    bpe.post_processor = template(single=f"{END} $A", special_tokens=[(END, 267)])
    bpe.add_tokens(["two words"])
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END).save_pretrained(folder)


def edit(folder, file="config.json", **keys):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, eos_token_id=267)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    """The same weights as a looped model, cut into 1 + 2 x r + 2 blocks."""
    folder = tmp_path_factory.mktemp("exported") / "x"
    export.export(load_model(f"hf:{llama}", n_head_blocks=1, n_body_blocks=2, iters=2), folder)
    return folder


@pytest.fixture
def damaged(llama, tmp_path):
    """A copy of the Llama, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "damaged"))


def theirs(folder, **keys):
    """What transformers reads from a folder, set to decode on to the end."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **keys).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 256
    return model


def generate(model, **keys):
    """transformers' greedy decoding of PROMPTS, padded on the left -> 12 new ids of each row."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[256] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = (ids != 256).long()
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, **keys)[:, longest:].tolist()


def same(ours, other, tolerance=1e-5):
    return torch.allclose(ours, other, atol=tolerance, rtol=tolerance)


# -------------------------------------------------------------------- the looped model in transformers


@pytest.mark.parametrize("rule", MAX_ITERS)
def test_every_rule_gives_our_logits_at_every_r_and_comes_back(out, rule):
    model = make(vocab_size=257, rule=rule, iters=3, rope_scaling=STRETCH).eval()
    idx = tokens(vocab=257)
    model.meta = {"tokenizer": "bytes"}
    export.export(model, out)
    looped = theirs(out)
    for r in (1, 2, np.int64(4), 8):
        assert same(looped(idx, iters=r).logits, model(idx, iters=r)[0])
    assert torch.equal(looped(idx).logits, looped(idx, iters=3).logits)
    assert torch.equal(theirs(out, iters=4)(idx).logits, looped(idx, iters=4).logits)
    half = theirs(out, torch_dtype=torch.bfloat16)(idx).logits
    assert half.dtype == torch.bfloat16 and same(half.float(), looped(idx).logits, 0.3)
    again = load_model(f"hf:{out}")
    assert again.config == model.config and again.meta["tokenizer"] == "bytes"
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_at_one_iteration_states_loss_and_gradients_are_the_llamas(llama, exported):
    looped, plain, idx = theirs(exported), theirs(llama), tokens(vocab=300)
    found = looped(idx, iters=1, labels=idx, output_hidden_states=True)
    expected = plain(idx, labels=idx, output_hidden_states=True)
    assert same(found.logits, expected.logits) and same(found.loss, expected.loss)
    states = [expected.hidden_states[i] for i in (0, 1, 3, 4, 5)]  # a Body of two layers has one state
    assert len(found.hidden_states) == 5
    assert all(same(a, b) for a, b in zip(found.hidden_states, states))
    found.loss.backward(), expected.loss.backward()
    assert same(looped.model.embed.weight.grad[:300], plain.model.embed_tokens.weight.grad)
    assert same(looped(idx, iters=1, return_dict=False)[0], plain(idx, return_dict=False)[0])


def test_the_hidden_states_are_those_of_every_iteration(exported):
    model, idx = load_model(f"hf:{exported}"), tokens(vocab=300)
    states = theirs(exported)(idx, iters=8, output_hidden_states=True).hidden_states
    assert len(states) == 1 + 1 + 8 + 2  # embeddings, Head, u of every iteration, Tail
    expected = list(model.logits_at(idx, range(1, 9)))
    for u, logits in zip(states[2:10], expected):
        z = model.norm(model.run(model.tail, u, model.cos_sin(idx)))
        assert same(model.logits(z), logits)
    assert same(model.logits(states[-1]), expected[-1])


def test_positions_that_begin_again_separate_documents(llama, exported):
    looped, plain = theirs(exported).train(), theirs(llama).train()
    model = load_model(f"hf:{exported}")
    idx, lengths = tokens(vocab=300), (9, 12, 3)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    packed = plain(idx, position_ids=positions, use_cache=False).logits
    assert same(looped(idx, position_ids=positions, iters=1).logits, packed)
    alone = torch.cat([model(part, iters=4)[0] for part in idx.split(lengths, 1)], 1)
    assert not same(model(idx, iters=4)[0], alone, 0.1)
    looped.eval()
    for mask in (None, torch.ones(2, 24)):
        assert same(looped(idx, mask, positions, iters=4).logits, alone)
    padded = torch.ones(2, 24)
    padded[:, 21:] = 0
    assert same(looped(idx, padded, positions, iters=4).logits[:, :21], alone[:, :21])
    refused("say use_cache=False", looped, idx, position_ids=positions, use_cache=True)
    cache = transformers.DynamicCache()
    looped(idx, past_key_values=cache)
    refused("say use_cache=False", looped, idx[:, :1], position_ids=positions[:, :1], past_key_values=cache)


def test_generate_is_our_decoding_in_padded_batches(exported):
    looped, model = theirs(exported), load_model(f"hf:{exported}")
    for r in (1, 4):  # fewer and more than config.iters
        expected = [greedy(model, prompt, 12, r) for prompt in PROMPTS]
        assert generate(looped, iters=r) == expected == generate(looped, iters=r, use_cache=False)
    beams = {"num_beams": 3, "iters": 4}
    assert generate(looped, **beams) == generate(looped, **beams, use_cache=False)
    ids = torch.tensor(PROMPTS[:1])
    x = looped.get_input_embeddings()(ids)
    found = looped.generate(inputs_embeds=x, iters=4, max_new_tokens=12)
    assert found[0].tolist() == greedy(model, PROMPTS[0], 12, 4)


def test_generate_ends_where_the_context_does(exported):
    looped, idx = theirs(exported), tokens(1, 40, vocab=256)
    whole = looped.generate(idx, max_new_tokens=100)
    assert whole.shape == (1, 64) and looped.generate(idx, max_length=100).shape == (1, 64)
    looked_up = looped.generate(idx, max_new_tokens=100, prompt_lookup_num_tokens=5, eos_token_id=299)
    length = looked_up.shape[1]  # candidates need room too
    assert 59 <= length < 64 and torch.equal(looked_up, whole[:, :length])
    from_embeddings = looped.generate(inputs_embeds=looped.model.embed(idx), max_new_tokens=100)
    assert torch.equal(from_embeddings, whole[:, 40:])
    refused("prompt of 64 tokens leaves no room in a context of 64", looped.generate, whole)
    refused("65 tokens do not fit into a context of 64", looped, tokens(length=65))


def test_the_cache_knows_what_it_holds(exported):
    looped, idx, cache = theirs(exported), tokens(vocab=300), transformers.DynamicCache()
    parts = [looped(part, past_key_values=cache, iters=3).logits for part in idx.split((20, 3, 1), 1)]
    assert same(torch.cat(parts, 1), looped(idx, iters=3).logits)
    refused("holds 24 tokens, but not of so many", looped, idx[:, :1], past_key_values=cache, iters=4)


REFUSED_CALLS = [
    (dict(iter=2), "unknown argument .'iter'.: the number of iterations is iters"),
    (dict(iters=2.5), "iters=2.5"),
    (dict(output_attentions=True), "leave out output_attentions"),
    (dict(attention_mask=torch.ones(2, 1, 24, 24)), "must be .B, S. = .2, 24., not .2, 1, 24, 24"),
    (dict(inputs_embeds=torch.ones(2, 24, 32)), "either input_ids or inputs_embeds"),
    (dict(input_ids=torch.full((2, 24), 300)), "not in the vocabulary of 300: resize_token_embeddings"),
]


def test_what_is_not_supported_is_refused_by_name(exported):
    looped, idx = theirs(exported), tokens(vocab=300)
    for keys, message in REFUSED_CALLS:
        refused(message, looped, **{"input_ids": idx, **keys})
    refused("leave out cache_implementation", looped.generate, idx, cache_implementation="static")


def test_the_trainer_trains_it_as_it_trains_the_llama(llama, exported, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, vocab=300)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        gradient_checkpointing=True, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    losses = []
    for model in (theirs(exported, iters=1), theirs(llama)):
        trainer = transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        losses.append([trainer.train().training_loss, trainer.evaluate()["eval_loss"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size, rows", [(304, 320), (321, 384), (200, 256)])
def test_the_vocabulary_is_resized_into_its_padding_first(tmp_path, out, tied, size, rows):
    plain = write_llama(tmp_path / "llama", tie_word_embeddings=tied)
    model = load_model(f"hf:{tmp_path / 'llama'}", iters=2)
    model.meta["tokenizer"] = "bytes"
    export.export(model, out)
    looped, idx, kept = theirs(out), tokens(vocab=200), min(size, 300)
    looped.resize_token_embeddings(size)
    assert looped.get_input_embeddings().weight.shape == (rows, 32)
    assert looped.config.vocab_size == size
    plain.resize_token_embeddings(size)
    logits = looped(idx, iters=1).logits
    assert logits.shape[-1] == size and same(logits[..., :kept], plain(idx).logits[..., :kept])
    assert same(logits, plain(idx).logits, 1e-2)  # both begin new rows at the mean of the old
    looped(idx, labels=idx).loss.backward()
    assert looped.model.unembed.weight.grad.shape == (rows, 32)
    looped.save_pretrained(tmp_path / "y")
    again = load_model(f"hf:{tmp_path / 'y'}")
    assert again.config.vocab_size == size
    assert torch.equal(again(idx, iters=4)[0], looped(idx, iters=4).logits)
    assert torch.equal(theirs(tmp_path / "y")(idx, iters=4).logits, looped(idx, iters=4).logits)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_lora_trains_merges_and_comes_back_at_every_r(exported, tmp_path, targets):
    config = peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    tuned, idx = peft.get_peft_model(theirs(exported), config), tokens(vocab=300)
    tuned.train()
    tuned.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        tuned(idx, labels=idx, iters=3).loss.backward()
        optimizer.step()
    assert tuned.base_model.model.model.activation_checkpointing  # which test_model.py specifies
    tuned.eval()
    expected = [tuned(idx, iters=r).logits for r in (1, 2, 3, 4)]
    assert not same(expected[3], theirs(exported)(idx, iters=4).logits, 0.1)
    tuned.merge_and_unload().save_pretrained(tmp_path)
    for logits, merged in zip(expected, load_model(f"hf:{tmp_path}").logits_at(idx, [1, 2, 3, 4])):
        assert same(merged, logits, 1e-4)


def test_prompt_tuning_puts_learnt_embeddings_before_a_text(exported):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    tuned, idx = peft.get_peft_model(theirs(exported), config), tokens(vocab=300)
    x = torch.cat((tuned.get_prompt(2), tuned.get_input_embeddings()(idx)), 1)
    assert same(tuned(idx, iters=4).logits, theirs(exported)(inputs_embeds=x, iters=4).logits)


def test_the_harness_scores_as_our_model_does(exported):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(f"hf:{exported}"), get_tokenizer(f"hf:{exported}")
    pairs = [("the cat", " sat"), ("the cat", " sat on the mat"), ("naïve", " café")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    options = {"trust_remote_code": True, "iters": 4, "device": "cpu", "batch_size": 2}
    scores = HFLM(str(exported), **options).loglikelihood(requests)
    for (context, text), (score, _) in zip(pairs, scores):
        n = len(tokenizer.encode_ordinary(text))
        ids = torch.tensor([tokenizer.bos_tokens + tokenizer.encode_ordinary(context + text)])
        nll = F.cross_entropy(model(ids, iters=4)[0][0, -n - 1 : -1], ids[0, -n:], reduction="sum")
        assert score == pytest.approx(-nll.item(), abs=1e-4)


# --------------------------------------------------------------------------------- the folder we write


def test_the_command_writes_a_folder_that_explains_itself(tmp_path):
    save(tmp_path / "run", 1, make(vocab_size=257))
    flags = [f"--ckpt={tmp_path}/run", f"--out={tmp_path}/x", "--iters=4"]
    command = [sys.executable, str(ROOT / "hf/export.py"), *flags]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "x: abbie_d, 1 + 2 x r + 1 blocks, r = 4" in out
    assert all(path.name in out for path in (tmp_path / "x").iterdir())
    assert (tmp_path / "x/model.py").read_bytes() == (ROOT / "model.py").read_bytes()
    assert "--iters=4`" in (tmp_path / "x/README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x", trust_remote_code=False)
    ids = tokenizer("def ", return_tensors="pt")
    assert theirs(tmp_path / "x").generate(**ids, max_new_tokens=3).shape == (1, 7)


def test_a_full_disk_leaves_no_part_of_an_export(exported, tmp_path, out):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may be longer
    try:
        message = f"{out} could not be written .File too large"
        refused(message, export.export, load_model(f"hf:{exported}"), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_a_tokenizer_goes_out_as_a_plain_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(export, "get_tokenizer", lambda name: BPE if name == "gpt2" else get_tokenizer(name))
    export.write_tokenizer({"tokenizer": name}, tmp_path)
    ours = export.get_tokenizer(name)
    other = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == list(other(TEXT)) == ["input_ids", "attention_mask"]
    for text in (TEXT.replace(END, ""), "".join(map(chr, range(1, 300)))):
        ids = ours.encode_ordinary(text)
        assert other(text).input_ids == ids and other.decode(ids) == text
    assert other(END).input_ids == [other.eos_token_id] == [ours.eot_token]
    assert other(["a", "abc"], padding=True).attention_mask == [[0, 0, 1], [1, 1, 1]]
    assert HFTokenizer(str(tmp_path)).encode_ordinary(TEXT) == ours.encode_ordinary(TEXT)


def test_a_tokenizer_is_kept_when_its_origin_has_gone(damaged, tmp_path, out):
    edit(damaged, eos_token_id=[267, 5])
    edit(damaged, "generation_config.json", eos_token_id=7)
    original, model = get_tokenizer(f"hf:{damaged}"), load_model(f"hf:{damaged}")
    data = tmp_path / "data"
    for name in ("text", "val"):
        (tmp_path / f"{name}.txt").write_text(TEXT.replace(END, name))
    inputs = ["--input", f"{tmp_path}/text.txt", "--val_input", f"{tmp_path}/val.txt"]
    prepare_data.main(["text", *inputs, f"--tokenizer=hf:{damaged}", f"--out={data}"])
    shutil.rmtree(damaged)
    [ids] = documents(data, "val")
    assert original.decode(ids) == TEXT.replace(END, "val")
    checkpoint = save(tmp_path / "run", 1, model, tokenizer=f"hf:{damaged}", data=str(data))
    export.export(load_model(checkpoint), out)
    for folder in (checkpoint, out):
        tokenizer = get_tokenizer(f"hf:{folder}")
        assert tokenizer.encode_ordinary(TEXT) == original.encode_ordinary(TEXT)
        assert tokenizer.n_vocab == 300 and tokenizer.bos_tokens == [267]
        assert (tokenizer.eot_token, tokenizer.eot_tokens) == (267, {267, 5, 7})
    inputs = json.loads((out / "tokenizer_config.json").read_text())["model_input_names"]
    assert inputs == ["input_ids", "attention_mask"]
    assert str(damaged) not in (out / "config.json").read_text()
    assert load_model(f"hf:{out}").meta["tokenizer"] == f"hf:{out}"


# ---------------------------------------------------------------------------------- Llama's folders in


LONG = rope(original_max_position_embeddings=512, rope_theta=5e5)
SHAPES = [
    dict(),
    dict(tie_word_embeddings=False, num_key_value_heads=4, max_shard_size="20KB"),  # in several files
    dict(rope_theta=5e5, rms_norm_eps=1e-2, num_hidden_layers=2, dtype=torch.bfloat16),
    dict(hidden_size=128, max_position_embeddings=8192, **LONG),  # a thousand radians show every rounding
]


@pytest.mark.parametrize("keys", SHAPES)
def test_one_iteration_is_the_llama(tmp_path, keys):
    plain = write_llama(tmp_path, **keys)
    model = load_model(f"hf:{tmp_path}")
    context = model.config.block_size
    assert context == min(2048, plain.config.max_position_embeddings)  # a cache may hold as many
    idx = tokens(1, context, vocab=300)
    assert same(model(idx)[0], plain(idx).logits)  # which is what it does by default


def test_what_older_versions_write_is_understood(tmp_path):
    plain, idx = write_llama(tmp_path, **rope()), tokens(vocab=300)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load(path.read_bytes())
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(weights, path)
    scaling = {"type": "llama3", **{k: v for k, v in STRETCH.items() if k != "rope_type"}}
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    assert same(load_model(f"hf:{tmp_path}")(idx, iters=1)[0], plain(idx).logits)


CUTS = [
    (dict(), [1, 3, 1]),  # thirds; what they leave over goes to the Body
    (dict(n_head_blocks=2, n_body_blocks=1), [2, 1, 2]),
    (dict(n_head_blocks=0), [0, 4, 1]),
    (dict(n_head_blocks=1, n_body_blocks=2, n_tail_blocks=2), [1, 2, 2]),
    (dict(n_head_blocks=4, n_body_blocks=4, n_tail_blocks=4), [1, 3, 1]),  # the shape of another config
]


@pytest.mark.parametrize("changes, blocks", CUTS)
def test_a_llama_is_cut_as_asked(llama, monkeypatch, changes, blocks):
    monkeypatch.setenv("HOME", str(llama.parent))
    model = load_model(f"hf:~/{llama.name}", rule="recall", iters=3, **changes)
    idx = tokens(vocab=300)
    assert [len(part) for part in (model.head, model.body, model.tail)] == blocks
    assert (model.config.rule, model.config.iters) == ("recall", 3)
    assert model.meta["tokenizer"] == model.meta["ckpt"] == f"hf:~/{llama.name}"
    assert torch.equal(model(idx, iters=1)[0], load_model(f"hf:{llama}")(idx)[0])
    refused("has 5 blocks, not 7", load_model, f"hf:{llama}", n_head_blocks=2, n_body_blocks=4)


REFUSED = [
    (dict(attention_bias=True, hidden_act="gelu"), "not have: hidden_act='gelu', attention_bias=True"),
    (dict(head_dim=16), "head_dim=16"),
    (rope(rope_type="yarn"), "rope_type='yarn'"),
    (rope(factor="8"), "rope_scaling needs"),
    (dict(num_hidden_layers=6), "disagree on 9 tensors\nmodel.layers.5"),
    (dict(num_key_value_heads=3), "n_kv_heads=3"),
    (dict(intermediate_size=10**12), "disagree on 15 tensors\nmodel.layers.0"),  # nor do they fit into memory
]


@pytest.mark.parametrize("keys, message", REFUSED)
def test_what_our_block_does_not_compute_is_refused(damaged, keys, message):
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
    refused("not finite", load_model, source)
    path.rename(damaged / "pytorch_model.bin")
    refused("has no model.safetensors\nweights must be .safetensors: no pickles", load_model, source)


def test_a_repository_is_downloaded_without_pickles(damaged, hub, monkeypatch):
    (damaged / "pytorch_model.bin").write_bytes(b"not to be downloaded")
    files, commit = {path.name: path.read_bytes() for path in damaged.iterdir()}, "c" * 40
    tree = [{"type": "file", "path": n, "oid": n, "size": len(data)} for n, data in files.items()]
    about = {"id": "owner/repo", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    api, constants = "/api/models/owner/repo", huggingface_hub.constants
    hub.files[f"{api}/revision/main"] = json.dumps(about).encode()
    hub.files[f"{api}/tree/{commit}?recursive=true&expand=false"] = json.dumps(tree).encode()
    hub.files |= {f"/owner/repo/resolve/{commit}/{name}": data for name, data in files.items()}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load_model("hf:owner/repo")
    asked = [name for name, _ in hub.log]
    assert "model.safetensors" in asked and "pytorch_model.bin" not in asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again, original = load_model("hf:owner/repo"), load_model(f"hf:{damaged}")
    assert torch.equal(again(tokens())[0], original(tokens())[0])
    refused("hf:owner/other is no folder here, and cannot be downloaded", load_model, "hf:owner/other")


# ------------------------------------------------------------------------------------------- tokenizers


def test_the_tokenizer_reads_and_spells_exactly(llama):
    tokenizer = get_tokenizer(f"hf:{llama}")
    ids = tokenizer.encode_ordinary(TEXT)
    assert ids == BPE.encode_ordinary(TEXT)  # merges as in tiktoken, nothing cut or added, specials are text
    assert tokenizer.n_vocab == 300
    assert tokenizer.decode(ids) == TEXT
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == TEXT.encode()
    assert tokenizer.decode(tokenizer.encode_ordinary("🙂")[:1]) == "\ufffd"  # a part of a character
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary("two words")) == b"two words"
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
    assert ids[:2] == [259, 259] and len(ids) == 7 and tokenizer.bos_tokens == []
    assert tokenizer.decode_bytes(ids) == " a a🙂\n".encode()  # SentencePiece begins a text with a space
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(damaged / "tokenizer.json"))
    refused("does not spell bytes", get_tokenizer, f"hf:{damaged}")


ENDS = [(5, 5, [5]), ([7, 8], [8, 9], [7, 8, 9])]  # the second as in Llama 3
ENDS += [(None, None, [267])]  # END, of tokenizer_config.json


@pytest.mark.parametrize("config, generation, ends", ENDS)
def test_the_tokens_that_begin_and_end_a_text(damaged, config, generation, ends):
    edit(damaged, eos_token_id=config)
    edit(damaged, "generation_config.json", eos_token_id=generation)
    tokenizer = get_tokenizer(f"hf:{damaged}")
    assert (tokenizer.eot_token, tokenizer.eot_tokens) == (ends[0], set(ends))
    assert tokenizer.bos_tokens == [267]
    begun = AutoTokenizer.from_pretrained(damaged)("the cat", truncation=False).input_ids
    assert begun == tokenizer.bos_tokens + tokenizer.encode_ordinary("the cat")


@pytest.mark.parametrize("wrong", [10**6, "2", {"id": 2}, [[2]]])
def test_an_end_that_is_no_token_is_refused(damaged, wrong):
    edit(damaged, eos_token_id=wrong)
    refused("which token ends a text", get_tokenizer, f"hf:{damaged}")
