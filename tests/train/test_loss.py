"""The causal loss against logits of the whole batch and torch's cross entropy."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from veneer.errors import UserError
from veneer.train.loss import LossModule, causal_loss, head_loss

VOCABULARY, ROWS, TIME = 96, 3, 20


def llama(layers=2, dtype=torch.float32, **extra):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **extra,
    )
    return stirred(tf.LlamaForCausalLM(config).to(dtype))


def stirred(model):
    for p in model.parameters():
        p.data.mul_(4) if p.ndim > 1 else p.data.add_(torch.randn_like(p) * 0.1)
    return model


def batch(labelled=0.5):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (ROWS, TIME), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) > labelled, -100)
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    labels[1, 14:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reference(model, rows):
    """Summed cross entropy from all logits, and the number of labels."""
    inputs = {k: v for k, v in rows.items() if k != "labels"}
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    targets = rows["labels"][:, 1:].flatten()
    return F.cross_entropy(logits.float(), targets, reduction="sum"), int((targets != -100).sum())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(model, rows, rtol=1e-4):
    total, count = reference(model, rows)
    true = gradients(model, total / count)
    for chunk in (7, 128):
        loss = causal_loss(model, rows, chunk=chunk)
        torch.testing.assert_close(loss, (total / count).detach(), rtol=1e-5, atol=1e-6)
        mine = gradients(model, loss)
        assert mine.keys() == true.keys()
        for name, g in mine.items():
            assert (g - true[name]).norm() <= rtol * true[name].norm() + 1e-7, name
    torch.testing.assert_close(causal_loss(model, rows, reduction="sum"), total.detach(), rtol=1e-5, atol=1e-5)


def attached(model, **keywords):
    adapter = veneer.attach(model, "lora", rank=4, **keywords)
    for d in adapter.deltas.values():
        d.B.data.normal_(0, 0.3)
    return model


def test_equals_cross_entropy_of_all_logits_with_an_adapter():
    compare(attached(llama()), batch())


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_trains_gets_its_gradient(tied):
    compare(llama(tie_word_embeddings=tied), batch())


def test_an_adapted_head_gets_its_gradient():
    compare(attached(llama(), sites=["q_proj", "lm_head"]), batch())


def test_a_head_with_a_bias():
    torch.manual_seed(0)
    config = tf.PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        resid_pdrop=0.0,
    )
    compare(stirred(tf.PhiForCausalLM(config)).eval(), batch())


def gpt2():
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=TIME)
    return stirred(tf.GPT2LMHeadModel(config)).eval()


def test_another_architecture():
    compare(gpt2(), batch())


def test_logits_that_are_changed_after_the_head():
    torch.manual_seed(0)
    config = tf.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
    )
    compare(stirred(tf.Gemma2ForCausalLM(config)).eval(), batch())


def test_any_module_that_gives_logits():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, VOCABULARY)

        def forward(self, input_ids):
            return self.out(self.table(input_ids))

    torch.manual_seed(0)
    model, rows = Plain(), batch()
    del rows["attention_mask"]
    logits = model(rows["input_ids"])[:, :-1].flatten(0, 1)
    true = F.cross_entropy(logits, rows["labels"][:, 1:].flatten())
    torch.testing.assert_close(causal_loss(model, rows), true)


def test_an_encoder_decoder_gives_its_own_loss():
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model, rows = tf.T5ForConditionalGeneration(config).eval(), batch()
    torch.testing.assert_close(causal_loss(model, rows), model(**rows).loss)
    count = (rows["labels"] != -100).sum()
    torch.testing.assert_close(causal_loss(model, rows, reduction="sum"), model(**rows).loss * count)


def test_the_routers_loss_is_added():
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    model, rows = tf.MixtralForCausalLM(config).eval(), batch()
    torch.testing.assert_close(causal_loss(model, rows), model(**rows).loss, rtol=1e-5, atol=1e-5)


def test_a_batch_without_a_label_gives_zero_and_zero_gradients():
    model, rows = attached(llama()), batch(0.0)
    loss = causal_loss(model, rows)
    assert loss.item() == 0
    assert all(not g.any() for g in gradients(model, loss).values())


def test_without_gradients_it_gives_the_same_number():
    model, rows = attached(llama()), batch()
    with torch.no_grad():
        loss = causal_loss(model, rows)
    assert loss.item() == causal_loss(model, rows).item() and not loss.requires_grad


def test_the_tokens_by_vocabulary_matrix_never_exists():
    model, rows = attached(llama()), batch()
    weight = model.lm_head.weight.untyped_storage().data_ptr()

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim > 1 and out.shape[-1] == VOCABULARY:
                own = out.untyped_storage().data_ptr() == weight
                self.rows = max(self.rows, 0 if own else out.shape[-2])
            return out

    with Largest() as seen:
        causal_loss(model, rows, chunk=4).backward()
    assert seen.rows == 4


def test_blocks_below_the_lowest_adapted_one_keep_nothing():
    model = attached(llama(layers=3), sites=lambda s: ".layers.2.mlp" in s.path)
    block, kept = [None], []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *a, i=i: block.__setitem__(0, i))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(block[0]) or t, lambda t: t):
        causal_loss(model, batch()).backward()
    assert set(kept) == {2}


def test_checkpointed_blocks_give_the_same_gradients():
    rows = batch()
    model = attached(llama().train(), dropout=0.3)
    torch.manual_seed(0)
    root = model.__dict__["_veneer"]
    draws = root.draws
    true = gradients(model, causal_loss(model, rows))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    root.draws = draws
    for name, g in gradients(model, causal_loss(model, rows)).items():
        torch.testing.assert_close(g, true[name], rtol=1e-5, atol=1e-6)


def test_a_wrapper_gets_the_call():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    model = attached(llama())
    wrapped = Wrapper(model)
    assert causal_loss(wrapped, batch()).item() == causal_loss(model, batch()).item() and wrapped.calls == 1
    assert LossModule(model)(batch()).item() == causal_loss(model, batch()).item()


def test_the_model_is_as_it_was_afterwards():
    model = attached(llama())
    causal_loss(model, batch())
    before = {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()}
    causal_loss(model, batch()).backward()
    assert before == {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()}
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_in_bf16_the_loss_is_that_of_the_bf16_logits_in_fp32():
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 500, bias=False).bfloat16().requires_grad_(False)
    states = (torch.randn(40, 16, generator=g) * 8).bfloat16().requires_grad_()
    targets = torch.randint(500, (40,), generator=g)
    logits = head(states)
    true = F.cross_entropy(logits.double(), targets, reduction="sum")
    (grad,) = torch.autograd.grad(F.cross_entropy(logits.float(), targets, reduction="sum"), states)
    states.grad = None
    loss = head_loss(states, head, targets, 16)
    loss.backward()
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=0)
    assert (states.grad.float() - grad.float()).norm() < 0.01 * grad.float().norm()


@pytest.mark.parametrize(
    "rows,said",
    [
        ({"input_ids": torch.ones(2, 5, dtype=torch.long)}, "labels"),
        (torch.ones(2, 5), "Tensor"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.ones(2, 4, dtype=torch.long)}, "(2, 4)"),
    ],
)
def test_what_is_no_labelled_batch_is_refused_in_a_sentence(rows, said):
    with pytest.raises(UserError) as error:
        causal_loss(llama(layers=1), rows)
    assert said in str(error.value)
