"""rft_loss against the paper's formula, written out slowly in float64."""
import math

import pytest
import torch

from rft import group_losses, group_weights, rft_loss


def formula(losses, is_reasoning, tau=3.0, reduce="mean"):
    """(L_RFT, w_b, w_r): w_b = exp(L_b / tau) / (exp(L_b / tau) + exp(L_r / tau)), w_r = 1 - w_b,
    L_RFT = w_b L_b + w_r L_r.
    """
    boilerplate = losses[~is_reasoning].tolist()
    reasoning = losses[is_reasoning].tolist()
    L_b = sum(boilerplate)
    L_r = sum(reasoning)
    if reduce == "mean":
        L_b /= max(1, len(boilerplate))
        L_r /= max(1, len(reasoning))
    if boilerplate and reasoning:
        w_b = math.exp(L_b / tau) / (math.exp(L_b / tau) + math.exp(L_r / tau))
        w_r = 1 - w_b
    else:
        w_b = float(len(boilerplate) > 0)
        w_r = float(len(reasoning) > 0)
    return w_b * L_b + w_r * L_r, w_b, w_r


def random_sample(n=23, seed=0):
    """(losses, is_reasoning), (n,) each."""
    g = torch.Generator().manual_seed(seed)
    losses = 4 * torch.rand(n, generator=g)
    return losses, torch.rand(n, generator=g) < 0.4


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("tau", [0.5, 2.0, 3.0, 5.0])
def test_rft_loss_matches_the_formula(tau, reduce):
    for seed in range(20):
        losses, is_reasoning = random_sample(seed=seed)
        expected, _, _ = formula(losses, is_reasoning, tau, reduce)
        loss = rft_loss(losses, is_reasoning, tau, reduce=reduce)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_default_tau_is_3_and_reduce_is_mean():
    losses, is_reasoning = random_sample()
    expected, _, _ = formula(losses, is_reasoning, 3.0, "mean")
    assert rft_loss(losses, is_reasoning).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_no_gradient_flows_through_the_weights(reduce):
    losses, is_reasoning = random_sample()
    losses.requires_grad_()
    rft_loss(losses, is_reasoning, 3.0, reduce=reduce).backward()
    _, w_b, w_r = formula(losses, is_reasoning, 3.0, reduce)
    if reduce == "mean":
        w_r /= int(is_reasoning.sum())
        w_b /= int((~is_reasoning).sum())
    expected = torch.where(is_reasoning, w_r, w_b).float()
    torch.testing.assert_close(losses.grad, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("group", [True, False])
def test_an_empty_group_has_weight_0(group):
    losses, _ = random_sample()
    losses.requires_grad_()
    loss = rft_loss(losses, torch.full((len(losses),), group))
    loss.backward()
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-6)
    torch.testing.assert_close(losses.grad, torch.full_like(losses, 1 / len(losses)))


def test_no_token_at_all_is_zero_with_zero_gradient():
    losses, is_reasoning = random_sample()
    losses.requires_grad_()
    loss = rft_loss(losses, is_reasoning, is_output=torch.zeros_like(is_reasoning))
    loss.backward()
    assert loss.item() == 0
    assert (losses.grad == 0).all()


def test_large_losses_do_not_overflow():
    losses = torch.tensor([1e4, 1e4, 2e4, 2e4], requires_grad=True)
    loss = rft_loss(losses, torch.tensor([False, False, True, True]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    torch.testing.assert_close(losses.grad, torch.tensor([0.0, 0.0, 0.5, 0.5]))


def test_a_large_tau_weighs_groups_equally_and_a_small_one_only_the_worse():
    L = torch.tensor([1.0, 2.0])
    n = torch.tensor([3, 4])
    torch.testing.assert_close(group_weights(L, n, 1e8), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(group_weights(L, n, 1e-4), torch.tensor([0.0, 1.0]))
    assert group_weights(L, n, 3.0)[1] > 0.5            # the group that is behind weighs more


def test_group_weights_sum_to_1_and_are_detached():
    L = (3 * torch.randn(2, 50)).requires_grad_()
    n = torch.randint(0, 3, (2, 50))
    w = group_weights(L, n)
    assert not w.requires_grad
    torch.testing.assert_close(w.sum(0), (n.sum(0) > 0).float())
    assert (w[n == 0] == 0).all()


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_each_row_of_a_batch_is_a_sample_of_its_own(reduce):
    samples = [random_sample(seed=seed) for seed in range(4)]
    losses = torch.stack([losses for losses, _ in samples])                         # (4, N)
    is_reasoning = torch.stack([is_reasoning for _, is_reasoning in samples])
    is_output = torch.rand(losses.shape) < 0.7
    is_reasoning[1] = True
    is_output[2] = False
    together = rft_loss(losses, is_reasoning, 2.0, reduce=reduce, is_output=is_output)
    for b, output in enumerate(is_output):
        expected, _, _ = formula(losses[b][output], is_reasoning[b][output], 2.0, reduce)
        assert together[b].item() == pytest.approx(expected, rel=1e-5)


def test_group_losses_are_means_or_sums_of_output_tokens():
    losses = torch.tensor([1.0, 2.0, 3.0, 9.0])
    is_reasoning = torch.tensor([False, True, True, True])
    is_output = torch.tensor([True, True, True, False])
    L, n = group_losses(losses, is_reasoning, is_output)
    assert L.tolist() == [1.0, 2.5]
    assert n.tolist() == [1, 2]
    L, _ = group_losses(losses, is_reasoning, is_output, "sum")
    assert L.tolist() == [1.0, 5.0]
