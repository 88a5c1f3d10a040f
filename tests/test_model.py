"""model.py. At r = 1, test_hf.py compares it with transformers; its cache, test_sample.py."""

import copy
import math
import re
import sys

import numpy as np
import pytest
import torch
from common import ROOT, STRETCH, TINY, calls_of, make, refused, tokens
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import MAX_ITERS, AbbIE, AbbIEConfig

every_rule = pytest.mark.parametrize("rule", MAX_ITERS)


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --------------------------------------------------------------------------------------------- the recurrence


@pytest.mark.parametrize("rule", ["abbie_d", "abbie_c", "recall"])
def test_one_iteration_is_a_standard_transformer_bit_for_bit(rule):
    model, idx = make(rule=rule), tokens()
    x, cos_sin = model.embed(idx), model.cos_sin(idx)
    for block in model.blocks:  # a plain loop, which knows of no rule
        x = x + block.attn(block.attn_norm(x), cos_sin)
        x = x + block.mlp(block.mlp_norm(x))
    assert torch.equal(model(idx, iters=1)[0], F.linear(model.norm(x), model.embed.weight)[..., :97])


def unrolled(model, copies, idx, backprop_iters):
    """Every rule written out by hand over untied copies of the Body -> logits. Updates of iterations
    before the last `backprop_iters` are constants."""
    cos_sin, r, one = model.cos_sin(idx), len(copies), torch.ones(())

    def body(k, x, c=1.0):
        update = (lambda y: y) if k >= r - (backprop_iters or r) else torch.detach
        for block in copies[k]:
            x = x + c * update(block.attn(block.attn_norm(x), cos_sin))
            x = x + c * update(block.mlp(block.mlp_norm(x)))
        return x

    h = model.embed(idx)
    for block in model.head:
        h = block(h, one, cos_sin)
    x = u = torch.zeros_like(h) if model.config.rule == "zero_pt" else h
    for k in range(r):
        match model.config.rule:
            case "abbie_d":
                u = body(k, x, 0.5**k)
                x = 0.5 * u + 0.5 * x
            case "abbie_d_literal":
                u = x = x + body(k, x)
            case "abbie_c":
                u = x = body(k, x)
            case "zero_pt":
                state, head = model.adapter.weight.split(model.config.n_embd, dim=1)
                u = x = body(k, x @ state.T + h @ head.T)
            case "recall":
                u = h + (body(k, x) - x)
                x = 0.5 * u + 0.5 * x
    for block in model.tail:
        u = block(u, one, cos_sin)
    return F.linear(model.norm(u), model.unembed.weight[: model.config.vocab_size])


@pytest.mark.parametrize("iters, backprop_iters", [(1, 0), (3, 0), (3, 1)])
@every_rule
def test_iterations_equal_untied_copies(rule, iters, backprop_iters):
    model, idx = make(rule=rule).double(), tokens()
    copies = [copy.deepcopy(torch.nn.ModuleList(model.body)) for _ in range(iters)]
    logits = model(idx, None, iters, backprop_iters)[0]
    expected = unrolled(model, copies, idx, backprop_iters)
    assert torch.allclose(logits, expected, atol=1e-10, rtol=0)

    tied = gradients(model, logits.pow(3).mean())  # any function of the logits
    model.zero_grad()
    expected.pow(3).mean().backward()
    for name, p in model.named_parameters():
        grads = [p.grad]
        if name.startswith(("blocks.1.", "blocks.2.")):  # the Body's
            _, number, rest = name.split(".", 2)
            grads = [body.get_parameter(f"{int(number) - 1}.{rest}").grad for body in copies]
        assert tied[name].any(), f"{name} gets no gradient"
        summed = sum(grad for grad in grads if grad is not None)
        assert torch.allclose(tied[name], summed, atol=1e-10, rtol=0), name


def test_abbie_d_is_the_papers_formula_on_the_raw_state():
    model, idx, iters = make(norm_eps=1e-24).double(), tokens(), 8
    cos_sin = model.cos_sin(idx)
    x = model.run(model.head, model.embed(idx), cos_sin)
    for _ in range(iters - 1):
        x = model.run(model.body, x, cos_sin) + x  # x_{k+1} = B(x_k) + x_k
    u = model.run(model.body, x, cos_sin) / 2 ** (iters - 1)
    expected = model.logits(model.norm(model.run(model.tail, u, cos_sin)))
    assert torch.allclose(model(idx, iters=iters)[0], expected, atol=1e-6, rtol=0)


@every_rule
def test_no_position_sees_a_later_one(rule):
    model, idx = make(rule=rule, iters=3), tokens()
    assert torch.allclose(model(idx[:, :11])[0], model(idx)[0][:, :11], atol=1e-5, rtol=0)


@every_rule
def test_one_sweep_yields_the_logits_of_every_r(rule):
    model, idx = make(rule=rule, iters=3), tokens()
    calls = calls_of(model.body[0])
    for wanted in ([1, 2, 4, 8], [3, 1, 3], []):
        calls.clear()
        swept = list(model.logits_at(idx, wanted))
        assert len(calls) == max(wanted, default=0), "the Body runs as often as the largest says"
        for r, logits in zip(wanted, swept, strict=True):
            assert torch.equal(logits, model(idx, iters=r)[0])
    assert torch.equal(model(idx)[0], model(idx, iters=3)[0]), "without iters those of the config"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_rule
