"""The sweep, in packages from the top floor down; a package imports only those below it.

    cli            the `macdrop` command: one file per verb
    report         what a run's results say, in every format
    analysis       from score rows to comparisons to a verdict
    distributed    sweeps on a Ray cluster; the only package that imports Ray
    preflight      checks and forecasts made before anything starts
    trackers       TensorBoard, Weights & Biases, MLflow
    scheduling     pure decisions: what to train, when to stop, how often to retry
    evaluation     one model, one benchmark, one attack -> score rows
    training       one fine-tuning in one process group
    data           from rows of text to token ids and label masks
    storage        the run folder on disk
    config         from YAML and `key=value` overrides to a validated spec
    zoo            the built-in tiny models and data
    errors         errors that the sweep raises on purpose, with their exit codes
"""
