"""The Space's page: Gradio components around `space` and `space_pictures`, and nothing else."""

import html
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before Gradio is imported: no page of ours counts its visitors.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np

from cortexicon.cohorts.atlases import Atlas, load_atlas
from cortexicon.inference import Checkpoint, load_checkpoint
from cortexicon.modeling import AVQConnectomeModel

from .space import ScanReading, ask, read_upload, simulate_reading
from .space_connectivity import connectome_of, draw_connectivity, read_connectivity
from .space_limits import ENDINGS, MAX_FILE_BYTES, MAX_QUESTION, SpaceError
from .space_pictures import draw_answer, draw_brain, draw_carpets, draw_codes

logger = logging.getLogger(__name__)

SIMULATED, UPLOADED = "A simulated person", "A file of mine"
#: Seconds after which an upload is deleted, and between two looks for such files.
KEEP_SECONDS = 600
OUR_FAULT = "Something went wrong on our side. It has been logged; try another scan."
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
.cx-title h1 { font-size: 1.7rem; margin: 0 0 .15rem 0; letter-spacing: -.01em; }
.cx-title p { margin: 0; color: #4b5563; max-width: 52rem; }
.cx-facts { display: flex; flex-wrap: wrap; gap: .6rem; }
.cx-fact { flex: 1 1 7.5rem; border: 1px solid #e5e7eb; border-radius: .6rem; padding: .55rem .8rem;
  background: #fff; }
.cx-fact b { display: block; font-size: 1.25rem; line-height: 1.5rem; color: #111827; }
.cx-fact span { color: #6b7280; font-size: .8rem; }
.cx-wrong { border: 1px solid #f1b8a0; background: #fdf3ee; color: #7a2e0b; border-radius: .6rem;
  padding: .7rem .9rem; overflow-wrap: anywhere; }
.cx-answer { font-size: 1.15rem; color: #111827; overflow-wrap: anywhere; }
.cx-answer small { color: #6b7280; font-size: .85rem; display: block; }
.cx-heading h3 { font-size: 1rem; margin: .4rem 0 0 0; }
.cx-heading p { margin: 0; color: #6b7280; font-size: .85rem; }
.cx-picture { border: 1px solid #e5e7eb; border-radius: .6rem; overflow: hidden; padding: .4rem;
  background: #fff; min-height: 9rem; }
#answer-picture { max-width: 44rem; }
.cx-note { color: #6b7280; font-size: .82rem; }
footer { display: none !important; }
"""


def serve(
    checkpoint_folder: str | Path,
    host: str = "127.0.0.1",
    port: int | None = None,
    atlas_folder: str | Path | None = None,
    wait: bool = True,
) -> gr.Blocks:
    """Load a checkpoint and show the page.

    Parameters
    ----------
    checkpoint_folder : path
        A codec, or a language model of codes, which then answers questions.
    host, port : str, int or None
        Where to listen; None takes the first free port from 7860.
    atlas_folder : path, optional
        Holds the label volume of the checkpoint's atlas: visitors' NIfTI files are then read with
        it, unless they bring their own.
    wait : bool
        Serve until interrupted; False returns at once.

    Raises
    ------
    InferenceError
        The checkpoint cannot be loaded.
    CohortError
        `atlas_folder` does not hold the checkpoint's atlas.
    """
    checkpoint = load_checkpoint(checkpoint_folder)
    atlas = None
    name = checkpoint.processor.feature_extractor.atlas
    if atlas_folder is not None:
        atlas = load_atlas(name or "", folder=Path(atlas_folder))
    reading = simulate_reading(0, checkpoint)  # the first visitor need not wait for imports
    draw_carpets(reading), draw_codes(reading), draw_brain(reading)
    page = build_page(checkpoint, atlas, connectome_of(checkpoint))
    page.queue(max_size=16, default_concurrency_limit=1)
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        share=False,
        show_error=False,
        max_file_size=MAX_FILE_BYTES,
        state_session_capacity=64,
        ssr_mode=False,
        footer_links=[],
        css=CSS,
        # Fonts of the visitor's own machine: the page asks no third party for anything.
        theme=gr.themes.Default(
            primary_hue="blue",
            neutral_hue="gray",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
    )
    return page


def build_page(
    checkpoint: Checkpoint, atlas: Atlas | None = None, connectome: AVQConnectomeModel | None = None
) -> gr.Blocks:
    """The page for one checkpoint; `atlas` serves visitors' volumes, `connectome` is its second
    stream.
    """
    config = checkpoint.codec.config
    targets = checkpoint.model.config.targets or [] if checkpoint.model_type == "avq_lm" else []
    questions = [target["question"] for target in targets]
    with gr.Blocks(
        title="Cortexicon",
        analytics_enabled=False,
        delete_cache=(KEEP_SECONDS, KEEP_SECONDS),
        fill_width=True,
    ) as page:
        kept = gr.State(None, time_to_live=2 * KEEP_SECONDS)
        gr.HTML(
            "<h1>Cortexicon</h1><p>Functional MRI as words: a scan becomes "
            f"{checkpoint.tokens_per_window} codes per "
            f"{config.window_length * config.sampling_interval:g} s from a vocabulary of "
            f"{config.num_codes}, the codes become a scan again"
            + (", and a language model that reads them answers." if questions else ".")
            + "</p>",
            elem_classes="cx-title",
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                source = gr.Radio([SIMULATED, UPLOADED], value=SIMULATED, label="Scan")
                with gr.Group(visible=True) as simulated:
                    person = gr.Number(
                        1, label="Person (any number)", precision=0, minimum=0, maximum=999_999
                    )
                with gr.Group(visible=False) as uploaded:
                    scan_file = gr.File(label=f"Scan: {', '.join(ENDINGS)}", height=110)
                    label_file = gr.File(label="Label volume (for NIfTI)", height=110)
                    tr = gr.Number(
                        None, label="TR in seconds (if the file does not say)", minimum=0
                    )
                read_button = gr.Button("Read the scan", variant="primary", elem_id="read")
                if questions:
                    question = gr.Textbox(
                        questions[0],
                        label="Question",
                        max_length=MAX_QUESTION,
                        elem_id="question",
                    )
                    gr.Examples(questions, question, label="It was trained on")
                    ask_button = gr.Button("Ask", elem_id="ask")
                else:
                    question = gr.Textbox("", visible=False)
                    ask_button = gr.Button(visible=False)
                gr.HTML(_notes(checkpoint, atlas), elem_classes="cx-note")
            with gr.Column(scale=3, min_width=480):
                facts = gr.HTML("", elem_id="facts")
                answer = gr.HTML("", elem_id="answer", visible=bool(questions))
                answer_picture = _image("answer-picture", False)
                _heading(
                    "In, and back",
                    "Left every region over time as the encoder reads it, right what the codes "
                    "alone give back. Orange lines part the windows.",
                )
                carpets = _image("carpets")
                _heading(
                    "The codes",
                    "What a language model reads of the scan. Codes of like colour stand for like "
                    "activity.",
                )
                codes = _image("codes")
                _heading("Where the signal is kept", "R² of every region at its place.")
                pictures = [carpets, codes, _image("brain")]
                if connectome is not None:
                    _heading(
                        "Its connectivity",
                        "Left how the series of any two regions go together over the whole scan, "
                        f"right what {connectome.config.num_tokens} further codes give back: the "
                        "stream that holds what is the person's own.",
                    )
                    pictures.append(_image("connectivity"))

        def show(which: str) -> tuple[Any, Any]:
            return gr.update(visible=which == SIMULATED), gr.update(visible=which == UPLOADED)

        def read(
            which: str,
            number: float | None,
            path: str | None,
            labels: str | None,
            seconds: float | None,
            asked: str,
        ) -> list[Any]:
            def work() -> list[Any]:
                if which == UPLOADED:
                    if not path:
                        raise SpaceError("Choose a file first, or take a simulated person.")
                    reading = read_upload(path, checkpoint, seconds or None, atlas, labels)
                else:
                    reading = simulate_reading(int(number or 0), checkpoint)
                drawn = [draw_carpets(reading), draw_codes(reading), draw_brain(reading)]
                if connectome is not None:
                    found = read_connectivity(reading, connectome)
                    drawn.append(draw_connectivity(reading, found))
                said = answer_to(reading, asked) if questions else ["", gr.update(visible=False)]
                return [reading, _facts(reading), *said, *drawn]

            empty = ["", gr.update(value=None, visible=False), *[None] * len(pictures)]
            return guarded(work, lambda text: [None, _wrong(text), *empty])

        def answer_again(reading: ScanReading | None, asked: str) -> list[Any]:
            if reading is None:
                return [_wrong("Read a scan first."), gr.update(value=None, visible=False)]
            return answer_to(reading, asked)

        def answer_to(reading: ScanReading, asked: str) -> list[Any]:
            def work() -> list[Any]:
                found = ask(reading, asked)
                truth = reading.truth.get(found.target, "")
                picture = draw_answer(found, truth)
                shown = gr.update(value=picture, visible=picture is not None)
                return [_answer(found.question, found.text, truth, bool(found.options)), shown]

            return guarded(work, lambda text: [_wrong(text), gr.update(value=None, visible=False)])

        inputs = [source, person, scan_file, label_file, tr, question]
        outputs = [kept, facts, answer, answer_picture, *pictures]
        # Whoever opens the page sees what it does.
        page.load(
            read,
            inputs,
            outputs,
            api_name="open",
            api_visibility="private",
            concurrency_id="model",
        )
        source.change(show, source, [simulated, uploaded], api_visibility="private")
        read_button.click(read, inputs, outputs, api_name="read", concurrency_id="model")
        for event in (ask_button.click, question.submit):
            event(
                answer_again,
                [kept, question],
                [answer, answer_picture],
                api_visibility="private",
                concurrency_id="model",
            )
    return page


def guarded(work: Callable[[], list[Any]], wrong: Callable[[str], list[Any]]) -> list[Any]:
    """What `work` returns, or what `wrong` makes of a message; never a traceback on the page."""
    try:
        return work()
    except SpaceError as error:
        return wrong(str(error))
    except Exception:
        logger.exception("a visitor's scan or question could not be served")
        return wrong(OUR_FAULT)


def _image(name: str, visible: bool = True) -> gr.Image:
    return gr.Image(
        show_label=False,
        format="png",
        interactive=False,
        elem_id=name,
        elem_classes="cx-picture",
        visible=visible,
        container=False,
        buttons=["fullscreen"],
    )


def _heading(title: str, text: str) -> gr.HTML:
    return gr.HTML(f"<h3>{title}</h3><p>{text}</p>", elem_classes="cx-heading")


def _facts(reading: ScanReading) -> str:
    """The figures above the pictures."""
    config, codes = reading.checkpoint.codec.config, reading.codes
    seconds = len(reading.raw) * config.sampling_interval
    bits = codes.size * np.log2(config.num_codes)
    figures = [
        (f"{reading.r2:.2f}", "R² of what comes back"),
        (f"{codes.size}", f"codes for {seconds:g} s"),
        (f"{bits / seconds:.1f} bit/s", "kept of the scan"),
        (f"{int(reading.region_mask.sum())}", f"of {len(reading.region_mask)} regions"),
    ]
    cards = "".join(f'<div class="cx-fact"><b>{a}</b><span>{b}</span></div>' for a, b in figures)
    note = ""
    if not reading.own_regions:
        note = "Another parcellation than the checkpoint's: its regions are read by coordinates."
    if reading.truth:
        known = ", ".join(f"{name} {value}" for name, value in reading.truth.items())
        note = f"This simulated person: {known}."
    note = f'<p class="cx-note">{html.escape(note)}</p>' if note else ""
    return f'<div class="cx-facts">{cards}</div>{note}'


def _answer(question: str, text: str, truth: str, trained: bool) -> str:
    told = f" True: {truth}." if truth else ""
    note = f"A research model: it says nothing reliable about one person.{told}"
    if not trained:
        note = "The model was not trained on this question: take its words for nothing."
    return (
        f'<div class="cx-answer">{html.escape(question)} <b>{html.escape(text)}</b>'
        f"<small>{html.escape(note)}</small></div>"
    )


def _wrong(text: str) -> str:
    return f'<div class="cx-wrong" role="alert">{html.escape(text)}</div>'


def _notes(checkpoint: Checkpoint, atlas: Atlas | None) -> str:
    """What a visitor should know of atlas, uploads and purpose."""
    extractor = checkpoint.processor.feature_extractor
    regions = (
        f"{len(extractor.region_labels)} regions" if extractor.region_labels else "any regions"
    )
    volumes = (
        f"NIfTI is read with {atlas.name}." if atlas else "NIfTI needs its label volume beside it."
    )
    return html.escape(
        f"Trained on {extractor.atlas or 'any atlas'}, {regions}. {volumes} Uploads are deleted "
        f"within {2 * KEEP_SECONDS // 60} minutes. Not for diagnosis."
    )
