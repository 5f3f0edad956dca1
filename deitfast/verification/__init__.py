"""Whether this machine's GPU does what the kernels ask of it, found out here before anything is trusted to it.

In the order in which it happens: `verify` (what a run or a model uses is looked up or checked, in a process of its own
made by `process`), `check` (one op: right? repeatable? inside its memory? which form is fastest?), which rests on
`judgement` (the rule that decides what is right), `arena` (memory in which a stray read or write shows) and `timing`;
`verdict` is what was found, and where it is kept.
"""
