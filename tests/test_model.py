"""model.py. At r = 1, test_hf.py compares it with transformers; its cache, test_sample.py."""

import ast
import copy
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from common import ROOT, STRETCH, TINY, calls_of, make, refused, tokens
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import MAX_ITERS, AbbIE, AbbIEConfig


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------- r = 1 is a Transformer


@pytest.mark.parametrize("rule", ["abbie_d", "abbie_c", "recall"])
def test_one_iteration_is_a_standard_transformer_bit_for_bit(rule):
    model, idx = make(rule=rule), tokens()
    x, cos_sin = model.embed(idx), model.cos_sin(idx)
    for block in model.blocks:  # a plain loop, which knows of no rule
        x = x + block.attn(block.attn_norm(x), cos_sin)
        x = x + block.mlp(block.mlp_norm(x))
    assert torch.equal(model(idx, iters=1)[0], F.linear(model.norm(x), model.embed.weight)[..., :97])


# --------------------------------------------------------------------------------------------- the recurrence


def unrolled(model, copies, idx, backprop_iters=0):
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
@pytest.mark.parametrize("rule", MAX_ITERS)
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
        used = [p.grad]
        _, number, rest = name.split(".", 2) if name.startswith("blocks.") else ("", 0, "")
        if model.blocks[int(number)] in model.body:
            place = f"{int(number) - model.config.n_head_blocks}.{rest}"
            used = [body.get_parameter(place).grad for body in copies]
        assert tied[name].any(), f"{name} gets no gradient"
        summed = sum(grad for grad in used if grad is not None)
        assert torch.allclose(tied[name], summed, atol=1e-10, rtol=0), name


@pytest.mark.parametrize("iters", [2, 3, 8])
def test_abbie_d_is_the_papers_formula_on_the_raw_state(iters):
    model, idx = make(norm_eps=1e-24).double(), tokens()
    cos_sin = model.cos_sin(idx)
    x = model.run(model.head, model.embed(idx), cos_sin)
    for _ in range(iters - 1):
        x = model.run(model.body, x, cos_sin) + x  # x_{k+1} = B(x_k) + x_k
    u = model.run(model.body, x, cos_sin) / 2 ** (iters - 1)
    expected = model.logits(model.norm(model.run(model.tail, u, cos_sin)))
    assert torch.allclose(model(idx, iters=iters)[0], expected, atol=1e-6, rtol=0)


def test_recall_at_two_iterations_is_the_explicit_midpoint_method():
    model, h = make(rule="recall"), torch.randn(100)

    def body(x, c=1.0):  # Delta(x) = sin x
        return x + x.sin()

    _, x = model.one_iteration(h, h, 0, body)
    u, _ = model.one_iteration(x, h, 1, body)
    assert torch.allclose(u, h + (h + h.sin() / 2).sin(), atol=1e-6)


@pytest.mark.parametrize("rule", MAX_ITERS)
def test_the_residual_stream_keeps_its_precision_under_autocast(rule):
    model, seen = make(rule=rule), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(), iters=3)
    assert len(seen) == 1 + 3 * 2 + 1 and set(seen) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule, most", MAX_ITERS.items())
