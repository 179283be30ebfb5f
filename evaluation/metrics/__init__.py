"""The scores as `evaluate` modules, one folder each: `evaluate.load("evaluation/metrics/NAME")`.

They wrap `cortexicon.evaluation.scores`, so the package must be importable. NOTE: the loader reads
import lines one by one; two names on one `import` line would be taken for one missing package.
"""
