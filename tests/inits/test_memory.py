"""Starts that look at data hold one block's gradients or covariances, counted on everything that torch allocates."""

import pytest
import torch
import transformers as tf
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import veneer

STARTS = ("lora+eva", "lora+corda", "lora+corda(mode='kpm')", "lora+lora-ga", "lora-xs+lora-sb", "slora", "slora+nlora")
FEW, MANY = 2, 6
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 61}
PER_BLOCK = 4 * (4 * 64 * 64 + 3 * 64 * 128)  # bytes of the gradients of a block's seven layers


class Alive(TorchDispatchMode):
    """The most bytes that tensors made within it took at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == "cpu":
                storage = t.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {at: (ref, size) for at, (ref, size) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def most(recipe, blocks):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(num_hidden_layers=blocks, **SIZES)).requires_grad_(False)
    ids = torch.randint(3, 61, (2, 2, 4))
    with Alive() as found:
        veneer.attach(model, recipe, rank=2, calibration=[{"input_ids": i, "labels": i} for i in ids])
    return found.most


def grown(recipe):
    """Bytes for each further block, beyond those of the adapter itself."""
    adapter = recipe.split("+")[0].replace("slora", "lora")
    own = most(adapter, MANY) - most(adapter, FEW)
    return (most(recipe, MANY) - most(recipe, FEW) - own) / (MANY - FEW)


@pytest.mark.parametrize("recipe", STARTS)
def test_a_further_block_takes_no_further_gradients_or_covariances(recipe):
    assert grown(recipe) < 0.25 * PER_BLOCK


def test_the_count_sees_gradients_that_are_held():
    """With the gradients of all blocks gathered in one pass the bound breaks."""
    from veneer.parts.evidence import gather

    def held(blocks):
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(num_hidden_layers=blocks, **SIZES))
        ids = torch.randint(3, 61, (2, 2, 4))
        with Alive() as found:
            gather(model, veneer.find_sites(model), [{"input_ids": i, "labels": i} for i in ids],
                   frozenset({"weight_gradient"}))  # fmt: skip
        return found.most

    assert (held(MANY) - held(FEW)) / (MANY - FEW) > 0.9 * PER_BLOCK
