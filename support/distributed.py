"""Many processes: each rank works on its share of a batch, and sums over ranks make it one batch.

A rank holds the whole model or, of a sharded one (FSDP2), a block of rows of every parameter, of
its gradient and of its optimizer state.
"""
import atexit
import os
import timeit

import torch
import torch.distributed as dist
from torch import nn

from support.cli import DataError


def init_distributed(dtype: str | None = None) -> torch.device:
    """Set this process up, torch.distributed too if torchrun started it; returns its device.

    dtype: the precision of matrix products, see use_dtype; rank 0 says which it is.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    world = os.environ.get("WORLD_SIZE", "1")
    if missing and (world != "1" or "RANK" in os.environ):
        there = [name for name in needed[:2] if name in os.environ]
        raise DataError(f"{' and '.join(there)} in the environment, but no {' or '.join(missing)}: "
                        "start several processes with torchrun, or unset them for a single one.")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world != "1":
        try:
            if int(os.environ["RANK"]) >= int(world):
                raise ValueError("a rank beyond the last")
            init_process_group(device)
        except (ValueError, RuntimeError) as e:
            settings = ", ".join(f"{name}={os.environ[name]}" for name in needed)
            raise DataError(f"the processes found no way to each other ({e}); "
                            f"the environment has {settings}.") from None
    if dtype:
        which = use_dtype(dtype, device)
        if rank_and_world()[0] == 0:
            print(which)
    return device


def init_process_group(device: torch.device, **where) -> None:
    """Start torch.distributed: gloo for tensors on the CPU, NCCL for those on GPUs."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **where)
    atexit.register(destroy_process_group)


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def on_rank_0(action, *arguments):
    """Call action(*arguments) on rank 0; all ranks return its result or raise its DataError."""
    result, failure = None, None
    if rank_and_world()[0] == 0:
        try:
            result = action(*arguments)
        except (DataError, OSError) as e:
            failure = str(e)
    shared = [result, failure]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    result, failure = shared
    if failure is not None:
        raise DataError(failure)
    return result


def sum_over_ranks(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over all ranks, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def should_shard(choice: str, device: torch.device, parameters: int = 0) -> bool:
    """Is a model to be sharded? choice: "yes", "no", or "auto".

    "auto" shards over several GPUs, and on a single one where a model of so many parameters would
    not fit whole: 18 bytes each, for float32 weights, gradients and AdamW's two moments, and the
    bf16 copies that autocast holds.
    """
    if choice != "auto" or device.type != "cuda":
        return choice == "yes"
    _, world = rank_and_world()
    memory = torch.cuda.get_device_properties(device).total_memory
    return world > 1 or 18 * parameters > 0.9 * memory


def shard_model(model: nn.Module, device, choice="yes", offload=False) -> torch.device | None:
    """Split every parameter of a Transformer by rows over all ranks, in place, if `choice` says so.

    A block's parameters are whole only while it computes; those of the root (embedding, last norm,
    head) from the start of forward to the end of backward. Both gather parameters, so all ranks
    must run the same number of them: one with nothing left to do runs a batch whose targets are
    all -100. Parameters are gathered in the precision of use_dtype, so that autocast has nothing to
    cast; gradients are reduced in float32. One rank has nothing to split, but its bf16 copies are
    as short-lived.

    offload: shard, and keep parameters, gradients and optimizer state on the CPU, which also takes
    the optimizer's steps. Returns where the parameters are to be made, if not on `device`.
    """
    device = torch.device(device)
    parameters = sum(p.numel() for p in model.parameters())
    if not offload and not should_shard(choice, device, parameters):
        return None
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise DataError(f"torch {torch.__version__} cannot shard a model on CPUs; "
                        "use a newer one, or --shard no.")
    if not dist.is_initialized():
        init_process_group(device, store=dist.HashStore(), rank=0, world_size=1)

    # imported here: they take a second
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    options = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if uses_bf16(device) else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False),     # cos and sin stay float32
        "offload_policy": OffloadPolicy(),
    }
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        model.compute_device = device
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return torch.device("cpu") if offload else None


def is_sharded(tensor: torch.Tensor) -> bool:
    """Is it a DTensor, as the parameters and gradients of a sharded model are?"""
    return hasattr(tensor, "full_tensor")


