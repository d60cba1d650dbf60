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


def group_weights(L, n, tau=3.0, detach=True):
    """(w_b, w_r), (2, ...) float32, from group losses L and token counts n, (2, ...) each.

    softmax(L / tau), the maximum subtracted first. A group with no token has weight 0 and the other
    1. No gradient flows through. With detach=False it does, and a group's loss is pushed down the
    harder the further it is behind: d L_RFT / d L_g = w_g (1 + (L_g - L_RFT) / tau), not w_g.
    """
    L = L.detach() if detach else L
    x = (L.float() / tau).masked_fill(n == 0, float("-inf"))
    neither = n.sum(0) == 0                                                         # (...)
    return torch.softmax(x, dim=0).masked_fill(neither, 0.0)    # 0 / 0 where neither has a token


def rft_loss(losses, is_reasoning, tau=3.0, *, reduce="mean", is_output=None, detach=True):
    """L_RFT = w_b L_b + w_r L_r of one sample, or of one batch.

    losses: (..., N) float32, in nats. is_reasoning: (..., N) bool. tau: temperature, in nats, above
    0; the paper sweeps 1/tau over [0.2, 0.5] and finds it flat. reduce: L_b and L_r are the groups'
    "mean" losses, or their "sum" as the formula literally says: sums of tens of nats saturate the
    softmax, so that w_r is 0 or 1. is_output: (..., N) bool; where given, only these tokens count.
    detach: see group_weights. Returns (...): a scalar for one sample (N,), one loss per sample for
    a batch (B, N).
    """
    L, n = group_losses(losses, is_reasoning, is_output, reduce)
    return (group_weights(L, n, tau, detach) * L).sum(0)


# --------------------------------------------------------------------------------------------------
# The methods of train.py: the paper's, and those that it compares with (its table 1). Each gives
# this micro-batch's share of the loss of a global batch: summed over all micro-batches and ranks it
# is the loss, however the batch was cut.
#
#     losses (B, T)       in nats
#     labels (B, T)       what the method's labels say of each token; see METHODS
#     is_output (B, T)    which tokens count
#     options             train.py's: tau, alpha, scope, reduce, detach
#
# With the loss comes the share of the groups' weights, (w_b, w_r), as reported in metrics.jsonl.

@dataclass
class Totals:
    """What the share of one micro-batch must know of its global batch."""
    samples: int
    tokens: int                         # output tokens
    n: torch.Tensor | None = None       # (2,) tokens per group, for scope "batch"
    L: torch.Tensor | None = None       # (2,) group losses, for scope "batch" of `rft`
    weight: torch.Tensor | None = None  # () sum of the tokens' weights, for rho1 and rewardft


def sft(losses, labels, is_output, totals, options):
    """Plain supervised fine-tuning: L = mean of all losses. A group's weight is its share.

    Needs no labels; those it is given are only reported.
    """
    _, n = group_losses(losses.detach(), labels, is_output)                         # (2, B)
    return losses.sum() / totals.tokens, n.sum(-1) / totals.tokens      # losses: 0 off the output


def rft(losses, is_reasoning, is_output, totals, options):
    """SHAD + RFT: L_RFT = w_b L_b + w_r L_r, where whichever group is behind weighs more.

    Needs the labels of shad.py. Scope "sample": L_RFT of each sample, averaged over samples. Scope
    "batch": of the global batch, whose L train.py has summed over all micro-batches and ranks.
    """
    detach = options.detach == "yes"
    if options.scope == "sample":
        L, n = group_losses(losses, is_reasoning, is_output, options.reduce)        # (2, B)
        w = group_weights(L, n, options.tau, detach) / totals.samples               # (2, B)
        return (w * L).sum(), w.detach().sum(-1)                # sum of rft_loss(...) / samples
    share, reported = batch_shares(losses, is_reasoning, is_output, totals, options)
    # the whole batch's L, whose gradient is this share's: the shares of the gradient add up, too
    L = totals.L + share - share.detach()                                           # (2,)
    w = group_weights(L, totals.n, options.tau, detach)                             # (2,)
    through_w = (w * totals.L).sum()        # a gradient only where the weights are not detached
    loss = (w.detach() * share).sum() + through_w - through_w.detach()
    return loss, w.detach() * reported


