"""Reasoning-highlighted Fine-Tuning (RFT): token losses weighted by group. Needs torch alone.

Ye et al., "Disentangling Reasoning Tokens and Boilerplate Tokens For Language Model Fine-tuning" (arXiv 2412.14780):

    w_b = exp(L_b / tau) / (exp(L_b / tau) + exp(L_r / tau)),    w_r = 1 - w_b,    L_RFT = w_b L_b + w_r L_r

L_b and L_r are the losses of the boilerplate and of the reasoning tokens. Whichever group is behind gets the larger
weight; as boilerplate is learned within a few steps, that is soon the reasoning tokens. The weights carry no gradient.
"""
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
    L = torch.where(groups, losses, 0.0).sum(-1)
    return (L if reduce == "sum" else L / n.clamp(min=1)), n


def group_weights(L, n, tau=3.0):
    """(w_b, w_r), (2, ...) float32, from group losses L and token counts n, (2, ...) each. No gradient flows through.

    softmax(L / tau), the maximum subtracted first. A group with no token has weight 0 and the other 1.
    """
    x = (L.detach().float() / tau).masked_fill(n == 0, float("-inf"))
    return torch.softmax(x, dim=0).masked_fill(n.sum(0) == 0, 0.0)                  # 0 / 0 where neither has a token


def rft_loss(losses, is_reasoning, tau=3.0, *, reduce="mean", is_output=None):
    """L_RFT = w_b L_b + w_r L_r of one sample, or of one batch.

    losses: (..., N) float32, in nats. is_reasoning: (..., N) bool. tau: temperature, in nats, above 0; the paper sweeps 1/tau
    over [0.2, 0.5] and finds it flat. reduce: L_b and L_r are the groups' "mean" losses, or their "sum" as the formula literally
    says: sums of tens of nats saturate the softmax, so that w_r is 0 or 1. is_output: (..., N) bool, where given only these count.
    Returns (...): a scalar of one sample (N,), one loss a sample of a batch (B, N).
    """
    L, n = group_losses(losses, is_reasoning, is_output, reduce)
    return (group_weights(L, n, tau) * L).sum(0)


# -----------------------------------------------------------------------------------------------------------------
# The methods of train.py. Each gives this micro-batch's share of the loss of a global batch: summed over all micro-batches
# and ranks it is the loss, however the batch was cut. `batch` holds what a share needs to know of the whole:
#     batch.samples, batch.tokens      how many samples and output tokens
#     batch.L, batch.n                 group losses and counts (2,), only for scope "batch"
# With the loss comes the share of the groups' weights, (w_b, w_r), as reported in metrics.jsonl.
# A further method is a further function here; it may use is_reasoning from any labels, SHAD's or others'.

def sft(losses, is_reasoning, is_output, batch, options):
    """Plain supervised fine-tuning: the mean loss of all output tokens. A group's weight is its share of the tokens."""
    _, n = group_losses(losses.detach(), is_reasoning, is_output)
    return losses.sum() / batch.tokens, n.sum(-1) / batch.tokens


def rft(losses, is_reasoning, is_output, batch, options):
    """SHAD + RFT. Scope "sample": L_RFT of each sample, averaged over samples. Scope "batch": one L_RFT of the global batch,
    whose weights come from its group losses, which train.py has summed over all micro-batches and ranks beforehand."""
    if options.scope == "sample":
        L, n = group_losses(losses, is_reasoning, is_output, options.reduce)                # (2, B)
        w = group_weights(L, n, options.tau) / batch.samples
        return (w * L).sum(), w.sum(-1)
    L, n = group_losses(losses, is_reasoning, is_output, "sum")
    w = group_weights(batch.L, batch.n, options.tau)                                        # (2,)
    # this micro-batch's part of batch.L: divided by the counts of the whole, the parts add up
    share = L.sum(-1) if options.reduce == "sum" else L.sum(-1) / batch.n.clamp(min=1)
    return (w * share).sum(), w * n.sum() / batch.tokens                                    # reported: parts that add up to w


METHODS = {"sft": sft, "rft": rft}
