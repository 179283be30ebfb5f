"""AVQTokenizer: the text vocabulary of a language model and the fMRI codes in one."""

import json
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from .tokenization_errors import TokenizationError

Ids = TypeVar("Ids", list, np.ndarray, torch.Tensor)

# Name of the attribute -> token. In this order they follow the text vocabulary.
MARKERS = {
    "bof_token": "<fmri>",
    "eof_token": "</fmri>",
    "fmri_token": "<fmri_pad>",
    "fmri_sep_token": "<fmri_sep>",
    "bofc_token": "<fc>",
    "eofc_token": "</fc>",
}


class AVQTokenizer(PreTrainedTokenizerFast):
    """Text ids as in the base tokenizer, then markers, then one block of ids per stream of codes.

    ``id = offset of the block + code``, so codes never pass through strings. How it is made:

    * the codes and markers are *special* tokens and text is split into ordinary pieces by default
      (``split_special_tokens=True``), so no text that a user types yields a code or a control
      token, not even ``"<fmri_3>"`` itself;
    * offsets and block sizes are kept in ``tokenizer_config.json`` through ``init_kwargs``;
    * the markers are named special tokens, known also to a plain ``TokenizersBackend``.

    NOTE: there is no ``__init__`` on purpose. transformers rebuilds the backend of a class that
    defines one and silently drops its pre-tokenizer, so that text would fall into characters.

    Attributes (besides those of any tokenizer)
    -------------------------------------------
    bof_token_id, eof_token_id : ids of ``<fmri>`` and ``</fmri>``, around a scan
    fmri_token_id : id of ``<fmri_pad>``, the placeholder of one code
    fmri_sep_token_id : id of ``<fmri_sep>``, between two windows
    bofc_token_id, eofc_token_id : ids of ``<fc>`` and ``</fc>``, around connectivity codes
    """

    padding_side = "left"

    @property
    def num_codes(self) -> int:
        """Number of codes of the dynamics."""
        return self.init_kwargs["num_codes"]

    @property
    def fmri_offset(self) -> int:
        """Id of ``<fmri_0>``."""
        return self.init_kwargs["fmri_offset"]

    @property
    def num_connectivity_codes(self) -> int:
        """Number of codes of the connectivity."""
        return self.init_kwargs["num_connectivity_codes"]

    @property
    def connectivity_offset(self) -> int:
        """Id of ``<fc_0>`` (where it would be, when there are none)."""
        return self.init_kwargs["connectivity_offset"]

    @classmethod
    def from_text_tokenizer(
        cls,
        text_tokenizer: PreTrainedTokenizerFast,
        num_codes: int,
        num_connectivity_codes: int = 0,
    ) -> "AVQTokenizer":
        """Append the markers and the code blocks to a text tokenizer.

        Parameters
        ----------
        text_tokenizer : PreTrainedTokenizerFast
            Of the language model. It is copied, not changed. Its own control tokens become plain
            text when a user types them. Where it has no padding token, the end-of-text token pads.
        num_codes : int
            Size of the codebook.
        num_connectivity_codes : int
            Size of the connectivity codebook.

        Raises
        ------
        TokenizationError
            No fast tokenizer, sizes that are not positive, or a vocabulary that already holds one
            of the new tokens.
        """
        if not isinstance(text_tokenizer, PreTrainedTokenizerFast):
            raise TokenizationError(
                f"expected a fast (tokenizers-backed) tokenizer, found "
                f"{type(text_tokenizer).__name__}; load it with AutoTokenizer"
            )
        for name, value, least in (
            ("num_codes", num_codes, 1),
            ("num_connectivity_codes", num_connectivity_codes, 0),
        ):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise TokenizationError(
                    f"{name} must be an integer of at least {least}, found {value!r}"
                )
        new = [
            *MARKERS.values(),
            *(f"<fmri_{code}>" for code in range(num_codes)),
            *(f"<fc_{code}>" for code in range(num_connectivity_codes)),
        ]
        backend = _with_control_tokens_special(text_tokenizer.backend_tokenizer)
        known = backend.get_vocab(with_added_tokens=True)
        taken = [token for token in new if token in known]
        if taken:
            raise TokenizationError(
                f"the text tokenizer already holds {len(taken)} of the fMRI tokens, e.g. "
                f"{taken[0]!r} "
                f"(id {known[taken[0]]}); start from the language model's own tokenizer"
            )
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in new]
        )
        ids = backend.get_vocab(with_added_tokens=True)
        first = ids[new[0]]
        if [ids[token] for token in new] != list(range(first, first + len(new))):
            raise TokenizationError(
                "expected one contiguous block of new ids, found gaps: the text tokenizer "
                "numbers its "
                "added tokens irregularly; save it again with save_pretrained, or use another one"
            )
        fmri_offset = first + len(MARKERS)

        named = {
            name: token
            for name, token in text_tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        }
        if "pad_token" not in named:
            named["pad_token"] = named.get("eos_token", MARKERS["fmri_sep_token"])
        return cls(
            tokenizer_object=backend,
            **named,
            extra_special_tokens=dict(MARKERS),
            model_max_length=text_tokenizer.model_max_length,
            clean_up_tokenization_spaces=text_tokenizer.clean_up_tokenization_spaces,
            chat_template=text_tokenizer.chat_template,
            padding_side="left",
            split_special_tokens=True,
            num_codes=int(num_codes),
            fmri_offset=int(fmri_offset),
            num_connectivity_codes=int(num_connectivity_codes),
            connectivity_offset=int(fmri_offset + num_codes),
        )

    def codes_to_ids(self, codes: Ids, stream: str = "fmri") -> Ids:
        """Codes to token ids, by arithmetic.

        Parameters
        ----------
        codes : list, ndarray or Tensor, integers of any shape
        stream : {"fmri", "fc"}
            Dynamics or connectivity.

        Returns
        -------
        list, int64 ndarray or int64 Tensor
            Of the same kind and shape as `codes`.

        Raises
        ------
        TokenizationError
            No integers, or codes outside ``0..num_codes - 1``.
        """
        offset, size = self._block(stream)
        return _shifted(codes, 0, size, offset, f"{stream} codes")

    def ids_to_codes(self, ids: Ids, stream: str = "fmri") -> Ids:
        """Token ids of one code block back to codes; the inverse of :meth:`codes_to_ids`."""
        offset, size = self._block(stream)
        return _shifted(ids, offset, size, -offset, f"ids of {stream} codes")

    def _block(self, stream: str) -> tuple[int, int]:
        if stream == "fmri":
            return self.fmri_offset, self.num_codes
        if stream == "fc" and self.num_connectivity_codes == 0:
            raise TokenizationError("this tokenizer was built without connectivity codes")
        if stream == "fc":
            return self.connectivity_offset, self.num_connectivity_codes
        raise TokenizationError(f"stream must be 'fmri' or 'fc', found {stream!r}")

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; control tokens count in the template only, never in messages."""
        if not kwargs.get("tokenize", True):
            return super().apply_chat_template(conversation, *args, **kwargs)
        kwargs["sanitize_control_tokens"] = True
        # NOTE: the library marks the user's control tokens and encodes the rest of the rendered
        # chat with the tokenizer's default, which must then recognise the template's tokens.
        self.split_special_tokens = False
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        finally:
            self.split_special_tokens = True


def _with_control_tokens_special(backend: Tokenizer) -> Tokenizer:
    """A copy in which every added token is special, but for runs of blanks.

    NOTE: splitting applies to special tokens only. Some language models add control tokens such as
    ``<tool_call>`` as ordinary ones, which text could otherwise still produce.
    """
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["special"] or bool(token["content"].strip())
    return Tokenizer.from_str(json.dumps(description))


def _shifted(values: Ids, lowest: int, size: int, shift: int, what: str) -> Ids:
    """`values` + `shift` as int64, after a check that all lie in lowest..lowest + size - 1."""
    if isinstance(values, torch.Tensor):
        integers = (
            not (values.is_floating_point() or values.is_complex()) and values.dtype != torch.bool
        )
        array: Any = values
    else:
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise TokenizationError(
                f"{what} must be integers in rows of equal length, found a ragged list"
            ) from error
        integers = array.dtype.kind in "iu" or array.size == 0
    if not integers:
        raise TokenizationError(f"{what} must be integers, found values of type {array.dtype}")
    if isinstance(array, np.ndarray):
        array = array.astype(np.int64)
    else:
        array = array.to(torch.int64)
    outside = array[(array < lowest) | (array >= lowest + size)]
    if len(outside):
        raise TokenizationError(
            f"{what} must lie in {lowest}..{lowest + size - 1} ({size} codes), found "
            f"{int(outside[0])} ({len(outside)} outside); were they made with another codebook?"
        )
    moved = array + shift
    return moved.tolist() if isinstance(values, (list, tuple, range)) else moved


AVQTokenizer.register_for_auto_class("AutoTokenizer")
