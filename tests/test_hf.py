"""hf/: our models in transformers at any r, Llama folders in, tokenizers.

The control is a random Llama that transformers writes: at r = 1 both compute the same."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import peft
import pytest
import tiktoken
import tokenizers
import torch
import transformers
from common import ROOT, STRETCH, documents, greedy, make, randomize, refused, save, tokens
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import prepare_data
from checkpoint import load_model
from data import get_tokenizer
from hf import export
from model import MAX_ITERS

END = "<|endoftext|>"
TEXT = f"naïve café 中文 🙂\n\tdef f(x): return x  # {END} is text, he'll  thaaaaaaaaa\n"
IDX = tokens(vocab=300)
LLAMA = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=264,
)  # fmt: skip
ROPE = {"rope_theta": 500.0, **STRETCH}
LONG = {**ROPE, "original_max_position_embeddings": 512, "rope_theta": 5e5}
TOKENS = [bytes([i]) for i in range(256)] + [b"th", b"the", b" th", b" the"]
TOKENS += [b"aa", b"aaaa", b"aaa", "中".encode()[:2]]
BPE = tiktoken.Encoding(  # byte-level BPE of GPT-2's pattern
    "small",
    pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    mergeable_ranks={token: i for i, token in enumerate(TOKENS)},
    special_tokens={END: 264},
)


def write_llama(folder, dtype=torch.float32, max_shard_size="1GB", **keys):
    """Have transformers write a random Llama -> what it reads back, in fp32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, **keys})
    model = randomize(transformers.LlamaForCausalLM(config)).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return theirs(folder, torch_dtype=torch.float32)


def theirs(folder, **keys):
    """What transformers reads from a folder, set to decode on to the end."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **keys).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 256
    return model


def edit(folder, file="config.json", **keys):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def full_disk(path, data):
    raise OSError(28, "No space left on device", path)


def close(ours, other, tolerance=1e-5):
    torch.testing.assert_close(ours, other, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama, and the tokenizer of BPE, set to truncate, to pad and to begin with a token."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    bpe, template = export.fast_tokenizer(BPE), tokenizers.processors.TemplateProcessing
    bpe.post_processor = template(single=f"{END} $A", special_tokens=[(END, 264)])
    bpe.add_tokens(["two words"])
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    """The same weights as a looped model, cut into 1 + 3 x r + 1 blocks."""
    folder = tmp_path_factory.mktemp("exported") / "x"
    export.export(load_model(f"hf:{llama}", iters=2), folder)
    return folder


@pytest.fixture
def plain(llama):
    return theirs(llama)


@pytest.fixture
def looped(exported):
    return theirs(exported)


@pytest.fixture
def model(exported):
    return load_model(f"hf:{exported}")


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of the Llama, to be damaged."""
    return shutil.copytree(llama, tmp_path / "copy")


# -------------------------------------------------------------------- the looped model in transformers


@pytest.mark.parametrize("rule", MAX_ITERS)
def test_every_rule_gives_our_logits_at_every_r_and_comes_back(out, rule):
    model = make(vocab_size=257, rule=rule, iters=3, rope_scaling=STRETCH)
    model.meta, idx = {"tokenizer": "bytes"}, tokens(vocab=257)
    export.export(model, out)
    looped = theirs(out)
    for r, logits in zip((1, 3, 8), model.logits_at(idx, [1, 3, 8])):
        close(looped(idx, iters=r).logits, logits)
        close(theirs(out, iters=r)(idx).logits, logits)
    again = load_model(f"hf:{out}")
    assert again.config == model.config and again.meta["tokenizer"] == "bytes"
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_the_hidden_states_are_those_of_every_iteration(looped, plain, model):
    ours = looped(IDX, iters=1, labels=IDX, output_hidden_states=True)
    other = plain(IDX, labels=IDX, output_hidden_states=True)
    close((ours.logits, ours.loss), (other.logits, other.loss))
    layers = (0, 1, 4, 5)  # the Body's three layers have one state
    close(ours.hidden_states, tuple(other.hidden_states[i] for i in layers))
    states = looped(IDX, iters=8, output_hidden_states=True).hidden_states
    assert len(states) == 1 + 1 + 8 + 1  # embeddings, Head, u of every iteration, Tail
    for u, logits in zip(states[2:10], model.logits_at(IDX, range(1, 9))):
        z = model.norm(model.run(model.tail, u, model.cos_sin(IDX)))
        close(model.logits(z), logits)
    close(model.logits(states[-1]), logits)


