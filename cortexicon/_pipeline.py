"""The `fmri-question-answering` pipeline of transformers: a scan and a question, an answer."""

from typing import TYPE_CHECKING, Any

from transformers import Pipeline

if TYPE_CHECKING:
    from cortexicon.cohorts import ParcelSeries

TASK = "fmri-question-answering"


class FMRIQuestionAnsweringPipeline(Pipeline):
    """Answers questions about scans: ``pipeline("fmri-question-answering", model=FOLDER)``.

    ::

        answer = pipe({"fmri": series, "tr": 2.0}, question="How old is this person?")
        answer["answer"], answer["value"], answer["low"], answer["high"]

    A scan is a `ParcelSeries`, or a dictionary with `fmri` float (time, regions), `tr` in seconds
    and, where they are not the checkpoint's own in their order, `region_labels`; a list of scans
    gives a list of answers. See `cortexicon.inference.ask` for what an answer is made of.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(self, question: str | None = None, **unknown: Any):
        if unknown:
            raise _error(f"has no option {sorted(unknown)[0]!r}; it takes question.")
        return ({} if question is None else {"question": question}), {}, {}

    def preprocess(self, inputs: Any, question: str | None = None) -> dict[str, Any]:
        """The scan as a `ParcelSeries`, and the question."""
        if question is None and isinstance(inputs, dict):
            question = inputs.get("question")
        if not isinstance(question, str):
            raise _error("needs a question: pipe(scan, question='How old is this person?').")
        return {"scan": self._series(inputs), "question": question}

    def _series(self, inputs: Any) -> "ParcelSeries":
        import numpy as np

        from cortexicon.cohorts import ParcelSeries

        if isinstance(inputs, ParcelSeries):
            return inputs
        extractor = self.processor.feature_extractor
        if not isinstance(inputs, dict) or not {"fmri", "tr"} <= set(inputs):
            raise _error("needs a ParcelSeries, or a dictionary with fmri (time, regions) and tr.")
        labels = inputs.get("region_labels")
        return ParcelSeries(
            np.asarray(inputs["fmri"], dtype=np.float32),
            list(extractor.region_labels if labels is None else labels),
            np.asarray(extractor.region_coordinates, dtype=np.float32),
            extractor.atlas,
            inputs["tr"],
            str(inputs.get("subject_id", "scan")),
        )

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        from cortexicon.inference.ask import ask

        answer = ask(self.model, self.processor, model_inputs["scan"], model_inputs["question"])
        return answer._asdict()

    def postprocess(self, model_outputs: dict[str, Any]) -> dict[str, Any]:
        """The fields of `ScanAnswer`; its `text` is called `answer`, as in other pipelines."""
        return {"answer": model_outputs.pop("text"), **model_outputs}


def register() -> None:
    """Make `transformers.pipeline` know the task; safe to call more than once."""
    from transformers import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK, FMRIQuestionAnsweringPipeline, pt_model=AutoModel, type="multimodal"
        )


def _error(message: str) -> Exception:
    from cortexicon.inference import InferenceError

    return InferenceError(f"{TASK} {message}")
