"""EVA against its sheet's oracles (064), scikit-learn and PEFT."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import veneer
from veneer.core.site import find_sites
from veneer.errors import UserError
from veneer.inits.eva import EVA


class Inputs:
    """Principal components that were found elsewhere."""

    def __init__(self, shares, width=4):
        self.explained_variance_ratio = torch.tensor(shares, dtype=torch.float64)
        self.components = torch.eye(width)[: len(shares)]
        self.singular_values = self.explained_variance_ratio.sqrt().float()
        self.count = 100


def planned(shares, rank, alpha=None, **fields):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in shares))
    sites = find_sites(model, "all")
    evidence = {s: type("Found", (), {"inputs": Inputs(x), "tokens": 100}) for s, x in zip(sites, shares)}
    return EVA(**fields).plan(sites, evidence, {"rank": rank, "alpha": alpha})


def llama(hidden=32):
    config = tf.LlamaConfig(
        hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61
    )
    return tf.LlamaForCausalLM(config).eval()


def batches(n=2, rows=4, length=12):
    g = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 61, (rows, length), generator=g) for _ in range(n)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x.clone()} for x in ids]


def test_the_sheets_redistribution_with_its_tie():
    plan = planned([[0.6, 0.2, 0.1, 0.05], [0.3, 0.25, 0.2, 0.15]], rank=2)
    assert plan == {"0": {"rank": 2}, "1": {"rank": 2}}


def test_a_layer_can_get_rho_times_its_rank_or_lose_its_adapter():
    shares = [[0.5, 0.3, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.02, 0.01, 0.01, 0.01]]
    assert planned(shares, rank=2) == {"0": {"rank": 3}, "1": {"rank": 3}, "2": None}
    assert planned(shares, rank=2, rho=1.0) == {p: {"rank": 2} for p in "012"}


def test_alpha_follows_the_rank_so_that_the_scale_stays():
    shares = [[0.5, 0.4, 0.3], [0.2, 0.1, 0.1]]
    assert planned(shares, rank=2, alpha=6.0, rho=1.5)["0"] == {"rank": 3, "alpha": 9.0}
    assert planned(shares, rank=2, alpha=6.0, rho=1.5, adjust_alpha=False)["0"] == {"rank": 3}


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_the_budget_is_spent_and_the_start_is_the_base(rho):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    x = batches()[0]
    y = model(**x).logits
    adapter = veneer.attach(model, f"eva(rho={rho})", rank=4, alpha=8.0, calibration=batches())
    assert torch.equal(model(**x).logits, y)
    ranks = [d.rank for d in adapter.deltas.values()]
    assert sum(ranks) == 4 * 14 and max(ranks) <= 4 * rho
    assert all(d.scale == 2.0 for d in adapter.deltas.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for d in adapter.deltas.values():
        assert torch.allclose(d.A @ d.A.T, torch.eye(d.rank), atol=1e-4)


def test_directions_are_those_of_scikit_learn_and_siblings_share_them():
    decomposition = pytest.importorskip("sklearn.decomposition")
    model, data, seen = llama(), batches(), []
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, a, y: seen.append(a[0].flatten(0, 1)))
    adapter = veneer.attach(model, "eva(rho=1.0)", rank=32, calibration=data)  # all directions: updates lose nothing
    hook.remove()
    X = torch.cat(seen).detach().numpy()
    pca = decomposition.PCA(n_components=6).fit(X)
    up, gate = (adapter.deltas[f"model.layers.1.mlp.{n}_proj"] for n in ("up", "gate"))
    cosines = (up.A[:6] * torch.from_numpy(pca.components_)).sum(1).abs()
    assert torch.allclose(cosines, torch.ones(6), atol=1e-4)
    assert torch.equal(up.A, gate.A)


def test_start_agrees_with_peft_on_one_batch():
    peft = pytest.importorskip("peft")
    model, (batch,) = llama(), batches(1)
    config = peft.LoraConfig(
        r=16,
        target_modules=["q_proj"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, use_label_mask=False),
    )  # fmt: skip  (rank 16 of 32: PEFT's randomised decomposition is then exact)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    adapter = veneer.attach(model, "eva(rho=1.0, labels_only=False)", rank=16, sites=["q_proj"], calibration=[batch])
    for path, d in adapter.deltas.items():
        other = theirs.get_submodule(f"base_model.model.{path}").lora_A["default"].weight
        assert torch.allclose((d.A @ other.T).abs(), torch.eye(16), atol=1e-2)


def test_padding_and_unlabelled_positions_do_not_count():
    model, (batch,) = llama(), batches(1)
    padded = {k: torch.cat([v, v], 1) for k, v in batch.items()}
    padded["attention_mask"][:, 12:] = 0
    padded["labels"][:, 12:] = -100
    batch["labels"][:, 9:] = padded["labels"][:, 9:] = -100
    short, long = (
        veneer.attach(m, "eva(rho=1.0)", rank=4, sites=["q_proj"], calibration=[b])
        for m, b in ((copy.deepcopy(model), batch), (model, padded))
    )
    for a, b in zip(short.deltas.values(), long.deltas.values()):
        assert torch.allclose(a.A, b.A, atol=1e-4)


def test_whitening_divides_by_the_root_of_the_singular_value():
    found = type("Found", (), {"inputs": Inputs([0.64, 0.16, 0.0]), "tokens": 100})
    (site,) = find_sites(nn.Sequential(nn.Linear(4, 4)), "all")
    slots = [type("S", (), {"role": r, "shape": s}) for r, s in (("factor_a", (3, 4)), ("factor_b", (4, 3)))]
    start = EVA(whiten=True).start(site, slots, {site: found}, torch.Generator())
    assert torch.allclose(start["factor_a"].norm(dim=1), torch.tensor([0.8**-0.5, 0.4**-0.5, 1.0]))


def test_directions_beyond_those_gathered_are_orthogonal_to_them():
    found = type("Found", (), {"inputs": Inputs([0.7, 0.2]), "tokens": 100})
    (site,) = find_sites(nn.Sequential(nn.Linear(4, 4)), "all")
    slots = [type("S", (), {"role": r, "shape": s}) for r, s in (("factor_a", (4, 4)), ("factor_b", (4, 4)))]
    A = EVA().start(site, slots, {site: found}, torch.Generator().manual_seed(0))["factor_a"]
    assert torch.allclose(A @ A.T, torch.eye(4), atol=1e-5)


def test_it_explains_the_most_variance_of_its_rank():
    model, data, seen = llama(), batches(), []
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, a, y: seen.append(a[0].flatten(0, 1)))
    adapter = veneer.attach(model, "eva(rho=1.0)", rank=4, sites=["down_proj"], calibration=data)
    hook.remove()
    X = torch.cat(seen).detach()
    X = X - X.mean(0)
    A = adapter.deltas["model.layers.0.mlp.down_proj"].A
    random = torch.linalg.qr(torch.randn(48, 4)).Q.T
    left, other = ((X - X @ V.T @ V).square().sum() for V in (A, random))
    least = torch.linalg.svdvals(X)[4:].square().sum()
    assert least <= left * (1 + 1e-5) and left < 1.05 * least and left < other


def test_too_little_data_is_refused_by_name():
    data = batches(1, rows=1, length=3)
    data[0]["labels"][:] = -100
    with pytest.raises(UserError, match="q_proj saw only 0 rows"):
        veneer.attach(llama(), "eva", rank=4, sites=["q_proj"], calibration=data)