def test_positions_that_begin_again_separate_documents(looped, plain, model):
    lengths, mask = (9, 12, 3), torch.ones(2, 24)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = plain(IDX, position_ids=positions, use_cache=False).logits
    close(looped.train()(IDX, position_ids=positions, iters=1).logits, packed)
    looped.eval()
    alone = torch.cat([model(part, iters=4)[0] for part in IDX.split(lengths, 1)], 1)
    close(looped(IDX, mask, positions, iters=4).logits, alone)
    mask[:, 21:] = 0
    close(looped(IDX, mask, positions, iters=4).logits[:, :21], alone[:, :21])
    padded = torch.arange(24).masked_fill(mask == 0, 1)  # as generate counts: no document begins
    logits = looped(IDX, mask, padded, use_cache=True).logits
    close(logits[:, :21], looped(IDX[:, :21]).logits)
    cache = looped(IDX).past_key_values
    refused("use_cache=False", looped, IDX, None, positions, use_cache=True)
    refused("use_cache=False", looped, IDX, None, positions, past_key_values=cache)


def test_the_cache_serves_padded_batches_beams_and_pieces(looped, model):
    prompts = [[5, 6, 7, 8, 9], [100, 3], list(range(1, 12))]
    ids = torch.tensor([[256] * (11 - len(prompt)) + prompt for prompt in prompts])
    options = dict(attention_mask=(ids != 256).long(), max_new_tokens=12)
    for r in (1, 4):  # fewer and more than config.iters
        expected = [greedy(model, prompt, 12, r) for prompt in prompts]
        assert looped.generate(ids, iters=r, **options)[:, 11:].tolist() == expected
    x = looped.get_input_embeddings()(ids[2:])
    rows = looped.generate(inputs_embeds=x, iters=4, max_new_tokens=12)
    assert rows.tolist() == expected[2:]
    cache, parts = transformers.DynamicCache(), IDX.split((20, 3, 1), 1)
    logits = [looped(part, past_key_values=cache, iters=3).logits for part in parts]
    close(torch.cat(logits, 1), looped(IDX, iters=3).logits)
    options |= dict(num_beams=3, iters=4)
    uncached = looped.generate(ids, use_cache=False, **options)
    assert torch.equal(looped.generate(ids, **options), uncached)


def test_generate_ends_where_the_context_does(looped):
    idx = tokens(1, 40, vocab=256)
    whole = looped.generate(idx, max_new_tokens=100)
    assert whole.shape == (1, 64)
    lookup = dict(prompt_lookup_num_tokens=5, eos_token_id=299)
    ids = looped.generate(idx, max_new_tokens=100, **lookup)
    length = ids.shape[1]  # candidates need room too
    assert 59 <= length < 64 and torch.equal(ids, whole[:, :length])
    ids = looped.generate(inputs_embeds=looped.model.embed(idx), max_new_tokens=100)
    assert torch.equal(ids, whole[:, 40:])
    refused("64 tokens leaves no room in a context of 64", looped.generate, whole)
    refused("65 tokens do not fit into a context of 64", looped, tokens(length=65))


REFUSED_CALLS = [
    (dict(iter=2), "the number of iterations is iters"),
    (dict(iters=2.5), "iters=2.5"),
    (dict(output_attentions=True), "no output_attentions"),
    (dict(attention_mask=torch.ones(2, 1, 24, 24)), "must be .B, S. = .2, 24."),
    (dict(inputs_embeds=torch.ones(2, 24, 32)), "either input_ids or inputs_embeds"),
    (dict(input_ids=torch.full((2, 24), 300)), "resize_token_embeddings"),
]


def test_what_is_not_supported_is_refused_by_name(looped):
    for keys, message in REFUSED_CALLS:
        refused(message, looped, **{"input_ids": IDX, **keys})
    static = {"cache_implementation": "static"}
    refused("leave out cache_implementation", looped.generate, IDX, **static)
    cache = looped(IDX).past_key_values  # which config.iters has filled
    refused("not of so many", looped, IDX[:, :1], past_key_values=cache, iters=3)


