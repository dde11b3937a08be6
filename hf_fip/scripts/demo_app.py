"""A page for the browser: a purified model beside the one that was received, on inputs with the trigger and without.

Choose an image of the test set (or give one of your own), or write a sentence; put the trigger on it; see what both
models say. Below are the figures and the pictures of the purification. The page is served to this machine only.

    pip install "hf-fip[app]"
    hf-fip demo-app                                              (what `make demo` made)
    hf-fip demo-app someone/purified-model --victim path/to/the/received/model
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..attacks.poison import to_array
from ..hub.card import REPORT_NAME
from ..hub.load import reported_revision
from ..hub.safety import CONFIG, LONGEST_REPORT, admit, read_object
from ..side_by_side import MODELS, ImagePair, TextPair
from ..tasks.data import load_images
from ..tasks.image_classification import load_image_classifier, match_labels
from ..tasks.pairs import SOURCE, load_pairs
from ..tasks.seq2seq import load_seq2seq
from .arguments import Parser, word_parser
from .images import ImageTask
from .recorded import attack_folder, attack_of
from .sentences import TextTask
from .terminal import say

SAMPLES = 12  # test inputs to choose from


def main() -> None:
    """`hf-fip demo-app`."""
    arguments = _parser().parse_args()
    if not 1 <= arguments.port <= 65535:
        raise ValueError(f"--port={arguments.port} has to be from 1 to 65535.")
    try:
        from .demo_page import page, serve
    except ImportError as error:
        raise ImportError(f'The page needs Gradio: pip install "hf-fip[app]". ({error})') from error
    made = page(**contents(arguments.model_name_or_path, arguments.victim, arguments.dataset_name))
    say(f"http://127.0.0.1:{arguments.port} (Ctrl-C ends it)")
    serve(made, arguments.port)


def contents(purified: str, victim: str | None = None, dataset_name: str | None = None) -> dict[str, Any]:
    """What the page is made of.

    Args:
        purified: folder or Hub id of a purified model or adapter.
        victim: the same of the model as it was received; else the one that the report of the other names.
        dataset_name: where inputs to choose from come from; else the data of that report.

    Returns:
        `pair`; `samples`, inputs to choose from; `report`, of the purification; and `plots`, paths.

    Raises:
        ValueError: a model cannot be loaded, or is neither an image classifier nor a model that writes text.
    """
    try:
        folder = admit(purified)
    except ValueError as error:
        raise ValueError(f"No model at {purified!r} (`make demo` makes one, outputs/fip): {error}") from error
    report = read_object(folder / REPORT_NAME, LONGEST_REPORT) if (folder / REPORT_NAME).is_file() else {}
    victim, dataset_name = victim or report.get("model"), dataset_name or report.get("data", {}).get("name")
    if not isinstance(victim, str):
        raise ValueError(f"{purified} does not say which model was received: name it, with --victim.")
    try:
        received = admit(victim, revision=reported_revision(folder, victim))
    except ValueError as error:
        raise ValueError(f"No received model at {victim!r}: name its place, with --victim. ({error})") from error
    attack_in = next((str(place) for place in (received, folder) if attack_folder(str(place))), None)
    architectures = str(read_object(received / CONFIG).get("architectures"))
    make = _images if "ForImageClassification" in architectures else _texts
    pair, samples = make(dict(zip(MODELS, (received, folder), strict=True)), attack_in, dataset_name)
    return {"pair": pair, "samples": samples, "report": report, "plots": sorted((folder / "plots").glob("*.png"))}


def _parser() -> Parser:
    parser = word_parser(__doc__)
    parser.add_argument(
        "model_name_or_path",
        nargs="?",
        default="outputs/fip",
        help="the purified model or adapter: a folder or Hub id (default: %(default)s)",
    )
    parser.add_argument("--victim", help="the model as it was received (default: the one that the report names)")
    parser.add_argument("--dataset_name", help="where inputs to choose from come from (default: the report's data)")
    parser.add_argument("--port", type=int, default=7860, help="port of 127.0.0.1 (default: %(default)s)")
    return parser


def _images(folders: dict[str, Path], attack_in: str | None, data: str | None) -> tuple[ImagePair, list]:
    models, processor = _load(folders, load_image_classifier)
    config = models[MODELS[0]].config
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    attack = attack_in and attack_of(ImageTask.poison_arguments(), attack_in, len(names))
    images = _found(load_images, data)
    if images is None:
        return ImagePair(models, processor, names, attack), []
    images = match_labels(images, models[MODELS[0]])
    names = images.class_names if len(images.class_names) == len(names) else names
    classes, rows = np.unique(images.test["label"][:], return_index=True)  # one of each class
    if attack:
        rows = rows[np.argsort(~attack.eligible(classes, len(names)), kind="stable")]  # the target comes last
    samples = images.test.select(rows[:SAMPLES])["image"][:]
    return ImagePair(models, processor, names, attack, to_array(samples[0]).shape), samples


def _texts(folders: dict[str, Path], attack_in: str | None, data: str | None) -> tuple[TextPair, list]:
    models, tokenizer = _load(folders, load_seq2seq)
    samples = []
    if pairs := _found(load_pairs, data):
        samples = pairs.test[SOURCE][:SAMPLES]
    attack = attack_in and attack_of(TextTask.poison_arguments(), attack_in, num_labels=1)
    return TextPair(models, tokenizer, attack), samples


def _load(folders: dict[str, Path], load: Callable[..., tuple]) -> tuple[dict[str, nn.Module], Any]:
    """Both models, and what prepares the inputs of the received one. An adapter is merged into the received model."""
    received, purified = folders.values()
    model, processor = load(str(received))
    other, _ = load(str(purified), base_model=str(received))
    return dict(zip(MODELS, (model, other), strict=True)), processor


def _found(load: Callable[[str], Any], name: str | None) -> Any:
    """The data of that name; None when they are not here: the page does without inputs to choose from."""
    if name is None:
        return None
    try:
        return load(name)
    except ValueError as error:
        say(f"no inputs to choose from (--dataset_name names others): {error}")
        return None
