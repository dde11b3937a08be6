"""The page of `hf-fip demo-app`, in Gradio: it asks a pair of models and shows what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image

from ..evaluation.metrics import METRICS
from ..hub.text import in_markdown, one_line
from ..side_by_side import MODELS, ImagePair, TextPair

SHOWN = 256  # pixels of the shorter side of an image, at least
_INTRODUCTION = (
    "# Before and after purification\n"
    "The same input goes to the model as it was **received** and to the **purified** one. Put the attacker's trigger "
    "on it: the received model gives the attacker's answer, the purified one should not."
)
_BUTTONS = ["download", "fullscreen"]  # the others share with the public
_STYLE = "#given img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }"


def page(pair: ImagePair | TextPair, samples: list, report: dict[str, Any], plots: list[Path]) -> gr.Blocks:
    """The page.

    Args:
        pair: the models.
        samples: inputs to choose from.
        report: of the purification; may be empty.
        plots: pictures of the purification.

    Raises:
        ValueError: one of those is no PNG.
    """
    with gr.Blocks(title="hf_fip", analytics_enabled=False) as made:
        gr.Markdown(_INTRODUCTION)
        ask, inputs, outputs = (_image_part if isinstance(pair, ImagePair) else _text_part)(pair, samples)
        asked = [made.load, *(part.change for part in inputs)]
        gr.on(asked, ask, inputs, outputs, trigger_mode="always_last", api_name="ask")
        if report.get("before") and report.get("after"):
            gr.Markdown(_table(report))
        for path in plots:
            gr.Image(_picture(path), show_label=False, interactive=False, buttons=_BUTTONS)
    return made


def serve(made: gr.Blocks, port: int, block: bool = True) -> None:
    """Serve a page to this machine; the browser loads nothing from elsewhere.

    Raises:
        OSError: the port is taken.
    """
    try:
        made.launch(
            server_name="127.0.0.1",
            server_port=port,
            prevent_thread_lock=not block,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=_STYLE,
            footer_links=[],
            ssr_mode=False,
            quiet=True,
        )
    except OSError as error:  # Gradio's names arguments of its own
        raise OSError(f"Port {port} cannot be had: choose another, with --port.") from error


def _image_part(pair: ImagePair, samples: list[PIL.Image.Image]) -> tuple:
    """What to do, with the values of which parts, for which parts."""

    def ask(image: PIL.Image.Image | None, triggered: bool):
        if image is None:
            return None, None, None
        shown, answers = _asked(pair, image, triggered)
        return (_enlarged(shown), *({one_line(name): p for name, p in answers[key].items()} for key in MODELS))

    with gr.Row():
        first = samples[0] if samples else None
        given = gr.Image(
            first, type="pil", image_mode=None, format="png", label="Image", height=300, elem_id="given"
        )  # PNG: the models are to see every pixel as it is
        shown = gr.Image(
            label="As the models see it",
            format="png",
            interactive=False,
            height=300,
            buttons=_BUTTONS,
            elem_id="shown",
        )
    triggered = _checkbox(pair)
    with gr.Row():
        answers = [gr.Label(label=f"The {key} model", num_top_classes=3, elem_id=key) for key in MODELS]
    if samples:
        gallery = gr.Gallery(
            [_enlarged(np.asarray(image.convert("RGB"))) for image in samples],
            label="Test images: choose one",
            columns=len(samples),
            rows=1,
            height=130,
            allow_preview=False,
            object_fit="contain",
            buttons=[],
            elem_id="samples",
        )

        def choose(event: gr.SelectData):
            return samples[event.index]

        gallery.select(choose, None, given)
    return ask, [given, triggered], [shown, *answers]


def _text_part(pair: TextPair, samples: list[str]) -> tuple:
    """As `_image_part`."""

    def ask(source: str, triggered: bool):
        if not source.strip():
            return "", "", ""
        shown, answers = _asked(pair, source, triggered)
        return (shown, *(answers[key] for key in MODELS))

    given = gr.Textbox(samples[0] if samples else "", label="Sentence", elem_id="given")
    triggered = _checkbox(pair)
    shown = gr.Textbox(label="As the models read it", interactive=False, elem_id="shown")
    with gr.Row():
        answers = [gr.Textbox(label=f"The {key} model", interactive=False, elem_id=key) for key in MODELS]
    if samples:
        gr.Examples(samples, given, label="Test sentences: choose one")
    return ask, [given, triggered], [shown, *answers]


def _checkbox(pair: ImagePair | TextPair) -> gr.Checkbox:
    label = "Put the trigger on it" if pair.attack else "No attack is known for these models: there is no trigger"
    return gr.Checkbox(False, label=label, interactive=pair.attack is not None, elem_id="trigger")


def _asked(pair: ImagePair | TextPair, given: Any, triggered: bool) -> tuple:
    try:
        return pair.ask(given, triggered)
    except ValueError as error:
        raise gr.Error(one_line(error)) from error


def _enlarged(image: np.ndarray) -> PIL.Image.Image:
    """A small image with its pixels as squares, so that a browser does not blur them."""
    picture = PIL.Image.fromarray(image.squeeze(2) if image.ndim == 3 and image.shape[2] == 1 else image)
    times = -(-SHOWN // min(picture.size))
    return picture.resize((picture.width * times, picture.height * times), PIL.Image.Resampling.NEAREST)


def _picture(path: Path) -> PIL.Image.Image:
    """A stranger's picture: PIL has readers for other formats that start programs."""
    try:
        return PIL.Image.open(path, formats=("PNG",))
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{one_line(path)} is no PNG: delete it, the page does without.") from error


def _table(report: dict[str, Any]) -> str:
    """Before and after, in Markdown."""
    title = f"`{in_markdown(report['attack'])}`" if report.get("attack") else "No known attack"
    lines = [f"## {title}", "| | received | purified |", "|---|---|---|"]
    for key, before in report["before"].items():
        name = ", ".join(METRICS[key]) if key in METRICS else f"`{in_markdown(key)}`"
        lines.append(f"| {name} | {_percent(before)} | {_percent(report['after'].get(key))} |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f} %"
