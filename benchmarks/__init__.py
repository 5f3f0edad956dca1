"""Measurements beside peers and the machine's roof: each module of this folder is a command, python -m benchmarks.NAME.

Three kinds live here:

measuring   gpu_suite (all of it), verify, questions, bench_train_step, breakdown, micro, bench_optimizer,
            bench_inference, bench_cpu, bench_loader, augment_parity, loss_curves, roofline; measuring/ is shared
kernels     compile_report, sanitize, tune; in workshop are the uses and the sites of every kernel
results     compare, readme; in reporting are the page, its pictures and the goals

A number is refused where the result is wrong, a row is written as soon as it is measured, and what could not be
measured is a row that says why.
"""
