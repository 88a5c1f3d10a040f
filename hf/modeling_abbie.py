"""AbbIE for transformers: this file and an unmodified model.py, in the folder of the weights, are the model.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)         # or iters=4
    model(input_ids, iters=4), model.generate(**tokenizer("def ", return_tensors="pt"), iters=8)

`iters` is how often the Body is applied; without it, what the model was trained at (config.iters). Shapes as
in model.py: B batch, T new tokens, S tokens with those in the cache, V vocab_size.
"""

from dataclasses import asdict, fields

import torch
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .model import AbbIE, AbbIEConfig, check, rope_table

# Newer versions of transformers call `past_key_values` `cache`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class AbbIEPretrainedConfig(PretrainedConfig):
    """The keys of model.AbbIEConfig, and cache_mode: "full", keys and values of every iteration (exact), or
    "last", those of a token's last iteration only (r times less memory)."""

    model_type = "abbie"
    attribute_map = {
        "hidden_size": "n_embd", "intermediate_size": "ffn_dim", "num_attention_heads": "n_attn_heads",
        "num_key_value_heads": "n_kv_heads", "max_position_embeddings": "block_size",
    }  # fmt: skip

    def __init__(self, cache_mode: str = "full", llama3_rope: dict | None = None, **kwargs):
        check(cache_mode in ("full", "last"), f"cache_mode={cache_mode!r} is neither full nor last")
        self.cache_mode, self.llama3_rope = cache_mode, llama3_rope
        for name, default in asdict(AbbIEConfig()).items():
            if name != "rope_scaling":  # a name that transformers rewrites
                setattr(self, name, kwargs.pop(name, default))
        kwargs["tie_word_embeddings"] = self.tie_embeddings
        super().__init__(**kwargs)
        self.core()  # refuses what does not fit together

    def core(self) -> AbbIEConfig:
        names = [f.name for f in fields(AbbIEConfig) if f.name != "rope_scaling"]
        return AbbIEConfig(rope_scaling=self.llama3_rope, **{name: getattr(self, name) for name in names})

    @property
    def num_hidden_layers(self) -> int:
        """Slots of the cache: one per block and iteration."""
        iterations = self.core().mean_iters if self.cache_mode == "full" else 1
        return self.n_head_blocks + self.n_tail_blocks + self.n_body_blocks * iterations


class Slots:
    """What model.Attention asks a cache for (see its docstring), answered by transformers' cache. T new
    tokens follow `past` ones; `at` picks the slot of a block, and of an iteration where each has its own.
    Slots run: Head, Tail, Body in iteration 0, Body in iteration 1, ..."""

    def __init__(self, config: AbbIEPretrainedConfig, cache, mask, past: int, T: int, iters: int):
        self.config, self.cache, self.mask, self.past, self.iters = config, cache, mask, past, iters
        self.causal = mask is None and T > 1 and past == 0  # SDPA aligns its causal mask top-left

    def at(self, part: str, i: int, k: int = 0) -> "Slots":
        config, full = self.config, self.config.cache_mode == "full"
        self.slot, self.keep = i, True
        if part != "head":
            self.slot += config.n_head_blocks
        if part == "body":
            self.slot += config.n_tail_blocks + (k * config.n_body_blocks if full else 0)
            self.keep = full or k == self.iters - 1
        return self

    def store(self, keys, values):
        """The new keys and values, (B, K, T, E) each -> all there are, (B, K, S, E) each."""
        if self.cache is None:
            return keys, values
        layers = getattr(self.cache, "layers", None)  # generate makes as many as config.iters needs
        while layers and len(layers) <= self.slot:
            layers.append(type(layers[0])())
        held = self.cache.get_seq_length(self.slot) if len(self.cache) > self.slot else 0
        check(held == self.past, f"this cache holds {self.past} tokens, but not of so many iterations")
        if self.keep:
            return self.cache.update(keys, values, self.slot)
        if held:  # "last": an iteration before the last reads the slot, and leaves nothing in it
            old_keys, old_values, *_ = list(self.cache)[self.slot]
            keys, values = torch.cat((old_keys, keys), dim=2), torch.cat((old_values, values), dim=2)
        return keys, values


def visible(attention_mask, past: int, T: int, device):
    """(B, S) of 1 for tokens and 0 for padding, or None -> who sees what, (T, S) or (B, 1, T, S) of bool, or
    None where SDPA's own causal mask, or no mask, says it."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (past == 0 or T == 1):
        return None
    places = torch.arange(past + T, device=device)
    mask = places <= places[past:, None]  # (T, S)
    if padded:
        itself = places == places[past:, None]  # so that padding sees something: no row of a softmax is empty
        mask = mask & attention_mask[:, None, None, :].bool() | itself
    return mask


class AbbIEForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = AbbIEPretrainedConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.unembed.weight": "model.embed.weight"}
    _no_split_modules = ["AbbIE"]  # a device_map places it whole: h meets every iteration
    _supports_sdpa = True

    def __init__(self, config: AbbIEPretrainedConfig):
        super().__init__(config)
        self.model = AbbIE(config.core())
        self.post_init()

    def _init_weights(self, module):
        """Nothing: AbbIE.init_weights has done it."""

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.model.unembed

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        iters=None,
        **kwargs,
    ):
        """input_ids (B, T) -> logits (B, T, V), or those of the last logits_to_keep tokens; with labels
        (B, T), which are input_ids and -100 where nothing is to be learnt, the mean next-token NLL too."""
        model, config, T, device = self.model, self.config, input_ids.shape[1], input_ids.device
        iters = model.check_iters(config.core().mean_iters if iters is None else iters)
        cache = past_key_values if cache is None else cache
        if cache is None and (not self.training if use_cache is None else use_cache):
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]  # of real tokens
        elif position_ids is None:
            position_ids = torch.arange(past, past + T, device=device)[None]
        check(
            past + T <= config.block_size or int(position_ids.max()) < config.block_size,
            f"{past + T} tokens do not fit into a context of {config.block_size}",
        )
        if model._rope[0].is_meta:  # from_pretrained makes models without memory
            model._rope = rope_table(model.config)
        rope = tuple(table[position_ids][:, None] for table in model.rope_on(device))  # (B, 1, T, E/2) each

        kv = Slots(config, cache, visible(attention_mask, past, T, device), past, T, iters)
        h = model.run_head(input_ids, rope, kv)
        u, _ = model.advance(model.start(h), h, 0, iters, rope, kv, model.backprop_from(iters))
        z = model.run_tail(u, rope, kv)
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep or None, None)
        logits, loss = model.logits(z[:, logits_to_keep]), None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
