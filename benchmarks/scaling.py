"""Memory and time of a purification step, from a formula that is checked against measurements at small sizes.

    python benchmarks/scaling.py [--measure]

The formula. With N trainable numbers of 4 bytes, P processes that share them (FSDP2; 1 otherwise) and A bytes that a
forward pass keeps for its backward pass, a process holds at the peak of a step

    plain fine-tuning   3 N / P + A      weights, gradients, momentum
    FIP                 + 2 N / P        the score G, and the weights at θ + ε G
    with eta_r          + 2 N / P        θ̄ and F̄
    Fast FIP            the same of its shifts alone, beside the frozen weights and their factors U and V
    sharded             + two of the largest layers and what is in none, gathered, with their gradients

A is counted, not guessed: the model runs once with fake tensors, and what autograd keeps is added up. One pass in
three of a plain step is forward, two are backward; the trace adds a backward, a forward and a backward pass at every
k-th step, so FIP takes 1 + 5 / (3 k) times as long. Floating-point operations are counted in the same way.

--measure runs small models for real, each variant in a process of its own, and compares. Writes results/scaling.md and
.json, and the table in recipes/SCALING.md. Sharded models are not measured: the profiler does not see what the threads
that communicate give back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_fip import FIPConfig, FIPSeq2SeqConfig, FIPSeq2SeqTrainer, FIPTrainer, SingularValueConfig
from hf_fip.collapse import CollapseGuard
from hf_fip.hub.report import versions
from hf_fip.sharding import repeated_blocks
from hf_fip.singular.kinds import layer_class_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS, GUIDE = ROOT / "results" / "scaling", ROOT / "recipes" / "SCALING.md"
LAYERS_IN_FLIGHT = 2  # of a sharded model: one at work, the next one gathered ahead
UTILISATION, PEAK = 0.4, 989e12  # of an H100's dense bf16, for the estimates of time
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """A model, its inputs for a batch, and the batch a process of the table gets."""

    name: str
    make: object
    inputs: object
    batch: int


def images(side: int):
    return lambda batch: {
        "pixel_values": torch.zeros(batch, 3, side, side),
        "labels": torch.zeros(batch, dtype=torch.long),
    }


def sentences(source: int, target: int):
    return lambda batch: {
        "input_ids": torch.ones(batch, source, dtype=torch.long),
        "labels": torch.ones(batch, target, dtype=torch.long),
    }


def tokens(length: int):
    return lambda batch: {name: torch.ones(batch, length, dtype=torch.long) for name in ("input_ids", "labels")}


def vit(width: int, depth: int, heads: int, side: int = 224, patch: int = 16):
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    config = ViTConfig(**sizes, intermediate_size=4 * width, image_size=side, patch_size=patch, num_labels=10)
    return lambda: ViTForImageClassification(config)


def resnet(kind: str, hidden: tuple[int, ...], depths: tuple[int, ...]):
    config = ResNetConfig(layer_type=kind, hidden_sizes=list(hidden), depths=list(depths), num_labels=10)
    return lambda: ResNetForImageClassification(config)


def t5(width: int, inner: int, depth: int, heads: int, words: int):
    config = T5Config(
        d_model=width,
        d_kv=64,
        d_ff=inner,
        num_layers=depth,
        num_heads=heads,
        vocab_size=words,
        decoder_start_token_id=0,
    )
    return lambda: T5ForConditionalGeneration(config)


def llama_7b():
    return LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))


TABLE = (
    Size("ResNet-50", resnet("bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)), images(224), 64),
    Size("ViT-B/16", vit(768, 12, 12), images(224), 64),
    Size("ViT-L/16", vit(1024, 24, 16), images(224), 32),
    Size("T5-large", t5(1024, 4096, 24, 16, 32128), sentences(128, 128), 16),
    Size("a decoder of 7B", llama_7b, tokens(512), 2),
)
SMALL = (
    Size("ViT of 5 M", vit(192, 12, 3, side=32, patch=4), images(32), 16),
    Size("ResNet of 11 M", resnet("basic", (64, 128, 256, 512), (2, 2, 2, 2)), images(64), 16),
    Size("T5 of 9 M", t5(256, 1024, 4, 4, 8000), sentences(32, 32), 8),
    Size("ViT of 43 M", vit(768, 6, 12, side=64, patch=8), images(64), 4),
)
VARIANTS = {
    "plain fine-tuning": {"eta_f": 0.0},
    "FIP": {"trace_interval": 1},
    "FIP with eta_r": {"trace_interval": 1, "eta_r": 1.0},
    "Fast FIP": {"trace_interval": 1},
}


# ---- The formula ----


@dataclass(frozen=True)
class Counted:
    """What fake tensors tell of a model.

    Attributes:
        numbers: its parameters.
        factors: numbers in U, σ and V of the layers that Fast FIP adapts.
        shifts: their singular values, which Fast FIP trains.
        largest_layer: numbers of the largest of its repeated layers.
        in_no_layer: numbers of what is in none of them: embeddings, the head.
        kept_bytes, flops: of the forward pass, and of forward and backward pass, of one sample.
    """

    numbers: int
    factors: int
    shifts: int
    largest_layer: int
    in_no_layer: int
    kept_bytes: float
    flops: float


def count(size: Size, half: bool = False) -> Counted:
    """Build a model of fake tensors and run it with one sample and with two: what the second adds is a sample's share.

    Args:
        size: the model.
        half: under bf16 autocast.
    """
    with torch.device("meta"):
        model = size.make()
    with FakeTensorMode():
        _give_fake_tensors(model)
        model.train()
        one, two = (_kept_bytes(model, size.inputs(batch), half) for batch in (1, 2))
        with FlopCounterMode(display=False) as counter:
            model(**size.inputs(1)).loss.backward()
    of_layers = [sum(p.numel() for p in layer.parameters()) for layer in repeated_blocks(model)]
    numbers = sum(p.numel() for p in model.parameters())
    matrices = [kind.matrix_of(m).shape for m in model.modules() if (kind := layer_class_of(m)) is not None]
    return Counted(
        numbers=numbers,
        factors=sum(min(m, n) * (m + n + 1) for *_, m, n in matrices),
        shifts=sum(min(m, n) for *_, m, n in matrices),
        largest_layer=max(of_layers, default=0),
        in_no_layer=numbers - sum(of_layers),
        kept_bytes=two - one,
        flops=counter.get_total_flops(),
    )


def _give_fake_tensors(model: nn.Module) -> None:
    """Put fake tensors of the CPU in the place of those of the meta device, which choose other kernels."""
    fake = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in fake:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    parameter = isinstance(tensor, nn.Parameter)
                    fake[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
                if tensor is not None:
                    own[name] = fake[id(tensor)]


def _kept_bytes(model: nn.Module, inputs: dict[str, Tensor], half: bool) -> int:
    """The bytes that autograd keeps of a forward pass, each storage once, weights left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, or its address would be given to another
        return tensor

    kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with kept, torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(**inputs)
    return sum(storage.nbytes() for storage in storages.values())


