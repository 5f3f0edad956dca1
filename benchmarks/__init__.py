"""Measurements beside peers and the machine's roof: each module of this folder is a command, python -m benchmarks.NAME.

Three kinds live here, each with a folder for what its commands are made of:

measuring   gpu_suite (all of it), verify, questions, bench_train_step, breakdown, micro, bench_optimizer,
            bench_inference, bench_loader, augment_parity, loss_curves, roofline
workshop    of the kernels: compile_report, sanitize, tune
reporting   of results: compare, readme

A number is refused where the result is wrong, a row is written as soon as it is measured, and what could not be
measured is a row that says why.
"""