def compile_blocks(model: nn.Module) -> None:
    """torch.compile what each block computes; one graph serves all blocks and lengths.

    What surrounds it, gathering and recompute, stays outside: call it before or after shard_model.
    The first step takes a minute longer.
    """
    for block in model.model.layers:
        block.attend_and_mlp = torch.compile(block.attend_and_mlp, dynamic=True)


BUCKET_ELEMENTS = 16 * 2**20        # gradient elements per all_reduce


@torch.no_grad()
def all_reduce_gradients(model: nn.Module) -> None:
    """Sum each rank's share of the gradients, which makes them the global batch's.

    A rank with nothing to score takes part with zeros.
    """
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in model.parameters()]
    _, world = rank_and_world()
    if world == 1:
        return
    if is_sharded(grads[0]):
        for grad in grads:
            grad.mul_(world)            # backward has reduced them already, to FSDP's mean
        return
    while grads:                        # one message for many small gradients
        bucket = [grads.pop(0)]
        size = bucket[0].numel()
        while grads and size + grads[0].numel() <= BUCKET_ELEMENTS:
            bucket.append(grads.pop(0))
            size += bucket[-1].numel()
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat)
        for grad, summed in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(summed.view_as(grad))


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a global norm of `max_norm`; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if is_sharded(norm) else norm).item()


@torch.no_grad()
def not_finite(model: nn.Module, dtype=None) -> list[str]:
    """The names of the parameters with NaN, infinity, or a number too large for `dtype`.

    dtype: by default their own. All ranks must call this.
    """
    names = [name for name, _ in model.named_parameters()]
    bad = torch.zeros(len(names), device=model.device)
    for i, p in enumerate(model.parameters()):
        local = p.to_local() if is_sharded(p) else p
        if local.numel():
            low, high = local.aminmax()
            limit = torch.finfo(dtype or p.dtype).max
            bad[i] = ~((low >= -limit) & (high <= limit))
    sum_over_ranks(bad)
    return [names[int(i)] for i in bad.nonzero()]


SMALL_MODEL = 10_000_000        # parameters


def limit_threads(model: nn.Module) -> None:
    """Give a small model one CPU thread: several would only wait for each other.

    That costs nothing on an idle machine and much beside another busy process. OMP_NUM_THREADS,
    where it is set, decides instead.
    """
    small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


precision = None            # of matrix products, set once per process by use_dtype


def use_dtype(choice: str, device: torch.device) -> str:
    """Set the precision of matrix products: "auto", "float32" or "bfloat16". Returns which and why.

    "auto" is bfloat16 where the device multiplies it natively; elsewhere it is the slower of the
    two. All ranks get the same.
    """
    global precision
    native = choice == "bfloat16"
    reason = "--dtype"
    if choice == "auto":
        native, reason = multiplies_bf16(device)
    votes = torch.tensor(float(native), device=device)
    sum_over_ranks(votes)
    _, world = rank_and_world()
    precision = torch.bfloat16 if votes == world else torch.float32
    return f"matrix products in {str(precision).removeprefix('torch.')} ({reason})"


def multiplies_bf16(device: torch.device) -> tuple[bool, str]:
    """Does the device multiply bf16 natively? And how that was found out."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return torch.cuda.get_device_capability(device) >= (8, 0), name
    flags = set()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            flags = set(f.read().split())
    found = flags & {"avx512_bf16", "amx_bf16"}
    if found:
        return True, f"the CPU has {' and '.join(sorted(found))}"
    if "sse2" in flags:                                     # x86, which would have said so
        return False, "the CPU has neither avx512_bf16 nor amx_bf16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda a=a: a @ a, number=1, repeat=20))
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    return ratio > 1.2, f"a product in bfloat16 ran at {ratio:.1f} x float32's speed"


def uses_bf16(device: torch.device) -> bool:
    """Are matrix products in bfloat16? As use_dtype has set it; without it on CUDA only."""
    return device.type == "cuda" if precision is None else precision == torch.bfloat16


def mixed_precision(device: torch.device):
    """Matrix products in the precision of use_dtype.

    Losses stay float32, and so do the weights that the optimizer sees, sharded or not.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device))
