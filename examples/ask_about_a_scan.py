"""Text and a scan in one prompt, and what the language model writes.

    python examples/ask_about_a_scan.py runs/demo/lm runs/demo/cohort --question "Age?"

What is typed stays text: no spelling of a code or a marker becomes one.
"""

import argparse

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

import cortexicon  # noqa: F401  (AutoModelForMultimodalLM learns of the model)
from cortexicon.cohorts import load_cohort


def main(argv: list[str] | None = None) -> None:
    """Load, ask, print the likeliest answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("cohort")
    parser.add_argument("--question", default="Age?")
    parser.add_argument("--subject", default=None, help="default: the first")
    arguments = parser.parse_args(argv)

    model = AutoModelForMultimodalLM.from_pretrained(arguments.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    cohort = load_cohort(arguments.cohort)
    scan = cohort.series(arguments.subject or cohort.subject_ids[0])
    inputs = processor(
        text=arguments.question,
        fmri=scan.values,
        tr=scan.tr,
        region_labels=scan.labels,
        # As many windows as the prompts of training had: a scan's length must say nothing.
        window_starts=list(range(model.config.windows_per_prompt)),
    )
    prompt = inputs["input_ids"]
    with torch.inference_mode():
        written = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    text = processor.tokenizer.decode(written.sequences[0, prompt.shape[1] :])
    first = torch.softmax(written.scores[0][0], dim=-1)
    best = first.topk(5)
    print(f"{scan.subject_id}: {prompt.shape[1]} tokens in. {arguments.question}{text}")
    for share, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"  {share:6.1%} {processor.tokenizer.decode([token])!r}")


if __name__ == "__main__":
    main()
