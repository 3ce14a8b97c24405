"""FSDP2 under torchrun, saved and resumed through torch.distributed.checkpoint.

On a CPU or on GPUs: ``torchrun --nproc-per-node 2 examples/fsdp2_torchrun.py``.
"""

import argparse

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import wellcond


def network() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(16, 32), blocks, nn.Linear(32, 16), nn.LogSoftmax(-1))


def batch(step: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw sequences to be read backwards; every rank has its own."""
    tokens = torch.randint(16, (16, 8), generator=torch.Generator().manual_seed(1000 * step + rank)).to(device)
    return tokens, tokens.flip(1)


def main(steps: int = 100, folder: str | None = None, resume: bool = False) -> None:
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= dist.get_world_size()
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    model = network().to(device)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model[1].layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # The line that wellcond adds: feature whitening over your own optimizer, whose statistics the ranks share.
    wellcond.attach(optimizer, model, wellcond.FeatureWhitening(stats_every=5, solve_every=20))

    done = torch.zeros((), dtype=torch.int64)
    if resume:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load({**states, "done": done}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    for step in range(int(done), steps):
        inputs, targets = batch(step, rank, device)
        loss = F.nll_loss(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if folder is not None:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save({**states, "done": torch.tensor(steps)}, checkpoint_id=folder)
    if rank == 0:
        print(f"after {steps} steps on {dist.get_world_size()} × {device.type}: loss {loss.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder")
    parser.add_argument("--resume", action="store_true")
    if not dist.is_torchelastic_launched():
        parser.error("start it with torchrun --nproc-per-node 2 examples/fsdp2_torchrun.py")
    dist.init_process_group()
    main(**vars(parser.parse_args()))
    dist.destroy_process_group()
