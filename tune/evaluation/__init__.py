"""One model, one benchmark, one attack -> score rows.

The `eval:` block of a run file is an `EvalSpec` (`tune.config.eval_spec`); `jobs(spec)` lists what there is to score,
and a `Scorer`, which keeps model, tasks and data resident, turns an `EvalJob` into rows. `AdapterSlot` swaps adapters
in and out of the resident model.
"""
