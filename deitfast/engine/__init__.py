"""The training step: from a micro-batch on the device to updated weights.

In the order of a step: `engine` (the step itself, plain or flat, captured as a CUDA graph), which takes `drop_path`
(drawn on the host), a `teacher`'s logits, `losses`, `flat` (weights, gradients and moments as flat buffers),
`reduction` (over processes) and `optim` (schedule, parameter groups, the plain engine's optimiser). Beforehand
`memory` says what fits, and `trial` whether a capture is to be trusted.
"""
