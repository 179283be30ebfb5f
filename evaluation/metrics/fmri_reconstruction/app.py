"""The page of this metric where it is pushed as a Space."""

import evaluate
from evaluate.utils import launch_gradio_widget

if __name__ == "__main__":
    launch_gradio_widget(evaluate.load("fmri_reconstruction.py"))
