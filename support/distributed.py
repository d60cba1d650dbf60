"""Many processes: every rank works on its share of a batch, and sums over ranks make it one batch.

A rank holds the whole model, or, of a sharded one (FSDP2), a block of rows of every parameter, its gradient and its optimizer state.
"""
import atexit
import ctypes
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from support.cli import DataError


def init_distributed() -> torch.device:
    """Set this process up, torch.distributed too where torchrun started it; returns its device."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def keep_memory() -> None:
    """On Linux's CPUs: take memory in large pages, and keep what is freed. The kernel hands out new pages zeroed and one by one,
    7 % of the time of a run's first steps. It is for the whole process: call it before the first tensor is made."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # torch reads it when it first allocates
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):                            # glibc
        libc.mallopt(-1, -1)                                # M_TRIM_THRESHOLD: never give the top of the heap back
        libc.mallopt(-4, 0)                                 # M_MMAP_MAX: no mappings of their own for large tensors


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over all ranks, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def shard(model: Transformer, device) -> Transformer:
    """Split every parameter by rows over all ranks, in place; a block's are whole only while it computes. Nothing on one rank.

    A forward and a backward gather parameters, so all ranks must run the same number of them: one with nothing left to do runs
    a batch whose targets are all -100. The root's own parameters (embedding, last norm, head) stay whole from the start
    of forward to the end of backward. On CUDA they are gathered in bf16, so that autocast has nothing to cast; gradients are
    reduced in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh      # imported here: they take a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    device = torch.device(device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise CheckpointError(f"torch {torch.__version__} cannot shard a model on CPUs; use a newer one, or --shard no.")
        bf16 = device.type == "cuda"
        options = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
                   "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32,
                                                     cast_forward_inputs=False)}        # cos and sin stay float32
        for block in model.model.layers:
            fully_shard(block, **options)
        fully_shard(model, **options)
    return model


def compile_blocks(model: Transformer) -> None:
    """torch.compile what a block computes. What surrounds it, gathering and recompute, stays outside: call it before
    or after shard. The first step takes a minute more; one graph serves all blocks and lengths."""
    for block in model.model.layers:
        block.compute = torch.compile(block.compute, dynamic=True)


def wants_shards(choice: str, device: torch.device) -> bool:
    """Is a model to be sharded? choice: "yes", "no", or "auto", which shards over several GPUs."""
    return dist.is_initialized() and dist.get_world_size() > 1 and (choice == "yes" or choice == "auto" and device.type == "cuda")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Is it a DTensor, as the parameters and gradients of a sharded model are?"""
    return hasattr(tensor, "full_tensor")


BUCKET = 16 * 2**20         # gradients of one message, in numbers


@torch.no_grad()
def sum_gradients(model: nn.Module) -> None:
    """The gradients of the global batch: each rank's share summed. A rank with nothing to score takes part with zeros."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    grads, (_, world) = [p.grad for p in model.parameters()], rank_and_world()
    if is_sharded(grads[0]):
        for grad in grads:
            grad.mul_(world)                        # backward has reduced them already, to FSDP's mean over ranks
    elif world > 1:
        while grads:                                # a message for many small gradients
            bucket, size = [], 0
            while grads and (not bucket or size + grads[0].numel() <= BUCKET):
                bucket.append(grads.pop(0))
                size += bucket[-1].numel()
            flat = torch.cat([grad.flatten() for grad in bucket])
            dist.all_reduce(flat)
            for grad, summed in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                grad.copy_(summed.view_as(grad))


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Scale the gradients down to a global norm of `largest` if it is above; returns the norm before."""
    return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), largest)).item()


def mixed_precision(device: torch.device):
    """bf16 matrix products on CUDA, float32 on CPUs (where bf16 is slower). Losses stay float32, and so do the weights that the
    optimizer sees, sharded or not."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