def alpha(losses, is_reasoning, is_output, totals, options):
    """SHAD + alpha, the paper's ablation: L = (1 - alpha) L_b + alpha L_r, from first to last.

    Needs the labels of shad.py. Scopes as in `rft`. With labels by regular expressions it is the
    paper's Regex: format tokens are found by their looks and weighted less.
    """
    if options.scope == "sample":
        L, n = group_losses(losses, is_reasoning, is_output, options.reduce)        # (2, B)
        w = fixed_weights(n, options.alpha) / totals.samples                        # (2, B)
        return (w * L).sum(), w.sum(-1)
    share, reported = batch_shares(losses, is_reasoning, is_output, totals, options)
    w = fixed_weights(totals.n, options.alpha)                                      # (2,)
    return (w * share).sum(), w * reported


def fixed_weights(n, alpha=0.6):
    """(1 - alpha, alpha), (2, ...) float32: the weights of SHAD + alpha, whatever the losses are.

    n: (2, ...) token counts. A group with no token has weight 0 and the other 1.
    """
    w = torch.stack([torch.full_like(n[0], 1 - alpha, dtype=torch.float32),
                     torch.full_like(n[1], alpha, dtype=torch.float32)])            # (2, ...)
    w = w.masked_fill(n.flip(0) == 0, 1.0)      # the other group has no token
    return w.masked_fill(n == 0, 0.0)


def batch_shares(losses, is_reasoning, is_output, totals, options):
    """This micro-batch's share of the global batch's group losses, (2,), and of its tokens, ()."""
    L, n = group_losses(losses, is_reasoning, is_output, "sum")                     # (2, B)
    share = L.sum(-1)                                                               # (2,)
    if options.reduce == "mean":
        share = share / totals.n.clamp(min=1)       # by the whole batch's counts: shares add up
    return share, n.sum() / totals.tokens


def rho1(losses, selected, is_output, totals, options):
    """Rho-1, selective language modeling (Lin et al., arXiv 2404.07965): L = mean of the selected.

    Selected are the output tokens of the global batch with the largest excess loss, loss - loss of
    a reference model: see selection_threshold. Needs the reference model's losses, from which
    train.py computes `selected`.
    """
    loss = torch.where(selected & is_output, losses, 0.0).sum() / totals.weight
    return loss, losses.new_zeros(2)


def selection_threshold(excess, keep_share):
    """The smallest of the largest `keep_share` of all excess losses; excess: (N,), N > 0."""
    k = max(1, round(keep_share * len(excess)))
    return excess.topk(k).values[-1]


def rewardft(losses, rewards, is_output, totals, options):
    """RewardFT: L = sum of w loss / sum of w over the global batch, w = reward_weights(rewards).

    Needs token rewards, r = log pi_dpo - log pi_ref (Rafailov et al., arXiv 2404.12358).
    """
    w = torch.where(is_output, reward_weights(rewards), 0.0)                        # (B, T)
    return (w * losses).sum() / totals.weight, losses.new_zeros(2)


def reward_weights(rewards):
    """The weight of each token by its reward: sigmoid(r), between 0 and 1, a half for r = 0.

    A reward can be negative, and a negative weight would push a loss up without bound. How the
    paper turns rewards into weights is not known here; the sigmoid is this file's choice.
    """
    return rewards.float().sigmoid()


# name: (loss, the kind of labels that it needs)
METHODS = {
    "sft": (sft, None),
    "regex": (alpha, "regex"),          # True for what no regular expression calls format
    "rho1": (rho1, "reference"),        # losses of a reference model
    "rewardft": (rewardft, "reward"),   # rewards of a model tuned by DPO
    "alpha": (alpha, "shad"),           # SHAD's labels: True for reasoning tokens
    "regex+rft": (rft, "regex"),
    "rft": (rft, "shad"),
}
