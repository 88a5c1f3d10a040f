"""AbbIE for transformers: this file and an unmodified model.py, in the folder of the weights, are the model.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)         # or iters=4
    model(input_ids, iters=4), model.generate(**tokenizer("def ", return_tensors="pt"), iters=8)

`iters` is how often the Body is applied; by default config.iters. Shapes as in model.py: B batch, T new
tokens, S tokens with those in the cache, D width, V vocab_size.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .model import AbbIE, AbbIEConfig, check

# All keys of the shape but one, whose name transformers rewrites: here it is llama3_rope.
SHAPE = {name: value for name, value in asdict(AbbIEConfig()).items() if name != "rope_scaling"}
# transformers 5 calls `past_key_values` `cache`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

PEFT = sys.modules.get("peft")
if PEFT is not None:  # what LoraConfig() means where it names no target_modules
    targets = PEFT.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets["abbie"] = ["qkv", "out", "gate_up", "down"]


class AbbIEPretrainedConfig(PretrainedConfig):
    """The keys of model.AbbIEConfig."""

    model_type = "abbie"
    use_cache = True
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "n_embd", "intermediate_size": "ffn_dim", "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "block_size",
    }  # fmt: skip

    def __init__(self, llama3_rope: dict | None = None, **kwargs):
        self.llama3_rope = llama3_rope
        for name, default in SHAPE.items():
            setattr(self, name, kwargs.pop(name, default))
        kwargs["tie_word_embeddings"] = self.tie_embeddings
        core = self.core()  # refuses what does not fit together
        # peft looks for these two in to_dict(), which knows no attribute_map.
        kwargs |= {"num_attention_heads": core.n_attn_heads, "num_layers": core.n_blocks}
        super().__init__(**kwargs)

    def core(self) -> AbbIEConfig:
        return AbbIEConfig(rope_scaling=self.llama3_rope, **{name: getattr(self, name) for name in SHAPE})

    @property
    def num_hidden_layers(self) -> int:
        """Slots of the cache: one per block and iteration."""
        return self.n_head_blocks + self.n_tail_blocks + self.n_body_blocks * self.iters


class Slots:
    """What model.Attention asks a cache for (see its docstring), answered by transformers' cache, which holds
    `past` tokens. Slots run: all blocks in iteration 0, the Body in iteration 1, in iteration 2, ..."""

    def __init__(self, config: AbbIEConfig, cache, mask: Tensor | None, past: int):
        self.config, self.cache, self.mask, self.past = config, cache, mask, past

    def at(self, block: int, k: int) -> "Slots":
        self.slot = block
        if k > 0:
            self.slot += self.config.n_tail_blocks + k * self.config.n_body_blocks
        return self

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.cache is None:
            return keys, values, self.mask
        layers = self.cache.layers
        while layers and len(layers) <= self.slot:  # generate makes as many as config.iters needs
            layers.append(type(layers[0])())
        held = self.cache.get_seq_length(self.slot)
        check(held == self.past, f"this cache holds {self.past} tokens, but not of so many iterations")
        return *self.cache.update(keys, values, self.slot), self.mask


def documents(positions: Tensor, real: Tensor) -> Tensor | None:
    """positions (B, T) of the last T of S tokens, real (B, S): which are no padding -> (B, T), the number of
    each token's document, or None for one a row. Another begins where positions begin again after a token."""
    T = positions.shape[1]
    before = F.pad(positions, (1, 0), value=-1)[:, :-1]
    begins = (positions == 0) | (positions < before)
    begins &= real[:, -T:] & (real.cumsum(1)[:, -T:] > 1)
    return begins.cumsum(1) if begins.any() else None


def visible(real: Tensor, T: int, document: Tensor | None) -> Tensor | None:
    """real (B, S) of T new tokens and those before them; document (B, S), where a row holds several -> who
    sees whom, (B, 1, T, S) of bool, or None where model.Attention knows it: it is causal, or all is seen."""
    S = real.shape[1]
    if document is None and real.all() and T in (1, S):
        return None
    places = torch.arange(S, device=real.device)
    mask = (places <= places[S - T :, None]) & real[:, None]  # (B, T, S)
    if document is not None:
        mask &= document[:, :, None] == document[:, None]
    mask |= places == places[S - T :, None]  # padding sees itself: no row of a softmax is empty
    return mask[:, None]


class AbbIEForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = AbbIEPretrainedConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.unembed.weight": "model.embed.weight"}
    _no_split_modules = ["AbbIE"]  # a device_map places it whole: h meets every iteration
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: AbbIEPretrainedConfig):
        super().__init__(config)
        self.model = AbbIE(config.core())
        self.gradient_checkpointing = False  # transformers switches it
        self.post_init()

    def _init_weights(self, module):
        """Nothing: AbbIE.init_weights has done it."""

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.model.unembed

    def get_submodule(self, target: str):
        """peft's prompt tuning takes the embedding of this name, or one of vocab_size rows: ours has more."""
        return self.model.embed if target == "embeddings.word_embeddings" else super().get_submodule(target)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Give the vocabulary new_num_tokens. The rows that pad it to a multiple of 64 are used up first, so
        pad_to_multiple_of is not needed. New rows begin as the mean of the old ones."""
        model, new_num_tokens = self.model, new_num_tokens or self.config.vocab_size
        kept = min(self.config.vocab_size, new_num_tokens)
        self.config.vocab_size = new_num_tokens
        model.config = self.config.core()
        for layer in (model.embed, model.unembed):
            old = layer.weight.detach()[:kept]
            rows = old.mean(0).repeat(model.config.padded_vocab_size, 1)
            rows[:kept] = old
            layer.weight = nn.Parameter(rows, requires_grad=layer.weight.requires_grad)
        if model.config.tie_embeddings:
            model.unembed.weight = model.embed.weight
        model.embed.num_embeddings = model.unembed.out_features = model.config.padded_vocab_size
        return model.embed

    def _prepare_generated_length(self, generation_config, *, input_ids_length, inputs_tensor, **kwargs):
        """The length at which generate stops: at the context's end, if not before."""
        prompt, context = inputs_tensor.shape[1], self.config.block_size
        check(prompt < context, f"a prompt of {prompt} tokens leaves no room in a context of {context}")
        prepared = super()._prepare_generated_length(
            generation_config, input_ids_length=input_ids_length, inputs_tensor=inputs_tensor, **kwargs
        )
        longest = context - prompt + input_ids_length  # which is 0 for a prompt of inputs_embeds
        longest -= prepared.prompt_lookup_num_tokens or 0  # looked up to be tried, past the length if need be
        prepared.max_length = min(prepared.max_length, longest)
        return prepared

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        iters=None,
        **kwargs,
    ):
        """input_ids (B, T), or inputs_embeds (B, T, D) -> logits (B, T, V), or those of the last
        logits_to_keep tokens; with labels (B, T), which are input_ids and -100 where nothing is to be learnt,
        the mean next-token NLL too. Positions that begin again within a row separate documents.
        output_hidden_states: see `states`; the last one is normed."""
        model, config = self.model, self.config
        iters = model.check_iters(config.iters if iters is None else iters)
        misspelt = [name for name in kwargs if name.startswith(("iter", "n_iter", "num_iter"))]
        check(not misspelt, f"unknown argument {misspelt}: the number of iterations is iters")
        check(not kwargs.get("output_attentions"), "attention weights are not kept: no output_attentions")
        check((input_ids is None) != (inputs_embeds is None), "give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            V = config.vocab_size
            check(input_ids.max() < V, f"a token id is beyond the vocabulary of {V}: resize_token_embeddings")
            inputs_embeds = model.embed(input_ids)
        B, T, _ = inputs_embeds.shape

        cache = past_key_values if cache is None else cache
        is_static = cache is not None and cache.is_compileable
        check(not is_static, "a static cache cannot hold iterations: leave out cache_implementation")
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(B, past + T, device=inputs_embeds.device)
        check(attention_mask.shape == (B, past + T), f"attention_mask must be (B, S) = {(B, past + T)}")
        real = attention_mask.bool()
        if position_ids is None:
            position_ids = (real.cumsum(1) - 1).clamp(min=0)[:, -T:]
        position_ids = position_ids.expand(B, T)
        length, context = int(position_ids.max()) + 1, config.block_size
        check(length <= context, f"{length} tokens do not fit into a context of {context}")

        document = documents(position_ids, real)
        if use_cache is None:
            use_cache = config.use_cache and not self.training and document is None
        alone = document is None or not use_cache and cache is None
        check(alone, "positions that begin again separate documents: say use_cache=False")
        model.activation_checkpointing = self.gradient_checkpointing and self.training
        if use_cache and cache is None and not model.activation_checkpointing:
            cache = DynamicCache()

        kv = Slots(model.config, cache, visible(real, T, document), past)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        hidden = []
        for z in self.states(inputs_embeds, iters, model.cos_sin(inputs_embeds, position_ids), kv):
            if output_hidden_states:
                hidden.append(z)
        z = model.norm(z)
        if output_hidden_states:
            hidden[-1] = z  # as Llama's last one is
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep or None, None)
        logits, loss = model.logits(z[:, logits_to_keep]), None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=config.vocab_size, **kwargs)
        hidden = tuple(hidden) or None
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden, **{CACHE: cache})

    def states(self, x: Tensor, iters: int, cos_sin, kv: Slots) -> Iterator[Tensor]:
        """Yield the hidden states, (B, T, D) each: the embeddings x; each Head block's output; u after every
        iteration, which is what the Tail would read; each Tail block's output."""
        model = self.model
        yield x
        for block in model.head:
            x = model.run([block], x, cos_sin, kv)
            yield x
        h, x = x, model.start(x)
        for k in range(iters):
            u, x = model.iterate(x, h, k, k + 1, cos_sin, kv)
            yield u
        for block in model.tail:
            u = model.run([block], u, cos_sin, kv)
            yield u
