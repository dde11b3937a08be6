"""λ_max and Tr H of a ResNet-18 on 200 images of 32×32: hf_fip beside PyHessian and curvlinops, at the same tolerance.

    pip install pyhessian curvlinops-for-pytorch
    python benchmarks/curvature_cost.py [--device cuda] [--rounds 5] [--output results/curvature/cost]

λ_max to 1e-3 as each library defines it (hf_fip: bound of the error; PyHessian: change from one power iteration to the
next; ARPACK, for curvlinops: bound of the error). Tr H to a standard error of 5 %, with as many probes as that takes:
the variance of a probe is measured beforehand, once for plain Hutchinson (PyHessian, curvlinops) and once for hf_fip,
which reuses the space that λ_max was found in. PyHessian's rule ends while λ_max still grows: a second row of it takes
the loosest power of ten with which λ_max is within the tolerance in fact. One batch; a model trained for a few steps,
for it to have outliers. The libraries take turns, round by round; the ratio is to hf_fip in the same round, the median
over the rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from curvlinops import HessianLinearOperator, hutchinson_trace
from pyhessian import hessian as PyHessian
from scipy.sparse.linalg import eigsh
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_fip.curvature import Hessian, hessian_trace, top_eigenvalues
from hf_fip.hub.report import versions

TOLERANCE = 1e-3
CALIBRATION = 10  # probes by which their variance is known


class Logits(nn.Module):
    """The model as the two other libraries want it: images in, logits out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(pixel_values=pixels).logits


class Case:
    """One model and one batch, and how each library measures them: λ_max and Tr H of `probes` probes."""

    def __init__(self, device: str, images: int, steps: int):
        torch.manual_seed(0)
        config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10)
        self.model = ResNetForImageClassification(config).to(device)
        self.pixels = torch.randn(images, 3, 32, 32).to(device)
        self.labels = torch.randint(0, 10, (images,)).to(device)
        self.device = device
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            self.model(pixel_values=self.pixels, labels=self.labels).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        self.model.eval()

    def hessian(self) -> Hessian:
        return Hessian(self.model, [{"pixel_values": self.pixels, "labels": self.labels}])

    def hf_fip(self, probes: int) -> tuple[float, float, int]:
        hessian = self.hessian()
        largest = top_eigenvalues(hessian, tolerance=TOLERANCE)
        trace = hessian_trace(hessian, probes=probes, krylov=largest.krylov, seed=1)
        return largest.values[0], trace.value, hessian.products

    def pyhessian(self, probes: int, tolerance: float = TOLERANCE) -> tuple[float, float, None]:
        data, cuda = (self.pixels, self.labels), self.device == "cuda"
        found = PyHessian(Logits(self.model), nn.CrossEntropyLoss(), data=data, cuda=cuda)
        values, _ = found.eigenvalues(maxIter=1000, tol=tolerance)
        trace = statistics.fmean(found.trace(maxIter=probes, tol=0))
        self.model.zero_grad()
        return values[0], trace, None

    def pyhessian_exact(self, probes: int) -> tuple[float, float, None]:
        return self.pyhessian(probes, self.power_tolerance)

    @cached_property
    def power_tolerance(self) -> float:
        exact, tolerance = top_eigenvalues(self.hessian(), tolerance=TOLERANCE / 100).values[0], TOLERANCE
        while abs(self.pyhessian(1, tolerance)[0] - exact) > TOLERANCE * exact:
            tolerance /= 10
        return tolerance

    def curvlinops(self, probes: int) -> tuple[float, float, None]:
        model, data = Logits(self.model), [(self.pixels, self.labels)]
        parameters = list(model.parameters())
        operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
        largest = eigsh(operator.to_scipy(), k=1, which="LA", tol=TOLERANCE, return_eigenvectors=False)[0]
        return float(largest), hutchinson_trace(operator, probes).item(), None

    def probes(self, error: float) -> dict[str, int]:
        """How many probes a standard error of this share of Tr H takes."""
        hessian = self.hessian()
        krylov = top_eigenvalues(hessian, tolerance=TOLERANCE).krylov
        needed = {}
        for name, space in (("plain", None), ("hf_fip", krylov)):
            found = hessian_trace(hessian, probes=CALIBRATION, krylov=space, seed=1)
            spread = statistics.stdev(found.samples)
            needed[name] = max(2, math.ceil((spread / (error * abs(found.value))) ** 2))
        others = ("pyhessian", "pyhessian_exact", "curvlinops")
        return {"hf_fip": needed["hf_fip"]} | dict.fromkeys(others, needed["plain"])


def measure(case: Case, probes: dict[str, int], rounds: int) -> dict[str, dict]:
    """Seconds of each library, in turns."""
    runs = {name: [] for name in probes}
    for index in range(rounds + 1):
        for name, count in probes.items():
            started = time.perf_counter()
            found = getattr(case, name)(count)
            if case.device == "cuda":
                torch.cuda.synchronize()
            if index or rounds == 1:  # the first round warms up
                runs[name].append((time.perf_counter() - started, *found))
        print(f"round {index} of {rounds}", file=sys.stderr)
    seconds = {name: [run[0] for run in own] for name, own in runs.items()}
    ratios = {
        name: [one / own for one, own in zip(values, seconds["hf_fip"], strict=True)]
        for name, values in seconds.items()
    }
    return {
        name: {
            "ratio": statistics.median(ratios[name]),
            "lowest": min(ratios[name]),
            "highest": max(ratios[name]),
            "seconds": statistics.median(seconds[name]),
            "lambda_max": own[-1][1],
            "trace": own[-1][2],
            "probes": probes[name],
            "products": own[-1][3],
        }
        for name, own in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20, help="of training, before anything is measured")
    parser.add_argument("--error", type=float, default=0.05, help="standard error of Tr H, relative to it")
    parser.add_argument("--output", default="results/curvature/cost", help="writes OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    case = Case(args.device, args.images, args.steps)
    print(f"PyHessian reaches it with tol={case.power_tolerance:g}", file=sys.stderr)
    found = measure(case, case.probes(args.error), args.rounds)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    command = " ".join(["python", "benchmarks/curvature_cost.py", *sys.argv[1:]])
    used = versions() | {name: version(name) for name in ("pyhessian", "curvlinops-for-pytorch")}
    result = {"command": command, "machine": machine, "versions": used, "libraries": found}
    lines = [
        "# λ_max and Tr H: seconds beside PyHessian and curvlinops\n",
        f"`{command}` on {machine}; ResNet-18, {args.images} images of 32×32; λ_max to {TOLERANCE:g}, Tr H to a "
        f"standard error of {args.error:.0%}. Ratios to hf_fip in the same round. pyhessian_exact has the tolerance "
        f"at which its λ_max is within that of the exact one, {case.power_tolerance:g}. "
        f"PyHessian {used['pyhessian']}, curvlinops {used['curvlinops-for-pytorch']}, torch {used['torch']}.\n",
        "| library | time | lowest to highest | seconds | λ_max | Tr H | probes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['ratio']:.2f}× | {row['lowest']:.2f} to {row['highest']:.2f} | {row['seconds']:.1f} | "
            f"{row['lambda_max']:.4g} | {row['trace']:.4g} | {row['probes']} |"
        )
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