def predicted_bytes(counted: Counted, variant: str, batch: int, processes: int = 1) -> float:
    """The formula of the docstring, for one process."""
    copies = {"plain fine-tuning": 3, "FIP": 5, "FIP with eta_r": 7}
    if variant == "Fast FIP":
        held = counted.numbers + counted.factors + copies["FIP"] * counted.shifts
    else:
        held = copies[variant] * counted.numbers
    held = 4 * held / processes
    if processes > 1:
        held += 4 * 2 * (LAYERS_IN_FLIGHT * counted.largest_layer + counted.in_no_layer)
    return held + batch * counted.kept_bytes


def slowdown(interval: int) -> float:
    """How much longer a FIP step takes than a plain one, by passes."""
    return 1 + 5 / (3 * interval)


# ---- Measurements ----


class Repeated(Dataset):
    """The same samples over and over."""

    def __init__(self, inputs: dict[str, Tensor]):
        self.inputs = inputs

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: tensor[row % len(tensor)] for name, tensor in self.inputs.items()}


def make_trainer(size: Size, variant: str, steps: int):
    torch.manual_seed(0)
    model = size.make()
    writes_text = isinstance(model, T5ForConditionalGeneration)
    trainer_class, config = (FIPSeq2SeqTrainer, FIPSeq2SeqConfig) if writes_text else (FIPTrainer, FIPConfig)
    options = dict(VARIANTS[variant], diagonal_samples=8, fisher_chunk_size=1)
    args = config(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=size.batch,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        **options,
    )
    adapter = SingularValueConfig(train_norms=True) if variant == "Fast FIP" else None
    return trainer_class(model, args, train_dataset=Repeated(size.inputs(size.batch)), peft_config=adapter)