def test_every_rule_is_finite_at_all_its_iterations(rule, dtype):
    model, idx, most = make(rule=rule).to(dtype), tokens(1, 8), MAX_ITERS[rule]
    with torch.no_grad():
        for logits in model.logits_at(idx, [1, 2, 8, most // 2, most]):
            assert logits.isfinite().all()
    grads = gradients(model, model(idx, idx, iters=most)[1])
    assert all(grad.isfinite().all() for grad in grads.values())
    refused(f"from 1 to {most}", model, idx, iters=most + 1)


@every_rule
def test_autocast_leaves_the_residual_stream_in_fp32_and_every_weight_its_gradient(rule):
    model, idx, dtypes = make(rule=rule), tokens(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(idx, idx, iters=3, backprop_iters=1)[1]
    assert dtypes == [torch.float32] * (1 + 3 * 2 + 1)
    for name, grad in gradients(model, loss).items():
        assert grad.any(), name


# --------------------------------------------------------------------------------------------------- training


def test_the_loss_is_the_mean_nll_of_counted_targets_and_no_padding_of_the_vocabulary_counts():
    model, idx, targets = make(), tokens(), tokens(seed=2)
    targets[0, :10] = -1
    with torch.no_grad():
        model.embed.weight[97:] = 1000.0
    logits, loss = model(idx, targets)
    counted = targets >= 0
    log_probs = logits.double().log_softmax(-1)[counted]
    expected = -log_probs.gather(1, targets[counted][:, None]).mean()
    assert model.embed.weight.shape == (128, 32) and log_probs.shape == (38, 97)
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_follow_the_table_and_are_as_many_at_any_r(tied):
    torch.manual_seed(0)
    keys = {**TINY, "n_embd": 128, "ffn_dim": 256, "rule": "zero_pt", "tie_embeddings": tied}
    model = AbbIE(AbbIEConfig(**keys))
    std = (0.4 / 128) ** 0.5
    deep = std / (2 * 4) ** 0.5  # 4 blocks
    table = {"embed": std, "unembed": std, "qkv": std, "gate_up": std, "out": deep, "down": deep}
    table["adapter"] = (2 * 128) ** -0.5
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        else:
            assert math.isclose(p.std().item(), table[name.split(".")[-2]], rel_tol=0.05), name
    assert (model.unembed.weight is model.embed.weight) == tied
    assert model.n_params() == AbbIE(AbbIEConfig(**keys, iters=8)).n_params()


@pytest.mark.parametrize("rule, backprop_iters", [("abbie_d", 0), ("zero_pt", 0), ("abbie_d", 2)])
def test_flops_per_token_equal_a_count_of_the_operations(rule, backprop_iters):
    model, idx = make(rule=rule, block_size=64), tokens(2, 32)
    for iters in (1, 2, 5):
        # This backend computes all T x T scores: what a causal mask shows on average in a context of 2 T.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(idx, idx, iters, backprop_iters)[1].backward()
        expected = model.flops_per_token(iters, backprop_iters)
        assert counter.get_total_flops() == expected * idx.numel(), iters


@every_rule
def test_activation_checkpointing_changes_nothing(rule):
    model, idx = make(rule=rule), tokens()
    grads = gradients(model, model(idx, idx, 4, 3)[1])
    model.activation_checkpointing = True
    again = gradients(model, model(idx, idx, 4, 3)[1])
    assert all(torch.equal(grad, again[name]) for name, grad in grads.items())


# ----------------------------------------------------------------------------------------------------- errors


CONTRADICTIONS = [
    ({"n_body_blocks": 0}, "n_body_blocks=0 must be at least 1"),
    ({"n_kv_heads": 3}, "n_kv_heads=3 must divide n_attn_heads=4"),
    ({"rope_base": math.nan}, "rope_base=nan must be at least 1"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling needs rope_type 'llama3'"),
    ({"rope_scaling": {**STRETCH, "factor": "8"}}, "rope_scaling needs .* positive"),
    ({"rope_scaling": {**STRETCH, "low_freq_factor": 4}}, "the first the least"),
]


def test_shapes_that_contradict_themselves_and_bad_calls_are_refused():
    for keys, message in CONTRADICTIONS:
        refused(message, make, **keys)
    model, idx = make(), tokens()
    assert model.check_iters(np.int64(8)) == 8
    for iters in (0, 2.0, 129):
        refused("rule abbie_d runs at any integer from 1 to 128", list, model.logits_at(idx, [1, iters]))
    for bad in (idx.int(), idx[0], tokens(1, 33), idx[:, :0]):
        refused("token ids must be int64 .* 1 <= T <= 32", model, bad)
    for token in (-1, 97):  # which has a padded row
        refused("a token id .* is not in the vocabulary of 97", model, torch.full((2, 3), token))


def test_the_file_can_be_copied_and_used_alone():
    imported = re.findall(r"^(?:import|from) (\w+)", (ROOT / "model.py").read_text(), re.M)
    assert set(imported) - sys.stdlib_module_names == {"torch"}
