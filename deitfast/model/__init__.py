"""Models: what a DeiT is, by which names it goes, how its weights come and go, and how its blocks are fused.

In the order in which a model is made: `zoo` (names, sizes, published accuracy), `work` (its FLOPs and bytes on
paper), `deit` (plain PyTorch, the reference), `fused` (the same through the kernels, where `fitness` lets them),
`weights` (files of any origin: got by `download`, read by `unpickling`, found by `state_dicts`, checked by `vetting`,
renamed by `convert`, with their `class_names` and `preprocessing`), `factory` (create_model and load_model, the
door), `acceleration` (other libraries' models).
Here is no torch import at the package's level: `zoo` must answer `deitfast models` at once.
"""
