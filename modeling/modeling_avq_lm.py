"""A causal language model whose vocabulary holds fMRI codes: it reads, answers and writes them."""

import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init

from .configuration_avq import ConfigurationError
from .configuration_avq_lm import AVQLMConfig
from .modeling_avq import AVQModel, tensor_sha256
from .modeling_avq_connectome import AVQConnectomeModel

# Inputs that belong to the scan; the language model itself knows none of them.
SCAN_INPUTS = (
    "input_values",
    "region_coordinates",
    "region_mask",
    "time_mask",
    "connectivity",
    "connectivity_mask",
)


class AVQLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """An `AVQModel` and any causal language model over one vocabulary of text and codes.

    Tricks used, one line each:

    * codes are ordinary tokens: id = block offset + code, so every generation tool of the
      language model works on them;
    * two streams: "fmri", the dynamics of windows, and "fc", the connectivity of a scan (an
      `AVQConnectomeModel`, optional), each with its own block of ids and its own markers;
    * the rows of codes start as P(codebook), bit for bit: where the codec's domain classifier put
      them;
    * the codecs are frozen and always in evaluation mode, so a scan's codes never depend on
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

    def __init__(self, config: AVQLMConfig):
        super().__init__(config)
        self.avq = AVQModel._from_config(config.avq_config)
        self.connectome = None
        if config.connectome_config is not None:
            self.connectome = AVQConnectomeModel._from_config(config.connectome_config)
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
    def from_avq_and_lm(cls, avq, lm, tokenizer, connectome=None, **config_values):
        """Join trained codecs and a causal language model over the vocabulary of `tokenizer`.

        Parameters
        ----------
        avq : AVQModel
            Its text space must be `lm`'s embedding table (`AVQModel.set_text_space`).
        lm : PreTrainedModel
            Any causal language model with the text vocabulary that `tokenizer` was made from. It is
            resized in place.
        tokenizer : AVQTokenizer
        connectome : AVQConnectomeModel, optional
            The connectivity stream, in the same text space.
        **config_values
            Further fields of `AVQLMConfig`.

        Returns
        -------
        AVQLMForConditionalGeneration
            Text rows unchanged, ties kept, rows of codes bit-equal to each codec's
            `project_codebook()`.

        Raises
        ------
        ConfigurationError
            Another number of codes, another width, another text vocabulary, or another text table
            than a codec was aligned with.
        """
        table = lm.get_input_embeddings().weight
        blocks = [(avq, tokenizer.num_codes, tokenizer.fmri_offset)]
        if connectome is not None:
            offset = tokenizer.connectivity_offset
            blocks.append((connectome, tokenizer.num_connectivity_codes, offset))
        for codec, held, _ in blocks:
            _check_codec(codec, held, table)
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
            for codec, held, offset in blocks:
                weight[offset : offset + held] = codec.project_codebook().to(weight)
        config = AVQLMConfig(
            avq_config=avq.config.to_dict(),
            text_config=lm.config.to_dict(),
            connectome_config=None if connectome is None else connectome.config.to_dict(),
            fmri_offset=tokenizer.fmri_offset,
            connectivity_offset=tokenizer.connectivity_offset,
            fmri_token_id=tokenizer.fmri_token_id,
            bof_token_id=tokenizer.bof_token_id,
            eof_token_id=tokenizer.eof_token_id,
            sep_token_id=tokenizer.fmri_sep_token_id,
            bofc_token_id=tokenizer.bofc_token_id,
            eofc_token_id=tokenizer.eofc_token_id,
            **config_values,
        )
        model = cls(config)
        model.avq.load_state_dict(avq.state_dict())
        if connectome is not None:
            model.connectome.load_state_dict(connectome.state_dict())
        model.language_model.load_state_dict(lm.state_dict())
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    # ------------------------------------------------------------------ scans in and out

    def block(self, stream: str = "fmri") -> tuple[int, int]:
        """First id and number of codes of a stream, "fmri" (dynamics) or "fc" (connectivity).

        Raises
        ------
        ConfigurationError
            No such stream, or a model without the connectivity stream.
        """
        if stream == "fmri":
            return self.config.fmri_offset, self.config.avq_config.num_codes
        if stream != "fc":
            raise ConfigurationError(f"stream must be 'fmri' or 'fc', found {stream!r}.")
        if self.connectome is None:
            raise ConfigurationError(
                "This model was built without the connectivity stream. Give an AVQConnectomeModel "
                "to from_avq_and_lm, or leave connectivity out of the prompt."
            )
        return self.config.connectivity_offset, self.config.connectome_config.num_codes

    @torch.no_grad()
    def get_fmri_tokens(
        self, values, region_coordinates=None, region_mask=None, time_mask=None, stream="fmri"
    ):
        """Ids of a scan's codes, int64 (windows or scans, tokens).

        Parameters
        ----------
        values : float32
            Of stream "fmri" windows (windows, time, regions), z-scored; of stream "fc" matrices
            (scans, regions, regions), Fisher z.
        region_coordinates, region_mask, time_mask
            As in `AVQModel.encode`; "fc" has no `time_mask`.
        stream : {"fmri", "fc"}
        """
        offset, _ = self.block(stream)
        if stream == "fc":
            return self.connectome.encode(values, region_coordinates, region_mask).codes + offset
        encoded = self.avq.encode(
            values, region_coordinates, region_mask, time_mask, codes_only=True
        )
        return encoded.codes + offset

    def get_fmri_features(
        self, values, region_coordinates=None, region_mask=None, time_mask=None, stream="fmri"
    ):
        """Embeddings of a scan's tokens, (windows or scans, tokens, hidden); see `get_fmri_tokens`.

        Those of its codes, or continuous ones where the configuration's `fmri_input` says
        "features": P of the unit vectors before quantisation.
        """
        weight = self.get_input_embeddings().weight
        if self.config.fmri_input == "codes":
            ids = self.get_fmri_tokens(values, region_coordinates, region_mask, time_mask, stream)
            return self.get_input_embeddings()(ids)
        self.block(stream)  # refuses what there is none of
        with torch.no_grad():
            if stream == "fc":
                codec = self.connectome
                inputs = codec._prepare(values, region_coordinates, region_mask)
                vectors = codec._encode(*inputs, codec._mean(None, inputs[1]))
            else:
                codec = self.avq
                inputs = codec._prepare(values, region_coordinates, region_mask, time_mask)
                vectors, _ = codec._encode(*inputs)
            features = codec.projection(F.normalize(vectors.float(), dim=-1))
        return features.to(weight.dtype)

    def decode_fmri_tokens(self, ids, region_coordinates=None, stream="fmri"):
        """What ids of codes, int64 (windows or scans, tokens), stand for.

        Of stream "fmri" series float32 (windows, time, regions) in z-score units, of "fc" matrices
        float32 (scans, regions, regions) of Fisher z.
        """
        codes = ids - self.block(stream)[0]
        if stream == "fc":
            return self.connectome.decode(codes, region_coordinates).matrices
        return self.avq.decode(codes, region_coordinates).reconstruction

    def _place(self, input_ids, scan):
        """Put a scan's tokens (or features) at its placeholders: inputs of the language model."""
        config = self.config
        holes = input_ids == config.fmri_token_id
        # A placeholder after <fc> and before </fc> is one of the connectivity.
        opened = (input_ids == config.bofc_token_id).cumsum(1)
        within = opened > (input_ids == config.eofc_token_id).cumsum(1)
        places = scan.get("region_coordinates")
        values, matrices = scan.get("input_values"), scan.get("connectivity")
        given = {}
        if values is not None:
            masks = scan.get("region_mask"), scan.get("time_mask")
            given["fmri"] = (holes & ~within, (values, places, *masks))
        if matrices is not None:
            mask = scan.get("connectivity_mask")
            given["fc"] = (holes & within, (matrices, places, mask, None))
        codes = config.fmri_input == "codes"
        embeds = None if codes else self.get_input_embeddings()(input_ids)
        for stream, (mine, arguments) in given.items():
            if codes:
                ids = self.get_fmri_tokens(*arguments, stream=stream)
                self._check_holes(mine, ids.numel(), stream)
                input_ids = input_ids.masked_scatter(mine, ids.to(input_ids))
            else:
                features = self.get_fmri_features(*arguments, stream=stream)
                self._check_holes(mine, features.shape[0] * features.shape[1], stream)
                embeds = embeds.masked_scatter(mine[..., None], features.to(embeds))
        return {"input_ids": input_ids} if codes else {"inputs_embeds": embeds}

    def _check_holes(self, holes, count, stream):
        if int(holes.sum()) != count:
            what = "windows" if stream == "fmri" else "matrices"
            raise ConfigurationError(
                f"The prompts hold {int(holes.sum())} placeholders, the {what} give {count} "
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
        connectivity=None,
        connectivity_mask=None,
        inputs_embeds=None,
        position_ids=None,
        labels=None,
        **kwargs,
    ):
        """The language model's forward pass; what is given of a scan fills the placeholders.

        Parameters
        ----------
        input_ids : int64, shape (batch, sequence)
        attention_mask : bool or int, shape (batch, sequence)
        input_values : float32, shape (windows, time, regions), optional
            All windows of the batch, in the order of the placeholders.
        num_windows : int64, shape (scans,), optional
            Comes with the output of an `AVQProcessor`; the placeholders already say as much.
        connectivity : float32, shape (scans, regions, regions), optional
            Fisher z, for the placeholders between `<fc>` and `</fc>`.
        connectivity_mask : bool, shape (scans, regions), optional
            False for regions without a signal in the scan.
        position_ids : int64, shape (batch, sequence), optional
            `generate` makes them from the attention mask, so that padding shifts no position.
        labels : int64, shape (batch, sequence), optional

        Returns
        -------
        CausalLMOutputWithPast or the language model's own output
        """
        scan = {
            "input_values": input_values,
            "region_coordinates": region_coordinates,
            "region_mask": region_mask,
            "time_mask": time_mask,
            "connectivity": connectivity,
            "connectivity_mask": connectivity_mask,
        }
        if input_ids is not None and (input_values is not None or connectivity is not None):
            placed = self._place(input_ids, scan)
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

    def generate(self, inputs=None, **kwargs):
        """`GenerationMixin.generate`; takes the output of an `AVQProcessor` as it is."""
        scan = {key: kwargs.pop(key, None) for key in SCAN_INPUTS}
        if scan["input_values"] is not None or scan["connectivity"] is not None:
            input_ids = inputs if inputs is not None else kwargs.pop("input_ids")
            placed = self._place(input_ids, scan)
            # With features the ids stay beside the embeddings, so that what is returned holds the
            # prompt either way.
            inputs, kwargs = None, {"input_ids": input_ids, **kwargs, **placed}
        return super().generate(inputs, **kwargs)

    def train(self, mode: bool = True):
        """Training mode for the language model only: the codecs must not move."""
        super().train(mode)
        # Not in __init__ alone: loading a checkpoint makes new, trainable parameters, and then
        # calls this.
        for codec in (self.avq, self.connectome):
            if codec is not None:
                codec.requires_grad_(False)
                codec.eval()
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


def _check_codec(codec, held, table):
    """Refuse a codec of another size, width or text table than the vocabulary's."""
    config, what = codec.config, "codec"
    if isinstance(codec, AVQConnectomeModel):
        what = "connectivity codec"
    if held != config.num_codes:
        raise ConfigurationError(
            f"The tokenizer holds {held} codes, the {what} {config.num_codes}. Build the tokenizer "
            "with AVQTokenizer.from_text_tokenizer(text_tokenizer, num_codes, "
            "num_connectivity_codes), each as in the codec's config."
        )
    if table.shape[1] != config.text_width:
        raise ConfigurationError(
            f"The language model's embeddings are {table.shape[1]} wide, the {what} projects to "
            f"{config.text_width}. Train the codec for this language model."
        )
    if config.text_table_sha256 not in (None, tensor_sha256(table)):
        raise ConfigurationError(
            f"The {what} was aligned with the embedding table of {config.text_model_id!r} "
            f"(sha256 {config.text_table_sha256[:12]}...), found another table (sha256 "
            f"{tensor_sha256(table)[:12]}...). Pass the language model that it was trained with."
        )


AVQLMConfig.register_for_auto_class()
AVQLMForConditionalGeneration.register_for_auto_class("AutoModel")
