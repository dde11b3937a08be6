"""Weights out of a pickle, in a process that has nothing to lose.

Run as a program, `python -I convert.py FOLDER OUT`, it reads `pytorch_model.bin` (or its shards) by torch's restricted
unpickler, which makes tensors and nothing else, and writes `model.safetensors`.
"""

import json
import resource
import sys
from pathlib import Path

NAME, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def main(folder: Path, out: Path) -> None:
    """Convert the weights of a folder."""
    files = [folder / NAME]
    if not files[0].is_file():
        files = [
            folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        ]
    if any(file.parent != folder or file.is_symlink() and folder.parent.name != "snapshots" for file in files):
        raise ValueError(f"{INDEX} names files elsewhere.")
    size = sum(file.stat().st_size for file in files)
    _limit(memory=32 * 2**30 + 6 * size, file=2**20 + 2 * size, seconds=600 + size // 2**20)

    import torch
    from safetensors.torch import save_file

    tensors = {}
    for file in files:
        for name, tensor in torch.load(file, map_location="cpu", weights_only=True).items():
            if isinstance(name, str) and isinstance(tensor, torch.Tensor):
                tensors[name] = tensor.detach().contiguous().clone()  # tied ones share memory, which no file can
    save_file(tensors, out, metadata={"format": "pt"})


def _limit(memory: int, file: int, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