def test_every_rule_is_finite_at_all_its_iterations(rule, most, dtype):
    model, idx = make(rule=rule).to(dtype), tokens(1, 8)
    with torch.no_grad():
        for logits in model.logits_at(idx, [1, 2, 8, most // 2, most]):
            assert logits.isfinite().all()
    refused(f"from 1 to {most}", model, idx, iters=most + 1)
    grads = gradients(model, model(idx, idx, iters=most)[1])
    assert all(g.isfinite().all() for g in grads.values())


# ------------------------------------------------------------------------------------- sharing and interfaces


def test_parameters_do_not_grow_with_the_iterations():
    assert len({make(iters=iters).n_params() for iters in (1, 2, 8)}) == 1
    tied, untied = make(), make(tie_embeddings=False)
    assert tied.unembed.weight is tied.embed.weight
    assert untied.unembed.weight is not untied.embed.weight


@pytest.mark.parametrize("rule", MAX_ITERS)
def test_no_position_sees_a_later_one(rule):
    model, idx = make(rule=rule), tokens()
    changed = idx.clone()
    changed[:, 11] = (idx[:, 11] + 1) % 97
    before, after = model(idx, iters=3)[0], model(changed, iters=3)[0]
    assert torch.allclose(before[:, :11], after[:, :11], atol=1e-6, rtol=0)
    assert ((before[:, 11:] - after[:, 11:]).abs().amax(dim=-1) > 1e-4).all()  # all later ones see the change


@pytest.mark.parametrize("rule", MAX_ITERS)
def test_logits_at_equals_separate_calls_from_one_sweep(rule):
    model, idx = make(rule=rule, iters=3), tokens()
    calls = calls_of(model.body[0])
    for wanted in ([1, 2, 4, 8], [3, 1, 3], []):
        calls.clear()
        swept = list(model.logits_at(idx, wanted))
        assert len(calls) == max(wanted, default=0)  # one sweep of the Body
        for r, logits in zip(wanted, swept, strict=True):
            assert torch.equal(logits, model(idx, iters=r)[0])
    assert torch.equal(model(idx)[0], model(idx, iters=3)[0])  # those of its config


def test_loss_is_the_mean_nll_of_the_counted_targets():
    model, idx, targets = make(), tokens(), tokens(seed=2)
    targets[0, :10] = -1
    logits, loss = model(idx, targets)
    probs = logits.detach().double().softmax(-1)
    nll = [-math.log(probs[b, t, targets[b, t]]) for b in range(2) for t in range(24) if targets[b, t] >= 0]
    assert len(nll) == 38 and math.isclose(loss.item(), sum(nll) / 38, rel_tol=1e-5)
    assert model(idx)[1] is None and model(idx)[0].shape == (2, 24, 97)


def test_padded_columns_of_the_vocabulary_never_count():
    model, idx = make(), tokens()
    assert model.embed.weight.shape == (128, 32)
    logits, loss = model(idx, idx)
    with torch.no_grad():
        model.embed.weight[97:] = 1000.0
    again, loss_again = model(idx, idx)
    assert logits.shape[-1] == 97 and torch.equal(logits, again) and torch.equal(loss, loss_again)


# --------------------------------------------------------------------------------------------------- training


def test_initial_weights_follow_the_table():
    torch.manual_seed(0)
    keys = {"n_embd": 128, "ffn_dim": 256, "rule": "zero_pt", "tie_embeddings": False}
    model = AbbIE(AbbIEConfig(**{**TINY, **keys}))
    std = (0.4 / 128) ** 0.5
    deep = std / (2 * 4) ** 0.5  # 4 blocks
    std = {
        "embed": std, "unembed": std, "qkv": std, "gate_up": std, "out": deep, "down": deep,
        "adapter": (2 * 128) ** -0.5,
    }  # fmt: skip
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        else:
            expected = std[name.split(".")[-2]]
            assert math.isclose(p.std().item(), expected, rel_tol=0.05), name


@pytest.mark.parametrize("rule", MAX_ITERS)
def test_a_batch_can_be_overfitted(rule):
    torch.manual_seed(0)
    model, idx = AbbIE(AbbIEConfig(**{**TINY, "rule": rule})), tokens(4, 25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("rule, backprop_iters", [("abbie_d", 0), ("zero_pt", 0), ("abbie_d", 2)])
def test_flops_per_token_equal_a_count_of_the_operations(rule, backprop_iters):
    model, idx = make(rule=rule), tokens(2, 32)
    for iters, training in itertools.product((1, 2, 5), (False, True)):
        # This backend computes all T x T scores: what a causal mask shows on average in a context of 2 T.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = model(idx, idx, iters, backprop_iters)[1]
            if training:
                loss.backward()
        expected = model.flops_per_token(iters, 2 * 32, training, backprop_iters)
        assert counter.get_total_flops() == expected * idx.numel(), (iters, training)
    assert model.flops_per_token(2) == model.flops_per_token(2, context=32, training=True)


@pytest.mark.parametrize("rule", MAX_ITERS)
def test_activation_checkpointing_changes_nothing(rule):
    model, idx, targets = make(rule=rule), tokens(), tokens(seed=2)
    grads = gradients(model, model(idx, targets, 4, 3)[1])
    model.activation_checkpointing = True
    again = gradients(model, model(idx, targets, 4, 3)[1])
    assert all(torch.equal(grad, again[name]) for name, grad in grads.items())


@pytest.mark.parametrize("rule", MAX_ITERS)
def test_truncated_gradients_reach_every_weight_in_bf16(rule):
    """Not so in older PyTorch, if autocast kept what the iterations without gradients made of the weights."""
    model, idx, targets = make(rule=rule), tokens(), tokens(seed=2)
    exact = gradients(model, model(idx, targets, 3, 1)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(idx, targets, 3, 1)[1]
    for name, grad in gradients(model, loss).items():
        assert F.cosine_similarity(grad.flatten(), exact[name].flatten(), dim=0) > 0.9, name


# ----------------------------------------------------------------------------------------------------- errors


CONTRADICTIONS = [
    (dict(n_embd=36), "n_embd=36.* n_attn_heads=4"),
    (dict(n_body_blocks=0), "n_body_blocks=0 must be at least 1"),
    (dict(rope_base=float("nan")), "rope_base=nan must be at least 1"),
    (dict(rope_scaling={"rope_type": "yarn"}), "rope_scaling needs rope_type 'llama3'"),
    (dict(rope_scaling={**STRETCH, "factor": "8"}), "rope_scaling needs .* positive"),
    (dict(rope_scaling={**STRETCH, "low_freq_factor": 4}), "the first the least"),
    (dict(rule="abbie_d_literal", iters=64), "iters=64: rule abbie_d_literal runs at .* from 1 to 48"),
]


@pytest.mark.parametrize("keys, message", CONTRADICTIONS)
def test_a_shape_that_contradicts_itself_is_refused(keys, message):
    refused(message, make, **keys)


def test_bad_calls_are_refused():
    model, idx = make(), tokens()
    assert model.check_iters(np.int64(8)) == 8
    for iters in (0, 2.0, 129):
        swept = model.logits_at(idx, [1, iters])
        refused("rule abbie_d runs at any integer from 1 to 128", next, swept)
    for bad in (idx.int(), idx[0], tokens(1, 33), idx[:, :0]):
        refused("token ids must be int64 .* 1 <= T <= 32", model, bad)
    for token in (-1, 97):  # which has a padded row
        idx[1, 5] = token
        refused("a token id .* is not in the vocabulary of 97", model, idx)


def test_the_file_can_be_copied_and_used_alone():
    tree = ast.parse((ROOT / "model.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"torch"}
