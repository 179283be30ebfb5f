"""AVQProcessor: questions and scans (or their codes) to the inputs of the AVQ language model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .tokenization_errors import TokenizationError


class AVQProcessor(ProcessorMixin):
    """One AVQFeatureExtractor and one AVQTokenizer behind one call.

    A prompt is ``<fmri> w1 <fmri_sep> w2 ... </fmri>`` followed by the text ids of
    ``"\\nQuestion: {question}\\nAnswer:"``, where each window w is `tokens_per_window` code ids, or
    as many ``<fmri_pad>`` for the model to fill in. Text is tokenised as plain text and codes enter
    as ids, so nothing that a user types becomes a code or a marker.

    Parameters
    ----------
    feature_extractor : AVQFeatureExtractor
    tokenizer : AVQTokenizer
    tokens_per_window : int, optional
        Codes of one window, as in ``AVQConfig.tokens_per_window``. Saved in processor_config.json.
    """

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        tokens_per_window: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokens_per_window = _checked_tokens(tokens_per_window)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        fmri: Any = None,
        codes: Any = None,
        tr: float | Sequence[float] | None = None,
        tokens_per_window: int | None = None,
        return_tensors: str | None = "pt",
        **fmri_kwargs: Any,
    ) -> BatchFeature:
        """Prepare questions, scans, or both.

        Parameters
        ----------
        text : str or list of str, optional
            Questions. One string serves every scan; a list holds one per scan.
        fmri : array (time, regions) or list of arrays, optional
            Scans. They may have different numbers of windows; `num_windows` tells them apart.
        codes : integer array (windows, tokens) or list of such, optional
            One array per scan. Their ids stand in the prompt in place of ``<fmri_pad>``.
        tr : float or list of float
            Repetition time in seconds; required with `fmri`.
        tokens_per_window : int, optional
            Overrides the processor's own.
        return_tensors : {"pt", "np", None}
            None gives lists of ids and NumPy arrays of scans.
        **fmri_kwargs
            Further arguments of :meth:`AVQFeatureExtractor.__call__`.

        Returns
        -------
        BatchFeature
            With text or codes: input_ids int64 (prompts, length), padded on the left, and
            attention_mask int64 of the same shape, 0 on padding. With fmri: input_values,
            region_coordinates, region_mask, time_mask, num_windows (see the feature extractor).

        Raises
        ------
        TokenizationError
            No input; scans, codes and questions that do not match in number; unknown
            `tokens_per_window`; codes out of range; whatever the feature extractor refuses.
        """
        if text is None and fmri is None and codes is None:
            raise TokenizationError("expected text, fmri or codes, found none of them")
        if fmri is None and (tr is not None or fmri_kwargs):
            given = sorted(fmri_kwargs) + ([] if tr is None else ["tr"])
            raise TokenizationError(f"{', '.join(given)} belong to a scan, but no fmri was given")
        tokens = _checked_tokens(tokens_per_window) or self.tokens_per_window
        data: dict[str, Any] = {}
        blocks: list[list[int]] = []
        if fmri is not None:
            data.update(self.feature_extractor(fmri, tr, return_tensors="np", **fmri_kwargs))
        if codes is not None:
            blocks = [
                self._code_block(scan_codes, tokens, f"codes of scan {index}: ")
                for index, scan_codes in enumerate(_as_list(codes))
            ]
            self._check_windows(codes, data.get("num_windows"))
        elif fmri is not None and text is not None:
            if tokens is None:
                raise TokenizationError(
                    "tokens_per_window is not known: pass it, or build the processor with "
                    "AVQProcessor(..., tokens_per_window=config.tokens_per_window)"
                )
            pads = [self.tokenizer.fmri_token_id] * tokens
            blocks = [self._block([pads] * int(windows)) for windows in data["num_windows"]]

        if text is not None or blocks:
            prompts = self._join(blocks, text)
            data.update(self._pad_left(prompts))
        if return_tensors is None:
            data = {
                key: value.tolist() if key in ("input_ids", "attention_mask") else value
                for key, value in data.items()
            }
        return BatchFeature(data, tensor_type=return_tensors)

    def prompt_template(self, question: str) -> str:
        """The text after the scan, up to where the answer begins."""
        if not isinstance(question, str):
            raise TokenizationError(f"expected text as str, found {type(question).__name__}")
        return f"\nQuestion: {question}\nAnswer:"

    def prompt_ids(self, codes: Any, question: str) -> list[int]:
        """Ids of one whole prompt.

        Parameters
        ----------
        codes : integer array (windows, tokens), or None for a prompt without a scan
        question : str
        """
        block = [] if codes is None else self._code_block(codes, None, "codes: ")
        return block + self._text_ids(self.prompt_template(question))

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of a blank and the answer, then the end-of-text id where the tokenizer has one."""
        if not isinstance(answer, str):
            raise TokenizationError(f"expected text as str, found {type(answer).__name__}")
        end = self.tokenizer.eos_token_id
        return self._text_ids(" " + answer) + ([] if end is None else [end])

    def _text_ids(self, text: str) -> list[int]:
        # NOTE: said explicitly, so that a plain text tokenizer cannot be injected into either.
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _block(self, windows: list[list[int]]) -> list[int]:
        """Window ids between the scan's markers."""
        ids = [self.tokenizer.bof_token_id]
        for index, window in enumerate(windows):
            ids += ([self.tokenizer.fmri_sep_token_id] if index else []) + window
        return [*ids, self.tokenizer.eof_token_id]

    def _code_block(self, codes: Any, tokens: int | None, where: str) -> list[int]:
        array = (
            codes.detach().cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
        )
        if array.ndim != 2 or 0 in array.shape:
            raise TokenizationError(
                f"{where}expected codes of shape (windows, tokens), found shape {array.shape}"
            )
        if tokens is not None and array.shape[1] != tokens:
            raise TokenizationError(
                f"{where}expected {tokens} tokens per window, found {array.shape[1]}; these "
                f"codes come from another checkpoint"
            )
        return self._block(self.tokenizer.codes_to_ids(array).tolist())

    def _check_windows(self, codes: Any, num_windows: np.ndarray | None) -> None:
        """Codes and scans that come together must have the same windows."""
        if num_windows is None:
            return
        found = [len(scan_codes) for scan_codes in _as_list(codes)]
        if found != num_windows.tolist():
            raise TokenizationError(
                f"expected codes of {num_windows.tolist()} windows per scan, as in fmri, found "
                f"{found}"
            )

    def _join(self, blocks: list[list[int]], text: str | Sequence[str] | None) -> list[list[int]]:
        if text is None:
            return blocks
        questions = [text] * max(1, len(blocks)) if isinstance(text, str) else list(text)
        if not questions or (blocks and len(questions) != len(blocks)):
            raise TokenizationError(
                f"expected one question per scan ({len(blocks) or 'at least 1'}), found "
                f"{len(questions)}"
            )
        endings = [self._text_ids(self.prompt_template(question)) for question in questions]
        return [a + b for a, b in zip(blocks or [[]] * len(endings), endings, strict=True)]

    def _pad_left(self, prompts: list[list[int]]) -> dict[str, np.ndarray]:
        longest = max(len(prompt) for prompt in prompts)
        input_ids = np.full((len(prompts), longest), self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = prompt
            attention_mask[row, longest - len(prompt) :] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _as_list(codes: Any) -> list[Any]:
    """Codes per scan: a list or tuple holds scans, a single array is one scan."""
    return list(codes) if isinstance(codes, (list, tuple)) else [codes]


def _checked_tokens(tokens: Any) -> int | None:
    if tokens is None:
        return None
    if not isinstance(tokens, (int, np.integer)) or isinstance(tokens, bool) or tokens < 1:
        raise TokenizationError(f"tokens_per_window must be a positive integer, found {tokens!r}")
    return int(tokens)


AVQProcessor.register_for_auto_class("AutoProcessor")
