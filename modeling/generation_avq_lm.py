"""What a language model over text and codes may write: codes only, or one of some answers."""

from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from .configuration_avq import ConfigurationError
from .configuration_avq_lm import AVQLMConfig


class CodesOnly(LogitsProcessor):
    """Leaves the ids of one block of codes and nothing else.

    Parameters
    ----------
    first, count : int
        The block, as `AVQLMForConditionalGeneration.block` gives it.
    """

    def __init__(self, first: int, count: int):
        self.first, self.last = int(first), int(first) + int(count)

    def __call__(self, input_ids, scores):
        """Scores (batch, vocabulary) with -inf outside the block."""
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.first : self.last] = scores[:, self.first : self.last]
        return kept


class AnswersOnly(LogitsProcessor):
    """Leaves, at each step, the tokens that continue one of the valid answers.

    Whatever the tokenizer: an answer may take one token or several, and one may begin another
    (4 and 42), where each ends in the end-of-text id.

    Parameters
    ----------
    answers : sequence of sequences of int
        Ids of each answer, as `AVQProcessor.answer_ids` makes them.
    prompt_length : int
        Ids of the prompt, padding included.
    after : int
        What follows a complete answer: the padding id.

    Raises
    ------
    ConfigurationError
        No answers, or an empty one.
    """

    def __init__(self, answers: Sequence[Sequence[int]], prompt_length: int, after: int):
        if not answers or not all(len(answer) for answer in answers):
            raise ConfigurationError("expected answers of at least one token each, found none")
        self.prompt_length = prompt_length
        self.longest = max(len(answer) for answer in answers)
        self.after = after
        self.following: dict[tuple[int, ...], list[int]] = {}
        for answer in answers:
            for length in range(len(answer)):
                tokens = self.following.setdefault(tuple(answer[:length]), [])
                if answer[length] not in tokens:
                    tokens.append(int(answer[length]))

    def __call__(self, input_ids, scores):
        """Scores (batch, vocabulary) with -inf at what continues no answer."""
        kept = torch.full_like(scores, -torch.inf)
        for row, written in enumerate(input_ids[:, self.prompt_length :].tolist()):
            allowed = self.following.get(tuple(written), [self.after])
            kept[row, allowed] = scores[row, allowed]
        return kept


class ConstrainedGeneration:
    """Methods of `AVQLMForConditionalGeneration` that write codes, answers, and scores of them."""

    config: AVQLMConfig
    block: Callable
    generate: Callable
    device: torch.device

    @torch.no_grad()
    def generate_codes(self, input_ids, stream: str = "fmri", attention_mask=None, **kwargs):
        """Let the model write the codes of one window, or of one scan's connectivity.

        Parameters
        ----------
        input_ids : int64, shape (batch, sequence)
            A prompt; the stream's opening marker is put behind it unless it ends in that, or in
            the separator between windows.
        stream : {"fmri", "fc"}
        attention_mask : int64, shape (batch, sequence), optional
        **kwargs
            Of `generate`, such as do_sample, temperature, or further inputs of a scan. Unless
            `top_k` is given, a code is drawn from all of its block, not from the 50 likeliest.

        Returns
        -------
        int64, shape (batch, tokens of a window or of a matrix)
            Codes: every one is valid, `decode_fmri_tokens(codes + block(stream)[0])` reads them.
        """
        first, count = self.block(stream)
        config = self.config
        tokens, marker = config.avq_config.tokens_per_window, config.bof_token_id
        if stream == "fc":
            tokens, marker = config.connectome_config.num_tokens, config.bofc_token_id
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        last = input_ids[:, -1]
        if not bool(((last == marker) | (last == config.sep_token_id)).all()):
            input_ids = torch.cat([input_ids, torch.full_like(input_ids[:, :1], marker)], 1)
            attention_mask = torch.cat([attention_mask, attention_mask[:, -1:]], 1)
        if kwargs.get("do_sample"):
            kwargs.setdefault("top_k", 0)
        found = self.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([CodesOnly(first, count)]),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            eos_token_id=None,
            **kwargs,
        )
        return found[:, -tokens:] - first

    @torch.no_grad()
    def generate_answer(self, answers: Sequence[Sequence[int]], after: int, **inputs):
        """Let the model write one of `answers`, ids as `AVQProcessor.answer_ids` makes them.

        Parameters
        ----------
        answers : sequence of sequences of int
        after : int
            The padding id.
        **inputs
            What `generate` takes: the output of an `AVQProcessor`, and options.

        Returns
        -------
        int64, shape (batch, tokens of the longest answer)
            New ids, padded with `after`.
        """
        length = inputs["input_ids"].shape[1]
        only = AnswersOnly(answers, length, after)
        found = self.generate(
            logits_processor=LogitsProcessorList([only]),
            max_new_tokens=only.longest,
            eos_token_id=None,
            **inputs,
        )
        return found[:, length:]

    @torch.no_grad()
    def score_options(self, options: Sequence[Sequence[int]], **inputs):
        """Log-probability of each option after the prompt, float32 (batch, options).

        The sum over the option's tokens, without any grammar: exp of a row sums to at most 1, and
        what is missing is the probability of saying something else.

        Parameters
        ----------
        options : sequence of sequences of int
        **inputs
            The output of an `AVQProcessor`: prompts, and scans for their placeholders.
        """
        mask = inputs["attention_mask"]
        columns = []
        for option in options:
            more = torch.tensor([list(option)], device=mask.device).expand(len(mask), -1)
            ids = torch.cat([inputs["input_ids"], more], 1)
            whole = torch.cat([mask, torch.ones_like(more)], 1)
            logits = self(  # type: ignore[operator]
                **{
                    **inputs,
                    "input_ids": ids,
                    "attention_mask": whole,
                    "position_ids": (whole.long().cumsum(1) - 1).clamp(min=0),
                }
            ).logits[:, -len(option) - 1 : -1]
            share = torch.log_softmax(logits.float(), -1)
            columns.append(share.gather(2, more[..., None])[..., 0].sum(1))
        return torch.stack(columns, 1)
