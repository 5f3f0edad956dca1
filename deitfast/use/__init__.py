"""A trained model at work: evaluation, prediction, export, pictures.

`images` (any picture to what evaluation feeds), `inference` (fused, 16 bit, CUDA graphs), `predict` (image in, classes
out), `evaluate` and `eval_plots` (accuracy, calibration, confusion), `attention_maps`, `export` (other formats);
`doctor` (what on this machine would break a run or slow it down).
"""
