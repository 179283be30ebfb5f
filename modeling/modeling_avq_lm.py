"""A causal language model whose vocabulary holds fMRI codes: it reads, answers and writes them."""

import inspect
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init

from .configuration_avq import ConfigurationError
from .configuration_avq_lm import AVQLMConfig
from .modeling_avq import AVQModel, tensor_sha256


class AVQLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """An `AVQModel` and any causal language model over one vocabulary of text and codes.

    Tricks used, one line each:

    * codes are ordinary tokens: id = block offset + code, so every generation tool of the
      language model works on them;
    * the rows of codes start as P(codebook), bit for bit: where the codec's domain classifier put
      them;
    * the codec is frozen and always in evaluation mode, so a scan's codes never depend on
      training the language model;
    * `fmri_input="features"` feeds continuous projected features at the same places instead, for
      comparison.

    Method names follow the multimodal models of transformers (Chameleon, Emu3, Janus).
    """

    config: AVQLMConfig
    config_class = AVQLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = AVQModel._keep_in_fp32_modules_strict

    def __init__(self, config: AVQLMConfig):
        super().__init__(config)
        self.avq = AVQModel._from_config(config.avq_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        self.train(self.training)

    @torch.no_grad()
    def _init_weights(self, module):
        # Both halves initialise themselves; this is reached only for modules of a foreign language
        # model.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)

    # ------------------------------------------------------------------ making one of two

    @classmethod
    @torch.no_grad()
    def from_avq_and_lm(cls, avq, lm, tokenizer, **config_values):
        """Join a trained codec and a causal language model over the vocabulary of `tokenizer`.

        Parameters
        ----------
        avq : AVQModel
            Its text space must be `lm`'s embedding table (`AVQModel.set_text_space`).
        lm : PreTrainedModel
            Any causal language model with the text vocabulary that `tokenizer` was made from. It is
            resized in place.
        tokenizer : AVQTokenizer
        **config_values
            Further fields of `AVQLMConfig`.

        Returns
        -------
        AVQLMForConditionalGeneration
            Text rows unchanged, ties kept, rows of codes bit-equal to `avq.project_codebook()`.

        Raises
        ------
        ConfigurationError
            Another number of codes, another width, another text vocabulary, or another text table
            than the codec was aligned with.
        """
        if tokenizer.num_codes != avq.config.num_codes:
            raise ConfigurationError(
                f"The tokenizer holds {tokenizer.num_codes} codes, the codec "
                f"{avq.config.num_codes}. Build the tokenizer with "
                "AVQTokenizer.from_text_tokenizer(text_tokenizer, avq.config.num_codes)."
            )
        table = lm.get_input_embeddings().weight
        if table.shape[1] != avq.config.text_width:
            raise ConfigurationError(
                f"The language model's embeddings are {table.shape[1]} wide, the codec projects to "
                f"{avq.config.text_width}. Train the codec for this language model."
            )
        if avq.config.text_table_sha256 not in (None, tensor_sha256(table)):
            raise ConfigurationError(
                f"The codec was aligned with the embedding table of {avq.config.text_model_id!r} "
                f"(sha256 {avq.config.text_table_sha256[:12]}...), found another table (sha256 "
                f"{tensor_sha256(table)[:12]}...). Pass the language model that the codec was "
                "trained with."
            )
        text_rows = tokenizer.bof_token_id  # the first marker follows the text vocabulary
        if text_rows > table.shape[0]:
            raise ConfigurationError(
                f"The tokenizer's text vocabulary has {text_rows} tokens, the language model's "
                f"table {table.shape[0]} rows. Build the tokenizer from this language model's own."
            )
        mean, scale = table.mean(0), (table - table.mean(0)).std()
        # Tables are often padded beyond their vocabulary: new tokens take those rows first.
        size = max(len(tokenizer), table.shape[0])
        # NOTE: the default mean_resizing makes all new rows alike; they are all written below.
        lm.resize_token_embeddings(size, mean_resizing=False)
        generator = torch.Generator().manual_seed(0)
        fresh = torch.randn(size - text_rows, table.shape[1], generator=generator).to(mean)
        rows = [lm.get_input_embeddings().weight]
        output = lm.get_output_embeddings()
        if output is not None and output.weight is not rows[0]:
            rows.append(output.weight)
        for weight in rows:
            weight[text_rows:] = mean + scale * fresh
            weight[tokenizer.fmri_offset : tokenizer.fmri_offset + avq.config.num_codes] = (
                avq.project_codebook()
            )
        config = AVQLMConfig(
            avq_config=avq.config.to_dict(),
            text_config=lm.config.to_dict(),
            fmri_offset=tokenizer.fmri_offset,
            connectivity_offset=tokenizer.connectivity_offset,
            fmri_token_id=tokenizer.fmri_token_id,
            bof_token_id=tokenizer.bof_token_id,
            eof_token_id=tokenizer.eof_token_id,
            sep_token_id=tokenizer.fmri_sep_token_id,
            **config_values,
        )
        model = cls(config)
        model.avq.load_state_dict(avq.state_dict())
        model.language_model.load_state_dict(lm.state_dict())
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    # ------------------------------------------------------------------ scans in and out

    def get_fmri_tokens(
        self, input_values, region_coordinates=None, region_mask=None, time_mask=None
    ):
        """Ids of windows' codes: float32 (windows, time, regions) -> int64 (windows, tokens)."""
        with torch.no_grad():
            codes = self.avq.encode(input_values, region_coordinates, region_mask, time_mask).codes
        return codes + self.config.fmri_offset

    def get_fmri_features(
        self, input_values, region_coordinates=None, region_mask=None, time_mask=None
    ):
        """Embeddings of windows, float32 (windows, tokens, hidden).

        Those of their codes, or continuous ones where the configuration's `fmri_input` says
        "features": P of the unit vectors before quantisation.
        """
        if self.config.fmri_input == "codes":
            ids = self.get_fmri_tokens(input_values, region_coordinates, region_mask, time_mask)
            return self.get_input_embeddings()(ids)
        with torch.no_grad():
            inputs = self.avq._prepare(input_values, region_coordinates, region_mask, time_mask)
            vectors, _ = self.avq._encode(*inputs)
            features = self.avq.projection(F.normalize(vectors.float(), dim=-1))
        return features.to(self.get_input_embeddings().weight.dtype)

    def decode_fmri_tokens(self, ids, region_coordinates=None):
        """Region series of code ids: int64 (windows, tokens) -> float32 (windows, time, regions).

        In z-score units.
        """
        return self.avq.decode(ids - self.config.fmri_offset, region_coordinates).reconstruction

    def _place(self, input_ids, input_values, region_coordinates, region_mask, time_mask):
        """Put a scan's tokens (or features) at its placeholders: inputs of the language model."""
        holes = input_ids == self.config.fmri_token_id
        arguments = (input_values, region_coordinates, region_mask, time_mask)
        if self.config.fmri_input == "codes":
            ids = self.get_fmri_tokens(*arguments)
            self._check_holes(holes, ids.numel())
            return {"input_ids": input_ids.masked_scatter(holes, ids)}
        features = self.get_fmri_features(*arguments)
        self._check_holes(holes, features.shape[0] * features.shape[1])
        embeds = self.get_input_embeddings()(input_ids)
        return {"inputs_embeds": embeds.masked_scatter(holes[..., None], features)}

    def _check_holes(self, holes, count):
        if int(holes.sum()) != count:
            raise ConfigurationError(
                f"The prompts hold {int(holes.sum())} placeholders, the windows give {count} "
                "codes. Make both with one call of the AVQProcessor."
            )

    # ------------------------------------------------------------------ the language model

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        input_values=None,
        region_coordinates=None,
        region_mask=None,
        time_mask=None,
        num_windows=None,
        inputs_embeds=None,
        position_ids=None,
        labels=None,
        **kwargs,
    ):
        """The language model's forward pass; `input_values` fill the placeholders of `input_ids`.

        Parameters
        ----------
        input_ids : int64, shape (batch, sequence)
        attention_mask : bool or int, shape (batch, sequence)
        input_values : float32, shape (windows, time, regions), optional
            All windows of the batch, in the order of the placeholders.
        num_windows : int64, shape (scans,), optional
            Comes with the output of an `AVQProcessor`; the placeholders already say as much.
        position_ids : int64, shape (batch, sequence), optional
            `generate` makes them from the attention mask, so that padding shifts no position.
        labels : int64, shape (batch, sequence), optional

        Returns
        -------
        CausalLMOutputWithPast or the language model's own output
        """
        if input_values is not None and input_ids is not None:
            placed = self._place(
                input_ids, input_values, region_coordinates, region_mask, time_mask
            )
            input_ids, inputs_embeds = placed.get("input_ids"), placed.get("inputs_embeds")
        if inputs_embeds is not None:
            input_ids = None
        takes = inspect.signature(self.language_model.forward).parameters
        if position_ids is not None and "position_ids" in takes:  # not every model has positions
            kwargs["position_ids"] = position_ids
        return self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            labels=labels,
            **kwargs,
        )

    def generate(self, inputs=None, input_values=None, **kwargs):
        """`GenerationMixin.generate`; takes the output of an `AVQProcessor` as it is."""
        scan = {
            key: kwargs.pop(key, None) for key in ("region_coordinates", "region_mask", "time_mask")
        }
        if input_values is not None:
            input_ids = inputs if inputs is not None else kwargs.pop("input_ids")
            placed = self._place(input_ids, input_values, **scan)
            # With features the ids stay beside the embeddings, so that what is returned holds the
            # prompt either way.
            inputs, kwargs = None, {"input_ids": input_ids, **kwargs, **placed}
        return super().generate(inputs, **kwargs)

    def train(self, mode: bool = True):
        """Training mode for the language model only: the codec must not move."""
        super().train(mode)
        # Not in __init__ alone: loading a checkpoint makes new, trainable parameters, and then
        # calls this.
        self.avq.requires_grad_(False)
        self.avq.eval()
        return self

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    def get_decoder(self):
        return self.language_model.get_decoder()


AVQLMConfig.register_for_auto_class()
AVQLMForConditionalGeneration.register_for_auto_class("AutoModel")
