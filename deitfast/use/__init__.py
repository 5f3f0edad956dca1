"""A trained model at work: evaluation, prediction, export, pictures.

`images` (any picture to what evaluation feeds), `graphs` (CUDA graphs of a function of images), `inference` (fused, 16
bit, by graphs), `predict` (image in, classes out), `evaluate` and `eval_plots` (accuracy, calibration, confusion; by a
graph), `attention_maps`, `export` (other formats);
`doctor` (what on this machine would break a run or slow it down).
"""
