"""The path that only a GPU takes, as far as a CPU can show it; the rest is experiments/gpu.py."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from common import ROOT, start_python
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import train
from config import choose_dtype, load_config, start_ranks
from eval_icl import evaluate_loss
from experiments import gpu, read
from model import AbbIE
from sample import generate


@pytest.mark.parametrize("cards, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_ranks_have_a_backend_for_cpu_tensors_too(monkeypatch, cards, backend):
    """A default backend would be NCCL's alone on a machine with cards, and the first collective sends
    objects before a card is chosen."""
    given = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: cards)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 8)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: given.append((args, options)))
    assert start_ranks() == (0, 8)
    [((asked,), options)] = given
    assert asked == backend and options["timeout"].total_seconds() == 1800
    assert ("cpu", "gloo") in dist.BackendConfig(asked).get_device_backend_map().items()


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_compiled_blocks_train_under_ddp_after_an_evaluation(one_rank):
    """At this width DDP's buckets of 25 MB would cut a block's graph in two. The evaluation meets another
    batch size and other iterations first, as step 0 of a run does."""
    torch._dynamo.reset()
    width = ["--n_embd=768", "--n_attn_heads=12", "--ffn_dim=2048", "--n_body_blocks=1", "--block_size=32"]
    config = load_config([f"{ROOT}/config/abbie_tiny.py", *width])
    model = AbbIE(config.model_config(257))
    assert train.compile_blocks(model, "on", torch.device("cpu"), backend="aot_eager")
    net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    x, y = torch.randint(257, (2, 3, 32))
    shards = SimpleNamespace(n_windows=5, block_size=32)
    shards.batch = lambda chosen: (x[chosen % 3], y[chosen % 3])
    evaluate_loss(model, shards, [1, 2, 4], batch_size=3)  # batches of 3 and 2
    optimizer = train.adamw(model, config)
    losses = [train.train_step(net, optimizer, [(x, y)], 2, config, bf16)[0] for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_bf16_is_chosen_where_it_is_not_emulated(monkeypatch):
    """A T4 or V100 says yes to is_bf16_supported() and then computes it slowly."""
    for native in (True, False):
        supported = lambda including_emulation=True: including_emulation or native  # noqa: E731, B023
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        for training in (True, False):
            chosen = choose_dtype("auto", torch.device("cuda"), training)
            assert chosen == (torch.bfloat16 if native else torch.float32)
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32, "CPUs decode in float32"


@torch.no_grad()
def test_flash_attention_can_take_what_is_asked(monkeypatch):
    """Its published conditions: bf16 throughout, no mask, rank 4, channels contiguous, a multiple of 8 and at
    most 256 of them. In training, evaluation, a prompt and the tokens after it, at the configs' widths."""
    asked, attention = [], F.scaled_dot_product_attention

    def watch(q, keys, values, mask=None, **options):
        asked.append((q, keys, values, mask))
        return attention(q, keys, values, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    for name in ("abbie_350m", "abbie_200m", "abbie_124m"):
        small = "--block_size=64 --n_head_blocks=1 --n_body_blocks=1 --n_tail_blocks=0 --ffn_dim=64"
        config = load_config([f"{ROOT}/config/{name}.py", *small.split()])
        model, idx = AbbIE(config.model_config(257)), torch.randint(257, (2, 16))
        with torch.enable_grad(), bf16():
            model(idx, idx)[1].backward()
        with bf16():
            list(model.logits_at(idx, [1, 2]))
        generate(model.bfloat16(), [[1, 2, 3], [4, 5, 6]], 3, 2)
    assert len(asked) > 40
    for q, keys, values, mask in asked:
        assert mask is None and {t.dtype for t in (q, keys, values)} == {torch.bfloat16}
        assert all(t.dim() == 4 and t.stride(-1) == 1 and t.shape[-1] == 64 for t in (q, keys, values))


def test_the_loss_hands_out_logits_without_a_gradient():
    """DDP and autograd would fill a gradient of zeros as large as the logits, 1.65 GB at abbie_350m."""
    config = load_config([f"{ROOT}/config/abbie_tiny.py"])
    idx = torch.randint(257, (1, 16))
    logits, loss = AbbIE(config.model_config(257))(idx, idx)
    assert loss.requires_grad and not logits.requires_grad


def test_the_checks_that_need_a_card_run_dry(tmp_path):
    """`python -m experiments.gpu` from its first part to its last, on the CPU at a tiny shape."""
    flags = ["--tiny", "--device=cpu", "--dtype=float32", f"--results={tmp_path}"]
    out, err = start_python(["-m", "experiments.gpu", *flags], text=True).communicate()
    records = [json.loads(line) for line in out.splitlines() if line.startswith('{"part"')]
    assert {record["part"] for record in records} == set(gpu.PARTS), err
    assert not [record for record in records if "error" in record or record.get("status", 0)]
    assert all(r["loss"][1] < r["loss"][0] for r in records if "loss" in r), "it learns the batch"
    assert len(read("gpu", tmp_path)) == len(records)
