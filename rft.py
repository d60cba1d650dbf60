"""Reasoning-highlighted Fine-Tuning (RFT) and its baselines: weighted token losses. Needs torch
alone.

Ye et al., "Disentangling Reasoning Tokens and Boilerplate Tokens For Language Model Fine-tuning"
(arXiv 2412.14780):

    w_b = exp(L_b / tau) / (exp(L_b / tau) + exp(L_r / tau)),    w_r = 1 - w_b

    L_RFT = w_b L_b + w_r L_r

L_b and L_r are the losses of the boilerplate and of the reasoning tokens. Whichever group is behind
gets the larger weight; as boilerplate is learned within a few steps, that is soon the reasoning
tokens. The weights carry no gradient.
"""
from dataclasses import dataclass

import torch


def group_losses(losses, is_reasoning, is_output=None, reduce="mean"):
    """Loss and number of the boilerplate and of the reasoning tokens, over the last dimension.

    losses (..., N) float32; is_reasoning, is_output (..., N) bool, is_output=None meaning all.
    Returns L, n: (2, ...) each, boilerplate first. An empty group has L = 0.
    """
    if is_output is None:
        is_output = torch.ones_like(is_reasoning)
    groups = torch.stack([is_output & ~is_reasoning, is_output & is_reasoning])     # (2, ..., N)
    n = groups.sum(-1)                                                              # (2, ...)
    L = torch.where(groups, losses, 0.0).sum(-1)                                    # (2, ...)
    return (L if reduce == "sum" else L / n.clamp(min=1)), n


def group_weights(L, n, tau=3.0):
    """(w_b, w_r), (2, ...) float32, from group losses L and token counts n, (2, ...) each.

    softmax(L / tau), the maximum subtracted first. No gradient flows through. A group with no token
    has weight 0 and the other 1.
    """
    x = (L.detach().float() / tau).masked_fill(n == 0, float("-inf"))
    neither = n.sum(0) == 0                                                         # (...)
    return torch.softmax(x, dim=0).masked_fill(neither, 0.0)    # 0 / 0 where neither has a token


def fixed_weights(n, alpha=0.6):
    """(1 - alpha, alpha), (2, ...) float32: SHAD + alpha's weights, whatever the losses are.

    n: (2, ...) token counts. A group with no token has weight 0 and the other 1.
    """
    w = torch.stack([torch.full_like(n[0], 1 - alpha, dtype=torch.float32),
                     torch.full_like(n[1], alpha, dtype=torch.float32)]) * (n > 0)  # (2, ...)
    return w / w.sum(0).clamp(min=1e-30)


def rft_loss(losses, is_reasoning, tau=3.0, *, reduce="mean", is_output=None):
    """L_RFT = w_b L_b + w_r L_r of one sample, or of one batch.

    losses: (..., N) float32, in nats. is_reasoning: (..., N) bool. tau: temperature, in nats, above
    0; the paper sweeps 1/tau over [0.2, 0.5] and finds it flat. reduce: L_b and L_r are the groups'
    "mean" losses, or their "sum" as the formula literally says: sums of tens of nats saturate the
    softmax, so that w_r is 0 or 1. is_output: (..., N) bool; where given, only these tokens count.
    Returns (...): a scalar for one sample (N,), one loss per sample for a batch (B, N).
    """
    L, n = group_losses(losses, is_reasoning, is_output, reduce)
    return (group_weights(L, n, tau) * L).sum(0)


# --------------------------------------------------------------------------------------------------
# The methods of train.py: the paper's, and those that it compares with (its table 1). Each gives
# this micro-batch's share of the loss of a global batch: summed over all micro-batches and ranks it
# is the loss, however the batch was cut.
#
#     losses (B, T)       in nats
#     labels (B, T)       what the method's labels say of each token; see METHODS
#     is_output (B, T)    which tokens count
#
# With the loss comes the share of the groups' weights, (w_b, w_r), as reported in metrics.jsonl.

