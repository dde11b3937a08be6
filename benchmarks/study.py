"""The study: victims × purifiers × seeds, one row a run, tables and pictures from the rows.

    python benchmarks/study.py --suite digits
    python benchmarks/study.py --suite cifar10 --cifar10 path/to/cifar10
    python benchmarks/study.py --suite published --cifar10 path/to/cifar10 --victims path/to/victims
    python benchmarks/study.py --suite digits --tables_only
    python benchmarks/study.py --suite digits --results outputs/again --work outputs/again/victims    (from nothing)

A suite's rows are in RESULTS/SUITE.jsonl, its tables in RESULTS/SUITE.md. A run whose row is there is not repeated: a
stopped study goes on where it was. Rows of other settings of a method or victim are dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from study_run import Cell, make_victim, run
from study_suites import SUITES, Places
from study_tables import write
from tqdm.auto import tqdm

RESULTS = Path(__file__).resolve().parent.parent / "results" / "study"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--cifar10", help="folder or Hub id of CIFAR-10, for the suites that use it")
    parser.add_argument("--victims", help="folder of the published victims, for the suite that uses them")
    parser.add_argument("--released_code", help="a clone of the paper's released code: run it too")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these (the names of the table)")
    parser.add_argument("--families", nargs="+", choices=("vit", "resnet"), help="only these")
    parser.add_argument("--attacks", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path("outputs/study"), help="where victims are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows and tables are (results/study)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (a GPU where there is one)")
    parser.add_argument("--again", action="store_true", help="repeat runs that have a row: their code has changed")
    parser.add_argument("--tables_only", action="store_true", help="draw what the results file has")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here.")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the workers and of the victims' training too

    suite = SUITES[args.suite]
    cells = suite(Places(args.cifar10, args.victims, args.released_code))
    everything = suite(Places(args.cifar10, args.victims, args.released_code or "not given"))  # whose rows are kept
    rows_file = args.results / f"{args.suite}.jsonl"
    rows = _rows(rows_file, everything)
    if not args.tables_only:
        wanted = [cell for cell in cells if _is_chosen(cell, args) and (args.again or _key(cell) not in rows)]
        _run_all(wanted, args, rows_file)
        rows = _rows(rows_file, everything)
    places = {name: getattr(args, name) for name in ("cifar10", "victims", "released_code")}
    given = [word for name, value in places.items() if value for word in (f"--{name}", f"path/to/{name}")]
    command = shlex.join(["python", "benchmarks/study.py", "--suite", args.suite, *given])
    found = [rows[_key(cell)] for cell in everything if _key(cell) in rows]
    missing = sum(_key(cell) not in rows for cell in cells)
    if not found:
        raise SystemExit(f"No run of {args.suite} has ended yet.")
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")  # in the suite's order
    title = suite.__doc__.split(":")[0].rstrip(".")
    print(write(args.results, args.suite, command, title, found, missing))


def _run_all(cells: list[Cell], args: argparse.Namespace, rows_file: Path) -> None:
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    failures = []
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        making = {
            pool.submit(make_victim, victim, args.work) for victim in dict.fromkeys(cell.victim for cell in cells)
        }
        for future in tqdm(as_completed(making), total=len(making), desc="victims"):
            future.result()
        running = {pool.submit(run, cell, args.work): cell for cell in cells}
        for future in tqdm(as_completed(running), total=len(running), desc="runs"):
            cell = running[future]
            try:
                row = future.result()
            except Exception as error:
                failures.append(f"{cell.victim.name}, {cell.method.name}: {error!r}")
                continue
            with rows_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    if failures:
        raise SystemExit("These runs failed; the others are kept:\n" + "\n".join(failures))


def _rows(path: Path, cells: list[Cell]) -> dict[str, dict]:
    """The rows of the suite's cells, by their key."""
    if not path.is_file():
        return {}
    keys = {_key(cell) for cell in cells}
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # half a line, of a run that was killed
            continue
        key = json.dumps(row["cell"], sort_keys=True)
        if key in keys:
            rows[key] = row
    return rows


def _key(cell: Cell) -> str:
    return json.dumps(json.loads(json.dumps(cell.key)), sort_keys=True)


def _is_chosen(cell: Cell, args: argparse.Namespace) -> bool:
    victim = cell.victim
    pairs = ((cell.method.name, args.methods), (victim.attack, args.attacks), (victim.seed, args.seeds))
    pairs += ((victim.family, args.families),)
    return all(chosen is None or value in chosen for value, chosen in pairs)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
