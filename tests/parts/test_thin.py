"""Structural pruning against the oracles 7 and 8 of LST's sheet (126), and thin blocks of several families."""

import pytest
import torch
import transformers as tf
from models import llama, make
from torch import Tensor, nn

from veneer.core.site import Site
from veneer.errors import UserError
from veneer.models import architecture
from veneer.parts import thin


def magnitude(site: Site) -> Tensor:
    """|W|."""
    return site.weight().detach().abs()


def copies(trunk: nn.Module, reduction: int) -> dict[int, nn.Module]:
    """A thin copy of every block."""
    config = thin.thin_config(trunk, reduction)
    return {
        i: thin.thin_block(b, config, i, torch.Generator().manual_seed(i))
        for i, (_, b) in enumerate(architecture.blocks(trunk))
    }


def test_an_eighth_of_768_are_96_and_equals_go_by_index():
    assert torch.equal(thin.keep_top(torch.ones(768), 8), torch.arange(96))


def test_the_dimensions_with_weight_are_kept():
    score = torch.zeros(768)
    wanted = torch.randperm(768, generator=torch.Generator().manual_seed(0))[:96].sort().values
    score[wanted] = 1.0
    assert torch.equal(thin.keep_top(score, 8), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
def test_every_tensor_of_a_thin_block_is_divided_in_every_dimension(kind):
    trunk = architecture.trunk(make(kind).model)
    for i, block in copies(trunk, 4).items():
        whole = dict(architecture.blocks(trunk)[i][1].named_parameters())
        for name, p in block.named_parameters():
            assert p.shape == tuple(n // 4 for n in whole[name].shape), name
        assert sum(p.numel() for p in block.parameters()) == thin.thin_count(architecture.blocks(trunk)[i][1], 4)


def test_grouped_queries_keep_their_heads_and_pairs():
    trunk = llama(hidden_size=32, num_attention_heads=4).model
    with torch.no_grad():
        attention = trunk.layers[0].self_attn
        attention.k_proj.weight.view(2, 8, 32)[:, [2, 6]] += 100  # a rotary pair: 2 and 2 + 8/2
        attention.q_proj.weight.view(4, 8, 32)[:, 1] += 50  # heavy in one group of rows, light in the others
    side = copies(trunk, 4)
    heads = thin.prune(trunk, side, None, 4, magnitude)
    assert heads[0].tolist() == [2, 6]
    keep = thin.keep_top(magnitude(Site("", trunk.embed_tokens, "embedding")).sum(1), 4)
    rows = [8 * head + j for head in range(4) for j in (2, 6)]
    assert torch.equal(side[0].self_attn.q_proj.weight, attention.q_proj.weight[rows][:, keep])
    assert torch.equal(side[0].self_attn.v_proj.weight, attention.v_proj.weight[rows[:4]][:, keep])
    assert torch.equal(side[0].input_layernorm.weight, trunk.layers[0].input_layernorm.weight[keep])


def test_the_survivors_of_a_layer_select_the_columns_of_the_next():
    trunk = make("gpt2").model.transformer
    up, down = trunk.h[0].mlp.c_fc.weight, trunk.h[0].mlp.c_proj.weight  # Conv1D: (in, out)
    out = [3, 9, 20, 30]
    with torch.no_grad():
        up[:, 5:21] += 100
        down[:, out] += 100
    side, norm = copies(trunk, 8), thin.thin_norm(trunk.ln_f, 4)
    thin.prune(trunk, {0: side[0]}, norm, 8, magnitude)
    assert torch.equal(side[0].mlp.c_fc.bias, trunk.h[0].mlp.c_fc.bias[5:21])
    assert torch.equal(side[0].mlp.c_proj.weight, down[5:21][:, out])
    assert torch.equal(norm.weight, trunk.ln_f.weight[out])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
def test_reduction_1_copies_every_block(kind):
    trunk = architecture.trunk(make(kind).model)
    side = copies(trunk, 1)
    thin.prune(trunk, side, None, 1, magnitude)
    for i, (_, block) in enumerate(architecture.blocks(trunk)):
        whole = dict(block.named_parameters())
        assert all(torch.equal(p, whole[name]) for name, p in side[i].named_parameters())


def test_norms_of_heads_and_four_norms_a_block_are_pruned_too():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 61, "head_dim": 8, "pad_token_id": 0}
    for model in (tf.Qwen3Model(tf.Qwen3Config(**sizes)), tf.Gemma2Model(tf.Gemma2Config(**sizes))):
        side = copies(model, 1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        thin.prune(model, side, None, 1, magnitude)
        whole = dict(model.layers[0].named_parameters())
        assert all(torch.equal(p, whole[name]) for name, p in side[0].named_parameters())


def test_the_global_draws_are_left_alone():
    trunk = make("llama").model.model
    before = torch.random.get_rng_state()
    copies(trunk, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "reduction, says", [(5, "cannot be divided by reduction=5"), (8, "into pairs of dimensions, which its positions")]
)
def test_widths_that_cannot_be_divided_are_named(reduction, says):
    with pytest.raises(UserError, match=says):
        thin.thin_config(make("llama").model.model, reduction)


def test_a_block_whose_layers_do_not_show_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    neox = tf.GPTNeoXModel(tf.GPTNeoXConfig(vocab_size=61, **sizes))  # q, k and v interleaved in one layer
    with pytest.raises(UserError, match="do not show as q, k, v"):
        thin.prune(neox, {0: neox.layers[0]}, None, 1, magnitude)