@dataclass
class Totals:
    """What the share of one micro-batch must know of its global batch."""
    samples: int
    tokens: int                         # output tokens
    L: torch.Tensor | None = None       # (2,) group losses, for scope "batch" only
    n: torch.Tensor | None = None       # (2,) tokens per group, likewise
    weight: torch.Tensor | None = None  # () sum of the tokens' weights, for rho1 and rewardft


def sft(losses, labels, is_output, totals, options):
    """Plain supervised fine-tuning: L = mean of all losses. A group's weight is its share."""
    _, n = group_losses(losses.detach(), labels, is_output)                         # (2, B)
    return losses.sum() / totals.tokens, n.sum(-1) / totals.tokens


def rft(losses, labels, is_output, totals, options):
    """SHAD + RFT: L_RFT = w_b L_b + w_r L_r, where whichever group is behind weighs more."""
    def weights(L, n):
        return group_weights(L, n, options.tau)

    return two_groups(losses, labels, is_output, totals, options, weights)


def alpha(losses, labels, is_output, totals, options):
    """SHAD + alpha, the paper's ablation: L = (1 - alpha) L_b + alpha L_r, from first to last."""
    def weights(L, n):
        return fixed_weights(n, options.alpha)

    return two_groups(losses, labels, is_output, totals, options, weights)


def two_groups(losses, is_reasoning, is_output, totals, options, weights):
    """L = w_b L_b + w_r L_r with (w_b, w_r) = weights(L, n).

    Scope "sample": of each sample, averaged over samples. Scope "batch": of the global batch, whose
    group losses train.py has summed over all micro-batches and ranks beforehand.
    """
    if options.scope == "sample":
        L, n = group_losses(losses, is_reasoning, is_output, options.reduce)        # (2, B)
        w = weights(L, n) / totals.samples                                          # (2, B)
        return (w * L).sum(), w.sum(-1)                         # sum of rft_loss(...) / samples
    L, n = group_losses(losses, is_reasoning, is_output, "sum")                     # (2, B)
    w = weights(totals.L, totals.n)                                                 # (2,)
    share = L.sum(-1)                                                               # (2,)
    if options.reduce == "mean":
        share = share / totals.n.clamp(min=1)       # by the whole batch's counts: shares add up
    return (w * share).sum(), w * n.sum() / totals.tokens       # the reported parts add up to w


def rho1(losses, selected, is_output, totals, options):
    """Rho-1's selective language modeling (arXiv 2404.07965): L = mean loss of selected tokens.

    Selected is that share of the global batch's output tokens which has the largest excess loss,
    loss - loss of a reference model; see selection_threshold. All weight is theirs.
    """
    share = torch.where(selected & is_output, losses, 0.0).sum() / totals.weight
    w_r = (selected & is_output).sum() / totals.weight
    return share, torch.stack([torch.zeros_like(w_r), w_r])


def selection_threshold(excess, keep_share):
    """The smallest of the largest `keep_share` of all excess losses; excess: (N,), N > 0."""
    k = max(1, round(keep_share * len(excess)))
    return excess.topk(k).values[-1]


def rewardft(losses, rewards, is_output, totals, options):
    """RewardFT: L = sum of w loss / sum of w over the global batch, w = reward_weights(rewards)."""
    w = torch.where(is_output, reward_weights(rewards), 0.0)                        # (B, T)
    return (w * losses).sum() / totals.weight, losses.new_zeros(2)


def reward_weights(rewards):
    """A token's weight by its reward, r = log pi_dpo - log pi_ref (Rafailov et al. 2404.12358).

    The paper uses such rewards as weights and says no more. A reward can be negative, and a
    negative weight would push the loss up without bound; sigmoid(r), between 0 and 1 and a half
    for r = 0, is this file's reading.
    """
    return rewards.float().sigmoid()


# name: (loss, what its labels are)
METHODS = {
    "sft": (sft, None),
    "regex": (alpha, "regex"),          # format tokens by regular expressions, weighted less
    "rho1": (rho1, "reference"),        # losses of a reference model
    "rewardft": (rewardft, "reward"),   # rewards of a model tuned by DPO
    "alpha": (alpha, "shad"),           # SHAD's labels: True for reasoning tokens
    "regex+rft": (rft, "regex"),
    "rft": (rft, "shad"),
}
