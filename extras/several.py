"""Training on several GPUs: one process for each, started by torchrun.

    torchrun --nproc-per-node 8 -m extras.several --ckpt llama-2-13b --mode channel
    torchrun --nproc-per-node 8 -m extras.several --ckpt llama-70b --shard --offload

The flags are `seal.py train`'s, and two more:

    --batch N   records of a step, shared out (default: one for each process)
    --shard     each process holds only its part of the blocks' weights (torch's FSDP2)

The paper trains on one GPU, a prompt a step (appendix A). Here a step is the mean over a
batch of records, so as many records make fewer steps: think of --epochs. A record, which
may be asked several --questions, is read by one process. Each takes its share of the
batch, gradients are summed, and all make the same step. Only the first process writes and
speaks.

With --shard a block's weights are gathered when it is needed and dropped after it, on
the way forward and on the way back. Gathering does not run ahead: it is small beside the
work, as a block serves thousands of tokens at once. Scales, norms, biases, the embedding
and the output matrix are whole everywhere.

Two processes on a CPU (gloo), whole or sharded, learn what one learns with the same
batch: the largest difference of a scale was 0.0 (the toy, 7 records, --batch 4). Several
GPUs have not been tried.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import seal
from seal import UserError

plain_train = seal.train

# --------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------


def own_share(batch: list) -> list[tuple]:
    """The records of a batch that this process computes, with their weights in the mean.

    All take equally many, as a sharded model needs every process in every pass: one
    that has none left repeats another's, with weight 0.
    """
    rank, ranks, n = dist.get_rank(), dist.get_world_size(), len(batch)
    share = []
    for i in range(rank, rank + n + -n % ranks, ranks):
        share.append((batch[i % n], 1 / n if i < n else 0.0))
    return share


def sum_over_processes(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum, in one message."""
    total = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(total)
    for t, part in zip(tensors, total.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))


def backward(model, batch: list) -> torch.Tensor:
    """seal.backward for a batch of records: its mean loss, its gradient in all processes."""
    scales = model.scales()
    loss = scales[0].new_zeros(())
    for record, weight in own_share(batch):
        part = weight * seal.answer_loss(model, record)
        part.backward()
        loss += part.detach()
    sum_over_processes([loss, *(scale.grad for scale in scales)])
    return loss


def train(model, records, lr, epochs, pull, saved, after_step, batch=1):
    """seal.train, a batch of records for each of its steps; the first process stores them."""
    done = 0
    if saved:
        done = len(saved["losses"])
        before = saved["optimizer"]["param_groups"][0].get("batch", 1)
        if before != batch:
            raise UserError(f"--resume: the run began with --batch {before}, not {batch}")
    steps = [None] * dist.get_world_size()
    dist.all_gather_object(steps, done)
    if len(set(steps)) > 1:
        raise UserError("--resume: the processes find different states; share the disk")

    def store(losses, optimizer):
        if dist.get_rank() == 0:
            optimizer.param_groups[0]["batch"] = batch  # what --resume is to find again
            after_step(losses, optimizer)

    batches = [records[i : i + batch] for i in range(0, len(records), batch)]
    losses = plain_train(model, batches, lr, epochs, pull, saved, store)
    dist.barrier()  # what the first one writes is there when the others go on
    return losses


# --------------------------------------------------------------------------------------
# Sharding: the blocks' matrices are DTensors, of which each process has some rows
# --------------------------------------------------------------------------------------


class ShardedLlama(seal.Llama):
    """Blocks that gather their weights when they are called (by FSDP2's hooks)."""

    mesh = None

    def load_state_dict(self, state, assign=False):
        from torch.distributed.fsdp import fully_shard  # slow to import
        from torch.distributed.tensor import DTensor

        # Weights are whole, too, where only their names and shapes are looked at.
        if any(isinstance(tensor, DTensor) for tensor in state.values()):
            for block in self.layers:
                small = {p for p in block.parameters() if p.ndim < 2}
                fully_shard(block, mesh=self.mesh, ignored_params=small,
                            reshard_after_forward=True)
        return super().load_state_dict(state, assign=assign)


class ShardedWeights(seal.Weights):
    """The checkpoint's tensors, each cut to this process's part as soon as it is read."""

    def __getitem__(self, name: str) -> torch.Tensor:
        from torch.distributed.tensor import Shard, distribute_tensor

        tensor = super().__getitem__(name)
        if name.startswith("layers.") and tensor.ndim == 2:
            # Every process reads the file: none has to send a part to another.
            mesh, rows = ShardedLlama.mesh, [Shard(0)]
            tensor = distribute_tensor(tensor, mesh, rows, src_data_rank=None)
        return tensor


# --------------------------------------------------------------------------------------
# The processes
# --------------------------------------------------------------------------------------


def join():
    """Meet the others; returns the small store that all of them share."""
    if not dist.is_torchelastic_launched():
        raise UserError("is started by torchrun --nproc-per-node N -m extras.several ...")
    backend, gpus, here = "gloo", torch.cuda.device_count(), os.environ["LOCAL_WORLD_SIZE"]
    if gpus:
        if int(here) > gpus:
            raise UserError(f"--nproc-per-node {here}: there are {gpus} GPUs")
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, ranks = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    return store


def main(arguments=None) -> None:
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")  # the first speaks for all
    parser = seal.Parser(
        prog="extras.several", allow_abbrev=False, epilog="and all of seal.py train's",
        description=__doc__.splitlines()[0],
    )
    parser.add_flags("ckpt")
    parser.add_argument("--batch", type=int, help="records a step (default: one each)")
    parser.add_argument("--shard", action="store_true", help="weights in parts")
    args, rest = parser.parse_known_args(arguments)
    store = join()
    batch = dist.get_world_size() if args.batch is None else args.batch
    if batch < 1:
        raise UserError(f"--batch {batch}: must be 1 or more")
    if args.shard and Path(args.ckpt).is_file():
        raise UserError(f"--shard: {args.ckpt} must be a folder (python -m extras.convert)")
    seal.train, seal.backward = partial(train, batch=batch), backward
    if args.shard:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        ShardedLlama.mesh = dist.init_device_mesh(kind, (dist.get_world_size(),))
        seal.Llama, seal.Weights = ShardedLlama, ShardedWeights
    try:
        seal.main(["train", "--ckpt", args.ckpt, *rest])
    except BaseException:
        if store.add("failed", 1) > 1:
            sys.exit(2)  # another failed before this one, and has said why
        sys.stderr = sys.__stderr__
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.several", main))
