"""AVQProcessor: questions and scans (or their codes) to the inputs of the AVQ language model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .columns_avq import Columns, match_columns
from .connectivity_avq import checked_matrices
from .tokenization_errors import TokenizationError

STREAMS = ("fmri", "fc")
# What says which regions the columns of a scan are; both streams need it.
_COLUMN_ARGUMENTS = ("region_labels", "region_coordinates", "atlas")


class AVQProcessor(ProcessorMixin):
    """One AVQFeatureExtractor and one AVQTokenizer behind one call.

    A prompt is ``<fmri> w1 <fmri_sep> w2 ... </fmri>``, then ``<fc> c </fc>``, then the text ids of
    ``"\\nQuestion: {question}\\nAnswer:"``. Each window w is `tokens_per_window` ids of the
    dynamics, c is `connectivity_tokens` ids of the whole scan's connectivity, or as many
    ``<fmri_pad>`` for the model to fill in. Either stream can be left out. Text is tokenised as
    plain text and codes enter as ids, so nothing that a user types becomes a code or a marker.

    Parameters
    ----------
    feature_extractor : AVQFeatureExtractor
    tokenizer : AVQTokenizer
    tokens_per_window : int, optional
        Codes of one window, as in ``AVQConfig.tokens_per_window``. Saved in processor_config.json.
    connectivity_tokens : int, optional
        Codes of one scan's connectivity, as in ``AVQConnectomeConfig.num_tokens``. None: the model
        does not read connectivity. Saved too.
    """

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        tokens_per_window: int | None = None,
        connectivity_tokens: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokens_per_window = _checked_tokens(tokens_per_window, "tokens_per_window")
        self.connectivity_tokens = _checked_tokens(connectivity_tokens, "connectivity_tokens")
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that prompts hold unless a call says otherwise."""
        if self.connectivity_tokens is None:
            return ("fmri",)
        return ("fc",) if self.tokens_per_window is None else STREAMS

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        fmri: Any = None,
        codes: Any = None,
        tr: float | Sequence[float] | None = None,
        tokens_per_window: int | None = None,
        connectivity: Any = None,
        connectivity_codes: Any = None,
        streams: Sequence[str] | None = None,
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
            Repetition time in seconds; required for windows of `fmri`.
        tokens_per_window : int, optional
            Overrides the processor's own.
        connectivity : array (scans, regions, regions) or list of (regions, regions), optional
            Fisher z. Default: computed from `fmri`, the whole scan at its own TR.
        connectivity_codes : integer array (scans, tokens), optional
            Codes of the connectivity stream; their ids stand in the prompt.
        streams : sequence of {"fmri", "fc"}, optional
            What of the scans to use: windows, connectivity, or both. Default: what the model reads
            (`streams` of this processor).
        return_tensors : {"pt", "np", None}
            None gives lists of ids and NumPy arrays of scans.
        **fmri_kwargs
            Further arguments of :meth:`AVQFeatureExtractor.__call__`.

        Returns
        -------
        BatchFeature
            With text or codes: input_ids int64 (prompts, length), padded on the left, and
            attention_mask int64 of the same shape, 0 on padding. With windows: input_values,
            region_coordinates, region_mask, time_mask, num_windows (see the feature extractor).
            With connectivity: connectivity float32 (scans, regions, regions), connectivity_mask
            bool (scans, regions), and region_coordinates.

        Raises
        ------
        TokenizationError
            No input; scans, codes and questions that do not match in number; unknown
            `tokens_per_window`; codes out of range; whatever the feature extractor refuses.
        """
        scan_given = any(given is not None for given in (fmri, connectivity))
        codes_given = any(given is not None for given in (codes, connectivity_codes))
        if text is None and not scan_given and not codes_given:
            raise TokenizationError("expected text, fmri or codes, found none of them")
        if fmri is None and (tr is not None or fmri_kwargs) and connectivity is None:
            given = sorted(fmri_kwargs) + ([] if tr is None else ["tr"])
            raise TokenizationError(f"{', '.join(given)} belong to a scan, but no fmri was given")
        chosen = self._checked_streams(streams)
        tokens = _checked_tokens(tokens_per_window, "tokens_per_window") or self.tokens_per_window
        data: dict[str, Any] = {}
        # One list of blocks per stream; a block is one scan's ids between its markers.
        parts: list[list[list[int]]] = []
        if fmri is not None and "fmri" in chosen:
            data.update(self.feature_extractor(fmri, tr, return_tensors="np", **fmri_kwargs))
        if codes is not None:
            parts.append(
                [
                    self._code_block(scan_codes, tokens, f"codes of scan {index}: ")
                    for index, scan_codes in enumerate(_as_list(codes))
                ]
            )
            self._check_windows(codes, data.get("num_windows"))
        elif "num_windows" in data and text is not None:
            if tokens is None:
                raise TokenizationError(
                    "tokens_per_window is not known: pass it, or build the processor with "
                    "AVQProcessor(..., tokens_per_window=config.tokens_per_window)"
                )
            pads = [self.tokenizer.fmri_token_id] * tokens
            parts.append([self._block([pads] * int(windows)) for windows in data["num_windows"]])

        if connectivity is not None or (fmri is not None and "fc" in chosen):
            columns = {name: fmri_kwargs.get(name) for name in _COLUMN_ARGUMENTS}
            data.update(self._connectivity(fmri, connectivity, columns))
        if connectivity_codes is not None:
            parts.append(self._connectivity_code_blocks(connectivity_codes))
        elif "connectivity" in data and text is not None:
            if self.connectivity_tokens is None:
                raise TokenizationError(
                    "this model does not read connectivity; leave streams and connectivity out, or "
                    "build the processor with AVQProcessor(..., connectivity_tokens=...)"
                )
            pads = [self.tokenizer.fmri_token_id] * self.connectivity_tokens
            parts.append([self._connectivity_block(pads) for _ in data["connectivity"]])

        blocks = _side_by_side(parts)
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

    def prompt_ids(
        self,
        codes: Any,
        question: str,
        connectivity_codes: Any = None,
        num_windows: int = 0,
        connectivity: bool = False,
    ) -> list[int]:
        """Ids of one whole prompt.

        Parameters
        ----------
        codes : integer array (windows, tokens), or None for a prompt without codes of windows
        question : str
        connectivity_codes : integer array (tokens,), optional
        num_windows : int
            Without `codes`: so many windows of placeholders.
        connectivity : bool
            Without `connectivity_codes`: whether placeholders stand for them.
        """
        scan = self.scan_ids(codes, connectivity_codes, num_windows, connectivity)
        return scan + self._text_ids(self.prompt_template(question))

    def scan_ids(
        self,
        codes: Any,
        connectivity_codes: Any = None,
        num_windows: int = 0,
        connectivity: bool = False,
    ) -> list[int]:
        """Ids of one scan between its markers; the part of a prompt before the text.

        Arguments as in `prompt_ids`.
        """
        pad, block = self.tokenizer.fmri_token_id, []
        if codes is not None:
            block = self._code_block(codes, None, "codes: ")
        elif num_windows:
            block = self._block([[pad] * (self.tokens_per_window or 0)] * num_windows)
        if connectivity_codes is not None:
            block += self._connectivity_code_blocks(connectivity_codes)[0]
        elif connectivity:
            block += self._connectivity_block([pad] * (self.connectivity_tokens or 0))
        return block

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

    def _connectivity_block(self, ids: list[int]) -> list[int]:
        return [self.tokenizer.bofc_token_id, *ids, self.tokenizer.eofc_token_id]

    def _connectivity_code_blocks(self, codes: Any) -> list[list[int]]:
        """One block per row of connectivity codes (scans, tokens) or (tokens,)."""
        array = (
            codes.detach().cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
        )
        array = array[None] if array.ndim == 1 else array
        wanted = self.connectivity_tokens
        if array.ndim != 2 or 0 in array.shape or wanted not in (None, array.shape[1]):
            raise TokenizationError(
                f"expected connectivity codes of shape (scans, {wanted or 'tokens'}), found shape "
                f"{array.shape}"
            )
        ids = self.tokenizer.codes_to_ids(array, "fc").tolist()
        return [self._connectivity_block(row) for row in ids]

    def _connectivity(
        self, fmri: Any, connectivity: Any, columns: dict[str, Any]
    ) -> dict[str, np.ndarray]:
        """connectivity, connectivity_mask and region_coordinates of scans or given matrices."""
        extractor = self.feature_extractor
        expected, count = extractor._columns, extractor.num_regions
        found = Columns(columns["atlas"], columns["region_labels"], columns["region_coordinates"])
        if connectivity is not None:
            matrices, masks = checked_matrices(connectivity, count)
            regions = matrices.shape[1]
            order, places = match_columns((0, regions), expected, count, found, "")
            if order is not None:
                matrices, masks = matrices[:, order][:, :, order], masks[:, order]
        else:
            scans = list(fmri) if isinstance(fmri, (list, tuple)) else [fmri]
            rows = [
                extractor.connectivity(
                    scan, **columns, where=f"scan {index}: " if len(scans) > 1 else ""
                )
                for index, scan in enumerate(scans)
            ]
            matrices = np.stack([matrix for matrix, _ in rows])
            masks = np.stack([mask for _, mask in rows])
            _, places = match_columns((0, matrices.shape[1]), expected, count, found, "")
        data = {"connectivity": matrices, "connectivity_mask": masks}
        if places is not None:
            data["region_coordinates"] = places.astype(np.float32)[None]  # (1, regions, 3)
        return data

    def _checked_streams(self, streams: Sequence[str] | None) -> tuple[str, ...]:
        if streams is None:
            return self.streams
        chosen = (streams,) if isinstance(streams, str) else tuple(streams)
        if not chosen or not set(chosen) <= set(STREAMS):
            raise TokenizationError(f"streams must be some of {STREAMS}, found {streams!r}")
        return chosen

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


def _side_by_side(parts: list[list[list[int]]]) -> list[list[int]]:
    """Blocks of each scan, one stream after the other."""
    counts = {len(blocks) for blocks in parts}
    if len(counts) > 1:
        raise TokenizationError(
            f"expected windows and connectivity of the same scans, found "
            f"{' and '.join(str(len(blocks)) for blocks in parts)} scans"
        )
    return [[id_ for block in blocks for id_ in block] for blocks in zip(*parts, strict=True)]


def _checked_tokens(tokens: Any, name: str) -> int | None:
    if tokens is None:
        return None
    if not isinstance(tokens, (int, np.integer)) or isinstance(tokens, bool) or tokens < 1:
        raise TokenizationError(f"{name} must be a positive integer, found {tokens!r}")
    return int(tokens)


AVQProcessor.register_for_auto_class("AutoProcessor")
