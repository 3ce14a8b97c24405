"""Runs the examples for several processes under torchrun, and says what came out: ``run_on_ranks.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ == "__main__":
    examples, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(examples))
    import fsdp2_torchrun
    import lightning_digits

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    fsdp2_torchrun.main(14, str(folder / "whole"))
    fsdp2_torchrun.main(8, str(folder / "stopped"))
    fsdp2_torchrun.main(14, str(folder / "stopped"), resume=True)
    whole = lightning_digits.main(2, str(folder / "lightning"))
    lightning_digits.main(1, str(folder / "lightning-stopped"))
    dist.barrier()  # The first rank writes.
    (stopped,) = folder.glob("lightning-stopped/checkpoints/*.ckpt")
    resumed = lightning_digits.main(2, str(folder / "lightning-resumed"), resume=str(stopped))
    states = {"whole": whole.state_dict(), "resumed": resumed.state_dict()}
    torch.save(states, folder / f"lightning{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
