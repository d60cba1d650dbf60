"""Each method of rft.py against its formula, written out slowly in float64."""
import math
from types import SimpleNamespace

import pytest
import torch

from rft import (
    METHODS,
    Totals,
    fixed_weights,
    group_losses,
    group_weights,
    reward_weights,
    rft_loss,
    selection_threshold,
)

DEFAULTS = {"scope": "sample", "reduce": "mean", "tau": 3.0, "detach": "yes", "alpha": 0.6,
            "keep_share": 0.6}


def batch_loss(samples, method, **settings):
    """The loss of a global batch; samples: (losses (n,) float64, labels (n,)) of each."""
    settings = DEFAULTS | settings
    losses = torch.cat([losses for losses, _ in samples])
    labels = torch.cat([labels for _, labels in samples])
    if method == "sft":
        return losses.sum() / len(losses)
    if method == "rho1":
        excess = (losses - labels).tolist()
        ranking = sorted(range(len(excess)), key=excess.__getitem__, reverse=True)
        count = max(1, round(settings["keep_share"] * len(excess)))
        return sum(losses[i] for i in ranking[:count]) / count
    if method == "rewardft":
        weights = [1 / (1 + math.exp(-reward)) for reward in labels.tolist()]
        weighted = [w * loss for w, loss in zip(weights, losses, strict=True)]
        return sum(weighted) / sum(weights)
    if settings["scope"] == "batch":
        samples = [(losses, labels)]
    of_samples = [two_group_loss(*sample, method, **settings) for sample in samples]
    return sum(of_samples) / len(of_samples)


def two_group_loss(losses, is_reasoning, method, *, reduce, tau, detach, alpha, **_):
    """w_b L_b + w_r L_r of one sample or one batch; a group without tokens is left out."""
    L = []
    fixed = []
    for group, weight in ((losses[~is_reasoning], 1 - alpha), (losses[is_reasoning], alpha)):
        if len(group):
            L.append(group.mean() if reduce == "mean" else group.sum())
            fixed.append(weight)
    if len(L) == 1:
        return L[0]
    if method in ("alpha", "regex"):
        return fixed[0] * L[0] + fixed[1] * L[1]
    L_b, L_r = [loss.detach() for loss in L] if detach == "yes" else L
    largest = max(L_b.item(), L_r.item())
    e_b = torch.exp((L_b - largest) / tau)
    e_r = torch.exp((L_r - largest) / tau)
    w_b = e_b / (e_b + e_r)
    return w_b * L[0] + (1 - w_b) * L[1]


def test_every_method_of_the_paper_is_there():
    assert set(METHODS) == {"sft", "regex", "rho1", "rewardft", "alpha", "regex+rft", "rft"}
    for function, _ in METHODS.values():
        assert function.__doc__


def random_batch(seed):
    """(losses (4, 9) with a gradient, is_reasoning, values, is_output); row 1 has one group."""
    g = torch.Generator().manual_seed(seed)
    losses = 4 * torch.rand(4, 9, generator=g)
    is_reasoning = torch.rand(4, 9, generator=g) < 0.4
    is_reasoning[1] = True
    values = torch.randn(4, 9, generator=g)
    is_output = torch.rand(4, 9, generator=g) < 0.8
    is_output[:, 0] = True
    return losses.requires_grad_(), is_reasoning, values, is_output


def whole_totals(losses, labels, is_output, method, options):
    """Totals of a batch that is there as a whole, and its labels as rft.py takes them."""
    totals = Totals(len(losses), int(is_output.sum()))
    if method == "rho1":
        excess = losses.detach() - labels
        threshold = selection_threshold(excess[is_output], options.keep_share)
        labels = excess >= threshold
        totals.weight = (labels & is_output).sum()
    elif method == "rewardft":
        totals.weight = reward_weights(labels[is_output]).sum()
    elif options.scope == "batch":
        totals.L, totals.n = group_losses(
            losses.detach()[is_output], labels[is_output], reduce=options.reduce)
    return totals, labels


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("detach", ["yes", "no"])
@pytest.mark.parametrize("method", METHODS)
def test_shares_of_loss_and_gradient_add_up_to_the_formula(method, detach, scope, reduce, pieces):
    for seed in range(5):
        losses, is_reasoning, values, is_output = random_batch(seed)
        needs_values = METHODS[method][1] in ("reference", "reward")
        labels = values if needs_values else is_reasoning
        options = SimpleNamespace(**DEFAULTS | {"scope": scope, "reduce": reduce, "detach": detach})
        totals, given = whole_totals(losses, labels, is_output, method, options)
        total = 0.0
        for part in torch.arange(4).chunk(pieces):
            function, _ = METHODS[method]
            masked = torch.where(is_output, losses, 0.0)        # as the model gives them
            share, w = function(masked[part], given[part], is_output[part], totals, options)
            assert not w.requires_grad
            share.backward()
            total += share.item()

        slow = losses.detach().double().requires_grad_()
        samples = [(slow[b][is_output[b]], labels[b][is_output[b]]) for b in range(4)]
        expected = batch_loss(samples, method, scope=scope, reduce=reduce, detach=detach)
        expected.backward()
        assert total == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(losses.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Weights

def test_without_detaching_a_group_that_is_behind_is_pushed_the_harder():
    """d L_RFT / d L_g = w_g (1 + (L_g - L_RFT) / tau)"""
    L = torch.tensor([1.0, 4.0], requires_grad=True)
    n = torch.tensor([3, 3])
    w = group_weights(L, n, 2.0, detach=False)
    loss = (w * L).sum()
    loss.backward()
    expected = w * (1 + (L - loss) / 2.0)
    torch.testing.assert_close(L.grad, expected.detach())
    assert L.grad[1] > w[1]


@pytest.mark.parametrize("group", [True, False])
def test_a_missing_group_leaves_a_finite_gradient_where_weights_are_not_detached(group):
    losses = torch.rand(2, 5, requires_grad=True)
    is_output = torch.ones(2, 5, dtype=torch.bool)
    is_output[1] = False                                        # a row with no token at all
    loss = rft_loss(losses, torch.full((2, 5), group), is_output=is_output, detach=False)
    loss.sum().backward()
    torch.testing.assert_close(losses.grad, is_output / 5)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_fixed_weights_leave_a_group_that_is_alone_its_whole_weight(alpha):
    n = torch.tensor([[3, 0, 2, 0], [4, 5, 0, 0]])
    expected = torch.tensor([[1 - alpha, 0, 1, 0], [alpha, 1, 0, 0]])
    torch.testing.assert_close(fixed_weights(n, alpha), expected)


@pytest.mark.parametrize("share, count", [(0.0, 1), (0.1, 1), (0.5, 5), (0.6, 6), (1.0, 10)])
def test_rho1_selects_the_share_with_the_largest_excess_loss(share, count):
    excess = torch.randperm(10).float() - 4
    selected = excess >= selection_threshold(excess, share)
    assert sorted(excess[selected].tolist()) == sorted(excess.tolist())[10 - count:]


def test_a_token_weighs_more_the_higher_its_reward_and_never_less_than_nothing():
    weights = reward_weights(torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0]))
    assert (weights.diff() > 0).all()
    assert weights[2] == 0.5
    assert weights.min() >= 0
    assert weights.max() <= 1
