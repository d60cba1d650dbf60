"""Reasoning-highlighted Fine-Tuning (RFT): token losses weighted by group. Needs torch alone.

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
# The methods of train.py. Each gives this micro-batch's share of the loss of a global batch: summed
# over all micro-batches and ranks it is the loss, however the batch was cut. With the loss comes
# the share of the groups' weights, (w_b, w_r), as reported in metrics.jsonl.

@dataclass
class Totals:
    """What the share of one micro-batch must know of its global batch."""
    samples: int
    tokens: int                         # output tokens
    L: torch.Tensor | None = None       # (2,) group losses, for scope "batch" only
    n: torch.Tensor | None = None       # (2,) tokens per group, likewise


def sft(losses, is_reasoning, is_output, totals, options):
    """Plain supervised fine-tuning: the mean loss of all output tokens.

    losses, is_reasoning, is_output: (B, T). A group's weight is its share of the tokens.
    """
    _, n = group_losses(losses.detach(), is_reasoning, is_output)                   # (2, B)
    return losses.sum() / totals.tokens, n.sum(-1) / totals.tokens


def rft(losses, is_reasoning, is_output, totals, options):
    """SHAD + RFT: L_RFT = w_b L_b + w_r L_r.

    Scope "sample": the L_RFT of each sample, averaged over samples. Scope "batch": one L_RFT of the
    global batch, whose weights come from its group losses; train.py has summed them over all
    micro-batches and ranks beforehand.
    """
    if options.scope == "sample":
        L, n = group_losses(losses, is_reasoning, is_output, options.reduce)        # (2, B)
        w = group_weights(L, n, options.tau) / totals.samples                       # (2, B)
        return (w * L).sum(), w.sum(-1)                         # sum of rft_loss(...) / samples
    L, n = group_losses(losses, is_reasoning, is_output, "sum")                     # (2, B)
    w = group_weights(totals.L, totals.n, options.tau)                              # (2,)
    share = L.sum(-1)                                                               # (2,)
    if options.reduce == "mean":
        share = share / totals.n.clamp(min=1)       # by the whole batch's counts: shares add up
    return (w * share).sum(), w * n.sum() / totals.tokens       # the reported parts add up to w


METHODS = {"sft": sft, "rft": rft}
