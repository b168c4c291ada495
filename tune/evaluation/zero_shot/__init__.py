"""Benchmarks of the section `zero_shot`: lm-eval's tasks, and multiple-choice rows of the user's own.

`lm_eval_tasks` is what the other packages see, and the only module that loads without lm-eval. `task_loader` builds
tasks, `documents` checks what they were built from, `harness` puts their requests to the resident model, and
`zero_shot_rows` turns lm-eval's results into score rows.
"""
