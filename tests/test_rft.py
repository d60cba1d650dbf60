"""rft_loss against the paper's formula, written out slowly in float64."""
import math

import pytest
import torch

from rft import group_losses, group_weights, rft_loss


def formula(losses, is_reasoning, tau=3.0, reduce="mean"):
    """(L_RFT, w_b, w_r): w_b = exp(L_b/tau) / (exp(L_b/tau) + exp(L_r/tau)), w_r = 1 - w_b, L = w_b L_b + w_r L_r."""
    losses = losses.tolist()
    b = [x for x, r in zip(losses, is_reasoning) if not r]
    r = [x for x, r in zip(losses, is_reasoning) if r]
    mean = lambda x: sum(x) / (len(x) if reduce == "mean" else 1)
    if not b or not r:
        return (mean(b or r), float(bool(b)), float(bool(r))) if b or r else (0.0, 0.0, 0.0)
    w_b = math.exp(mean(b) / tau) / (math.exp(mean(b) / tau) + math.exp(mean(r) / tau))
    return w_b * mean(b) + (1 - w_b) * mean(r), w_b, 1 - w_b


def some(n=23, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(n, generator=g), torch.rand(n, generator=g) < 0.4


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("tau", [0.5, 2.0, 3.0, 5.0])
def test_formula(tau, reduce):
    for seed in range(20):
        losses, is_reasoning = some(seed=seed)
        assert rft_loss(losses, is_reasoning, tau, reduce=reduce).item() == pytest.approx(formula(losses, is_reasoning, tau, reduce)[0], rel=1e-5)


def test_default_tau_is_3_and_reduce_is_mean():
    losses, is_reasoning = some()
    assert rft_loss(losses, is_reasoning).item() == pytest.approx(formula(losses, is_reasoning, 3.0, "mean")[0], rel=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_no_gradient_through_the_weights(reduce):
    losses, is_reasoning = some()
    losses.requires_grad_()
    rft_loss(losses, is_reasoning, 3.0, reduce=reduce).backward()
    _, w_b, w_r = formula(losses, is_reasoning, 3.0, reduce)
    n_r = int(is_reasoning.sum())
    n_b = len(losses) - n_r
    expected = torch.where(is_reasoning, w_r / (n_r if reduce == "mean" else 1), w_b / (n_b if reduce == "mean" else 1))
    torch.testing.assert_close(losses.grad, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("group", [True, False])
def test_an_empty_group_has_weight_0(group):
    losses = some()[0].requires_grad_()
    loss = rft_loss(losses, torch.full((len(losses),), group))
    loss.backward()
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-6)
    torch.testing.assert_close(losses.grad, torch.full_like(losses, 1 / len(losses)))


def test_no_token_at_all_is_zero_with_zero_gradient():
    losses, is_reasoning = some()
    losses.requires_grad_()
    loss = rft_loss(losses, is_reasoning, is_output=torch.zeros_like(is_reasoning))
    loss.backward()
    assert loss.item() == 0 and (losses.grad == 0).all()


def test_large_losses_do_not_overflow():
    losses = torch.tensor([1e4, 1e4, 2e4, 2e4], requires_grad=True)
    loss = rft_loss(losses, torch.tensor([False, False, True, True]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    torch.testing.assert_close(losses.grad, torch.tensor([0.0, 0.0, 0.5, 0.5]))


def test_tau_limits():
    L, n = torch.tensor([1.0, 2.0]), torch.tensor([3, 4])
    torch.testing.assert_close(group_weights(L, n, 1e8), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(group_weights(L, n, 1e-4), torch.tensor([0.0, 1.0]))
    assert group_weights(L, n, 3.0)[1] > 0.5                # the group that is behind weighs more


def test_group_weights_sum_to_1_and_are_detached():
    L, n = (3 * torch.randn(2, 50)).requires_grad_(), torch.randint(0, 3, (2, 50))
    w = group_weights(L, n)
    assert not w.requires_grad
    torch.testing.assert_close(w.sum(0), (n.sum(0) > 0).float())
    assert (w[n == 0] == 0).all()


def test_rows_of_a_batch_are_single_samples():
    losses = torch.stack([some(seed=s)[0] for s in range(4)])
    is_reasoning = torch.stack([some(seed=s)[1] for s in range(4)])
    is_output = torch.rand(losses.shape) < 0.7
    is_reasoning[1], is_output[2] = True, False
    for reduce in ("mean", "sum"):
        together = rft_loss(losses, is_reasoning, 2.0, reduce=reduce, is_output=is_output)
        for b in range(4):
            keep = is_output[b]
            assert together[b].item() == pytest.approx(formula(losses[b][keep], is_reasoning[b][keep], 2.0, reduce)[0], rel=1e-5)


def test_group_losses():
    losses, is_reasoning = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([False, True, True, True])
    is_output = torch.tensor([True, True, True, False])
    L, n = group_losses(losses, is_reasoning, is_output)
    assert L.tolist() == [1.0, 2.5] and n.tolist() == [1, 2]
    assert group_losses(losses, is_reasoning, is_output, "sum")[0].tolist() == [1.0, 5.0]
