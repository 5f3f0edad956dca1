"""Models: what a DeiT is, by which names it goes, how its weights come and go, and how its blocks are fused.

In the order in which a model is made: `zoo` (names, sizes, published accuracy), `deit` (plain PyTorch, the reference),
`fused` (the same through the kernels), `weights` (files of any origin, read by `convert` and `download`, with
`class_names`), `factory` (create_model and load_model, the door), `acceleration` (other libraries' models).
Here is no torch import at the package's level: `zoo` must answer `deitfast models` at once.
"""
