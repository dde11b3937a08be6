"""The curvature in every process of a launcher; the first leaves what it found.

torchrun --nproc_per_node 2 curvature_processes.py FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from test_fisher_models import make_batch, resnet, select, t5

from hf_fip.curvature import loss_landscape, measure_curvature
from hf_fip.processes import share, sum_over_processes

MODELS = {"resnet": resnet, "t5": t5}


def main() -> dict:
    """All figures of each model, on batches of different sizes and, in `t5`, of different numbers of tokens."""
    found = {}
    for name, make in MODELS.items():
        batch = make_batch(name, rows=7)
        batches = share([select(batch, slice(1)), select(batch, slice(1, 3)), select(batch, slice(3, 7))])
        model = make()
        curvature = measure_curvature(
            model, batches, top=2, probes=4, density_runs=1, density_steps=5, reduce=sum_over_processes
        )
        line = loss_landscape(model, {"clean": batches}, points=3, reduce=sum_over_processes)
        found[name] = {**curvature.to_dict(), **line.to_dict()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState(cpu=True)
    found = main()
    Path(f"{sys.argv[1]}-{PartialState().process_index}").write_text(json.dumps(found))
    PartialState().destroy_process_group()