def test_the_trainer_trains_it_as_it_trains_the_llama(looped, plain, tmp_path):
    looped.config.iters = 1
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, vocab=300)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        gradient_checkpointing=True, use_cpu=True, save_strategy="no", report_to=[],
    )  # fmt: skip
    losses = []
    for each in (looped, plain):
        trainer = transformers.Trainer(each, args, train_dataset=rows)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


SIZES = [(True, 304, 320), (False, 321, 384), (True, 200, 256)]


@pytest.mark.parametrize("tied, size, rows", SIZES)
def test_the_vocabulary_is_resized_into_its_padding_first(out, tmp_path, tied, size, rows):
    model, idx = make(vocab_size=300, tie_embeddings=tied), tokens(vocab=200)
    model.meta = {"tokenizer": "bytes"}
    export.export(model, out)
    looped = theirs(out)
    looped.resize_token_embeddings(size)
    new = looped.get_input_embeddings().weight[300:size]
    close(new, model.embed.weight[:300].mean(0).expand_as(new))
    output = looped(idx, labels=idx)
    close(output.logits[..., :300], model(idx)[0][..., :size])
    output.loss.backward()
    assert looped.model.unembed.weight.grad.shape == (rows, 32)
    assert (looped.model.unembed.weight is looped.model.embed.weight) == tied
    looped.save_pretrained(tmp_path / "y")
    close(load_model(f"hf:{tmp_path / 'y'}")(idx)[0], output.logits)
    close(theirs(tmp_path / "y")(idx).logits, output.logits)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_lora_trains_merges_and_comes_back_at_every_r(looped, tmp_path, targets):
    config = peft.LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
    tuned = peft.get_peft_model(looped, config).train()
    tuned.gradient_checkpointing_enable()
    tuned(IDX, labels=IDX, iters=3).loss.backward()
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert len(gradients) == 5 * 4 * 2 and all(grad.any() for grad in gradients)
    assert looped.model.activation_checkpointing  # which test_model.py specifies
    tuned.eval()
    expected = [tuned(IDX, iters=r).logits for r in (1, 2, 3, 4)]
    tuned.merge_and_unload().save_pretrained(tmp_path)
    close(list(load_model(f"hf:{tmp_path}").logits_at(IDX, [1, 2, 3, 4])), expected, 1e-4)


def test_prompt_tuning_puts_learnt_embeddings_before_a_text(looped, exported):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(looped, config)
    x = torch.cat((tuned.get_prompt(2), tuned.get_input_embeddings()(IDX)), 1)
    close(tuned(IDX, iters=4).logits, theirs(exported)(inputs_embeds=x, iters=4).logits)


def test_the_harness_scores_as_our_model_does(exported, model):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(str(exported), trust_remote_code=True, iters=4, device="cpu", batch_size=2)
    texts, tokenizer = (" sat on the mat", " sat"), get_tokenizer(f"hf:{exported}")
    requests = [Instance("loglikelihood", {}, ("the café", text), 0) for text in texts]
    for text, (score, _) in zip(texts, harness.loglikelihood(requests)):
        n = len(tokenizer.encode_ordinary(text))
        ids = torch.tensor([tokenizer.bos_tokens + tokenizer.encode_ordinary("the café" + text)])
        logits = model(ids, iters=4)[0][0, -n - 1 : -1]
        close(score, -F.cross_entropy(logits, ids[0, -n:], reduction="sum").item(), 1e-4)


# --------------------------------------------------------------------------------- the folder we write


