"""What modules cost: parameters, operations, bytes; and what GPUs can do."""

import torch
from torch import nn

from engine.checkpoint import uninitialized

# Bytes a second, and dense operations a second with 2- and 4-byte numbers, from NVIDIA's data
# sheets of the H100, H200 and A100 80GB, SXM, and of the GeForce RTX 4090 (half of what they give
# with sparsity; float32 without TF32). cpu: 4 cores × 3 GHz × 32 operations (AVX2), DDR4-3200 × 2
# channels.
GPUS = {
    "h100": dict(memory_gb=80, bandwidth=3.35e12, flops={2: 9.9e14, 4: 6.7e13}),
    "h200": dict(memory_gb=141, bandwidth=4.8e12, flops={2: 9.9e14, 4: 6.7e13}),
    "a100-80": dict(memory_gb=80, bandwidth=2.04e12, flops={2: 3.12e14, 4: 1.95e13}),
    "rtx-4090": dict(memory_gb=24, bandwidth=1.01e12, flops={2: 1.65e14, 4: 8.3e13}),
    "cpu": dict(memory_gb=16, bandwidth=5.1e10, flops={2: 3.8e11, 4: 3.8e11}),
}


def on_meta(cls: type[nn.Module], config, **options) -> nn.Module:
    """cls(config, **options) on the meta device: shapes, but no memory."""
    with uninitialized(torch.float32, "meta"):
        return cls(config, **options)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def multiplied(module: nn.Module) -> int:
    """Parameters that a token is multiplied by: all but embeddings that are only looked up."""
    # A tied table is multiplied by as well, as the head. The flag alone does not say so: a
    # PreferenceModel has no head, but may have the flag from the config of its backbone.
    if hasattr(module, "head") and module.config.tie_word_embeddings:
        return parameters(module)

    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    return parameters(module) - sum(table.weight.numel() for table in tables)


def low_rank(policy: nn.Module, rank: int) -> int:
    """Parameters of the terms beside the linear layers of all blocks (engine/lora.py)."""
    blocks = policy.model.layers.modules()
    linears = [layer for layer in blocks if isinstance(layer, nn.Linear)]
    return rank * sum(layer.in_features + layer.out_features for layer in linears)


# ------------------------------------------------------------------------ operations


def causal_flops(module: nn.Module, end: float, begin: float = 0) -> float:
    """Forward pass over the positions from begin to end of a row.

    2 operations per parameter and token, 4 per head entry and pair of positions.
    """
    config = module.config
    entries = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2 * multiplied(module) * (end - begin) + 2 * entries * (end**2 - begin**2)


def shared_cost(module: nn.Module, prompt: float, T: float, prompts: float, rows: float) -> tuple:
    """(tokens, operations) of prompts that are computed once for all rows of T tokens with them."""
    tokens = prompts * prompt + rows * (T - prompt)
    once = prompts * causal_flops(module, prompt)
    return tokens, once + rows * causal_flops(module, T, prompt)


def pairrm_flops(module: nn.Module, T: float) -> float:
    """A row of T tokens: content with content, and with 2T - 1 relative positions both ways."""
    config = module.config
    attention = 4 * config.num_hidden_layers * config.hidden_size * T * (3 * T - 1)
    return 2 * multiplied(module) * T + attention


# ------------------------------------------------------------------------ bytes
# `width` is the number of bytes of a number that is computed with.


def saved_bytes(config, width: int) -> int:
    """What a Block keeps of one position for its backward pass.

    Norms, also in float32; queries, keys, values and heads; four rows of the MLP.
    """
    D = config.hidden_size
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return 8 * D + width * (4 * D + 2 * heads + 4 * config.intermediate_size)


def attended(config) -> int:
    """Numbers of a position in the lines of a Pack (data.py): its queries, keys and values."""
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim


def recomputing_bytes(config, tokens: int, width: int) -> int:
    """Activations of so many tokens in the backward pass of a Decoder that recomputes.

    It has kept the inputs of all blocks; one block at a time it has whole, with its gradients.
    """
    inputs = tokens * config.num_hidden_layers * config.hidden_size * width
    block = tokens * saved_bytes(config, width)
    gradients = 3 * tokens * config.intermediate_size * width
    return inputs + block + gradients


def training_bytes(
    policy: nn.Module, gpus: int, width: int, held: int, state: int, terms: int = 0
) -> dict:
    """{part: bytes} that a GPU holds to train a Transformer, besides the weights it samples with.

    A weight has `held` bytes, and the optimizer's averages of a trained one have `state`. `terms`
    are the parameters of low-rank terms: if there are any, each GPU has them all, in float32, and
    nothing else is trained.
    """
    P = parameters(policy)
    shard = held * P / gpus
    parts = {"shard": 0, "gradients": shard, "optimizer": state * P / gpus, "gathered": 0}
    if terms:
        parts |= {"terms": 4 * terms, "gradients": 4 * terms, "optimizer": state * terms}

    # Of several GPUs (engine/distributed.py, shard) each has a shard apart from the weights. One
    # block, embedding and head are whole on each while they are computed with; their gradients too.
    if gpus > 1:
        other_blocks = (policy.config.num_hidden_layers - 1) * parameters(policy.model.layers[0])
        parts["shard"] = shard
        parts["gathered"] = (1 if terms else 2) * width * (P - other_blocks)
    return parts


def pairrm_bytes(config, rows: int, T: int, width: int) -> int:
    """A layer's activations of so many rows of T tokens in a PairRM."""
    # Attention has two position terms of 2T - 1 columns and their sum: 5 tables of T × T.
    tables = 5 * rows * config.num_attention_heads * T * T
    return width * (tables + rows * T * (2 * config.intermediate_size + 6 * config.hidden_size))
