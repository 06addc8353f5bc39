"""One training step of a `ParallelMLP`, whose layers are cut over the ranks that torchrun starts.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Ranks talk through NCCL on GPUs and through Gloo on CPUs. Input and output are the same on every rank, and so is the
loss, whatever the number of ranks.
"""

import os

import fusemlp
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def main() -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    torch.manual_seed(0)  # Every rank draws the same weights and the same batch.
    net = fusemlp.ParallelMLP(64, [256], 10, mesh=mesh, device=device)
    x, target = torch.randn(128, 64, device=device), torch.randint(10, (128,), device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    before = fusemlp.functional.cross_entropy(net(x), target)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = fusemlp.functional.cross_entropy(net(x), target)
    if dist.get_rank() == 0:
        weight = net[0].weight  # A DTensor: `to_local` is this rank's part of it.
        whole, part = tuple(weight.shape), tuple(weight.to_local().shape)
        print(f"ranks: {dist.get_world_size()} ({dist.get_backend()}), each with {part} of weight {whole}")
        print(f"loss before the step {before.item():.4f}, after it {after.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