def test_the_command_writes_a_folder_whole_or_not_at_all(tmp_path, out, monkeypatch):
    save(tmp_path / "run", 1, make(vocab_size=257))
    flags = [f"--ckpt={tmp_path}/run", f"--out={out}", "--iters=4"]
    monkeypatch.setattr(export, "write_whole", full_disk)
    refused(f"{out} could not be saved .* No space left", export.main, flags)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    command = [sys.executable, str(ROOT / "hf/export.py"), *flags]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "out: abbie_d, 1 + 2 x r + 1 blocks, r = 4" in text
    assert (out / "model.py").read_bytes() == (ROOT / "model.py").read_bytes()
    assert "r = 4 unless a call says" in (out / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    ids = tokenizer("def ", return_tensors="pt")
    assert theirs(out).generate(**ids, max_new_tokens=3).shape == (1, 7)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_a_tokenizer_goes_out_as_a_plain_file(tmp_path, monkeypatch, name):
    ours = {"bytes": get_tokenizer("bytes"), "gpt2": BPE}[name]
    monkeypatch.setattr(export, "get_tokenizer", lambda _: ours)
    export.write_tokenizer({"tokenizer": name}, tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    for text in (TEXT.replace(END, ""), "".join(map(chr, range(1, 300)))):
        ids = ours.encode_ordinary(text)
        assert other(text).input_ids == ids and other.decode(ids) == text
    assert other(END).input_ids == [other.eos_token_id] == [ours.eot_token]
    assert other(["a", "abc"], padding=True).attention_mask == [[0, 0, 1], [1, 1, 1]]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_tokenizer_is_kept_when_its_origin_has_gone(copy, tmp_path, out):
    edit(copy, eos_token_id=[264, 5])
    edit(copy, "generation_config.json", eos_token_id=7)
    source, data = f"hf:{copy}", tmp_path / "data"
    original, model = get_tokenizer(source), load_model(source)
    text = ["--input", f"{ROOT}/README.md", "--val_input", f"{ROOT}/requirements.txt"]
    prepare_data.main(["text", *text, f"--tokenizer={source}", f"--out={data}"])
    shutil.rmtree(copy)
    [ids] = documents(data, "val")
    assert original.decode(ids) == (ROOT / "requirements.txt").read_text()
    checkpoint = save(tmp_path / "run", 1, model, tokenizer=source, data=str(data))
    export.export(load_model(checkpoint), out)
    for folder in (checkpoint, out):
        kept = get_tokenizer(f"hf:{folder}")
        assert kept.encode_ordinary(TEXT) == original.encode_ordinary(TEXT)
        assert (kept.n_vocab, kept.bos_tokens) == (300, [264])
        assert (kept.eot_token, kept.eot_tokens) == (264, [264, 5, 7])
    assert load_model(f"hf:{out}").meta["tokenizer"] == f"hf:{out}"


# ---------------------------------------------------------------------------------- Llama's folders in


SHAPES = [
    dict(tie_word_embeddings=False, num_key_value_heads=4, max_shard_size="20KB"),
    dict(rope_theta=5e5, rms_norm_eps=1e-2, num_hidden_layers=2, dtype=torch.bfloat16),
    dict(hidden_size=128, max_position_embeddings=8192, rope_parameters=LONG),
]


@pytest.mark.parametrize("keys", SHAPES)
def test_one_iteration_is_the_llama(tmp_path, keys):
    plain, model = write_llama(tmp_path, **keys), load_model(f"hf:{tmp_path}")
    context = min(2048, plain.config.max_position_embeddings)  # a cache may hold as many
    assert model.config.block_size == context
    idx = tokens(1, context, vocab=300)
    close(model(idx)[0], plain(idx).logits)  # which is what it does by default


def test_what_older_versions_write_is_understood(tmp_path):
    plain, path = write_llama(tmp_path, rope_parameters=ROPE), tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path)
    scaling = {key.replace("rope_type", "type"): value for key, value in STRETCH.items()}
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    close(load_model(f"hf:{tmp_path}")(IDX)[0], plain(IDX).logits)


def test_a_llama_is_cut_as_asked_or_into_thirds(llama, plain, monkeypatch):
    monkeypatch.setenv("HOME", str(llama.parent))
    thirds = (1, 3, 1)  # what they leave over goes to the Body
    names = ("n_head_blocks", "n_body_blocks", "n_tail_blocks")
    for given, depths in (((), thirds), ((0, 4, 1), (0, 4, 1)), ((4, 4, 4), thirds)):
        model = load_model(f"hf:~/{llama.name}", rule="recall", **dict(zip(names, given)))
        assert (len(model.head), len(model.body), len(model.tail)) == depths
        close(model(IDX)[0], plain(IDX).logits)
    assert model.config.rule == "recall"
    assert model.meta["tokenizer"] == model.meta["ckpt"] == f"hf:~/{llama.name}"


REFUSED = [
    (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(head_dim=16), "head_dim"),
    (dict(rope_parameters={**ROPE, "rope_type": "yarn"}), "rope_type='yarn' is not what"),
    (dict(num_hidden_layers=6), "disagree on model.layers.5"),
    (dict(num_hidden_layers=4), "disagree on model.layers.4"),
    (dict(num_key_value_heads=4), "do not fit its config"),
    (dict(vocab_size=200), "do not fit its config"),
]


@pytest.mark.parametrize("keys, message", REFUSED)
def test_what_our_block_does_not_compute_is_refused(copy, keys, message):
    edit(copy, **keys)
    refused(message, load_model, f"hf:{copy}")


def test_weights_are_whole_safetensors_and_no_pickles(copy, monkeypatch):
    def download(name, **patterns):
        files = ["pytorch_model.bin", "model-1-of-2.safetensors", "tokenizer.json"]
        assert [*huggingface_hub.utils.filter_repo_objects(files, **patterns)] == files[1:]
        return {"owner/repo": copy}[name]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("hf:owner/repo").meta["tokenizer"] == "hf:owner/repo"
    refused("hf:owner/other is no folder here", load_model, "hf:owner/other")
    path = copy / "model.safetensors"
    tensors, part = load_file(path), "model.layers.0.self_attn.q_proj.weight"
    save_file({part: torch.zeros(1)}, copy / "model_backup.safetensors")
    assert load_model(f"hf:{copy}"), "a file beside the whole one is not read"
    save_file({**tensors, part: tensors[part][:, :1].contiguous()}, path)
    refused("the shapes of .*q_proj.* are wrong", load_model, f"hf:{copy}")
    path.write_bytes(path.read_bytes()[:30000])
    refused("model.safetensors is damaged", load_model, f"hf:{copy}")
    path.rename(copy / "pytorch_model.bin")
    (copy / "model_backup.safetensors").unlink()
    refused("weights must be .safetensors: no pickles", load_model, f"hf:{copy}")


# ------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_reads_spells_begins_and_ends_exactly(copy):
    llama_3 = ([7, 8], [8, 9], [7, 8, 9])
    by_spelling = (None, None, [264])  # in tokenizer_config.json
    for config, generation, ends in ((5, 5, [5]), llama_3, by_spelling):
        edit(copy, eos_token_id=config)
        edit(copy, "generation_config.json", eos_token_id=generation)
        tokenizer = get_tokenizer(f"hf:{copy}")
        assert (tokenizer.eot_token, tokenizer.eot_tokens) == (ends[0], ends)
    ids = tokenizer.encode_ordinary(TEXT)
    assert ids == BPE.encode_ordinary(TEXT)  # nothing is cut or added
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == TEXT.encode()
    assert tokenizer.decode(ids) == TEXT and tokenizer.decode(ids[2:3]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode_ordinary("two words")) == "two words"
    assert tokenizer.decode([264, 299]) == END  # 299 has no token
    begun = AutoTokenizer.from_pretrained(copy)("the cat", truncation=False).input_ids
    assert begun == tokenizer.bos_tokens + tokenizer.encode_ordinary("the cat")
    for wrong in (10**6, "2", [[2]]):
        edit(copy, eos_token_id=wrong)
        refused("which token ends a text", get_tokenizer, f"hf:{copy}")


def test_a_sentencepiece_tokenizer_spells_exactly(copy):
    vocab = {"</s>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁a": 257}
    model = tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True)
    bpe = tokenizers.Tokenizer(model)
    bpe.decoder = tokenizers.decoders.ByteFallback()
    bpe.save(str(copy / "tokenizer.json"))
    tokenizer = get_tokenizer(f"hf:{copy}")
    ids = [257, *tokenizer.encode_ordinary("🙂")]
    assert len(ids) == 5 and tokenizer.bos_tokens == []
    assert tokenizer.decode_bytes(ids) == " a🙂".encode()
    edit(copy, "tokenizer.json", decoder=None)
    refused("does not spell bytes", get_tokenizer, f"hf:{copy}")