def measure_peak(size: Size, variant: str) -> int:
    """The most bytes that torch's allocator held over a few steps, in this process.

    Without the copy of the collapse guard, which is kept in the host's memory and would count here.
    """
    CollapseGuard.begin_update = lambda self, model, step: None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        make_trainer(size, variant, 2).train()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def peak_of(size: Size, variant: str) -> int:
    """`measure_peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", size.name, variant]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def seconds_of(trainer) -> float:
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def time_ratio(size: Size, interval: int, rounds: int) -> float:
    """Seconds of FIP steps over those of plain ones, the median of rounds in which they take turns."""
    ratios = []
    for _ in range(rounds):
        plain, fip = make_trainer(size, "plain fine-tuning", 12), make_trainer(size, "FIP", 12)
        fip.args.trace_interval = interval
        ratios.append(seconds_of(fip) / seconds_of(plain))
    return statistics.median(ratios)


def measure(rounds: int) -> list[dict]:
    rows = []
    for size in SMALL:
        counted = count(size)
        for variant in VARIANTS:
            row = {"model": size.name, "variant": variant, "batch": size.batch}
            row["predicted"] = predicted_bytes(counted, variant, size.batch)
            row["measured"] = peak_of(size, variant)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
        for interval in (1, 4):
            row = {"model": size.name, "interval": interval, "predicted": slowdown(interval)}
            rows.append(row | {"measured": time_ratio(size, interval, rounds)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


# ---- Tables ----


def checked_table(rows: list[dict]) -> str:
    lines = ["| model, batch | step | formula, MB | measured, MB | ratio |", "|---|---|---|---|---|"]
    for row in (row for row in rows if "variant" in row):
        figures = (
            f"{row['predicted'] / 1e6:.0f} | {row['measured'] / 1e6:.0f} | {row['measured'] / row['predicted']:.2f}"
        )
        lines.append(f"| {row['model']}, {row['batch']} | {row['variant']} | {figures} |")
    lines += ["", "| model | trace at every | formula | measured |", "|---|---|---|---|"]
    for row in (row for row in rows if "interval" in row):
        at = "step" if row["interval"] == 1 else f"{row['interval']}th step"
        lines.append(f"| {row['model']} | {at} | {row['predicted']:.2f}× | {row['measured']:.2f}× |")
    return "\n".join(lines)


def estimates() -> str:
    """Memory of a process and seconds of a step, for the models of the guide."""
    head = "| model, samples a process | numbers | plain | FIP | with eta_r | Fast FIP | FIP on 8 | on 64 | seconds |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for size in TABLE:
        counted = count(size, half=True)
        cells = [f"{predicted_bytes(counted, variant, size.batch) / GIB:.1f}" for variant in VARIANTS]
        cells += [f"{predicted_bytes(counted, 'FIP', size.batch, processes) / GIB:.1f}" for processes in (8, 64)]
        seconds = slowdown(4) * size.batch * counted.flops / (UTILISATION * PEAK)
        numbers = f"{counted.numbers / 1e6:,.0f} M"
        lines.append(f"| {size.name}, {size.batch} | {numbers} | {' | '.join(cells)} | {seconds:.2g} |")
    return "\n".join(lines)


def put(text: str, name: str, table: str) -> str:
    """The guide with another table between its marks."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="compare the formula with small models, for real")
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement of time")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        name, variant = args.peak
        print("peak", measure_peak(next(size for size in SMALL if size.name == name), variant), flush=True)
        return
    kept = RESULTS.with_suffix(".json")
    rows = measure(args.rounds) if args.measure else json.loads(kept.read_text())["rows"]
    kept.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")
    title = "# The formula of memory and time, and what was measured\n\n"
    command = f"`python benchmarks/scaling.py --measure --rounds {args.rounds}`, one thread a process, on CPU.\n\n"
    RESULTS.with_suffix(".md").write_text(title + command + checked_table(rows) + "\n", encoding="utf-8")
    text = put(GUIDE.read_text(encoding="utf-8"), "estimates", estimates())
    GUIDE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
