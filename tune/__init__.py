"""The sweep, from the command line down to files: one package per layer; imports only point down this list.

cli           the `macdrop` command
report        what a run says, in every format
analysis      score rows -> paired comparisons -> verdict
distributed   sweeps on a Ray cluster; nothing else imports Ray
preflight     checks and forecasts before anything starts
trackers      TensorBoard, Weights & Biases, MLflow
scheduling    what to train, when to stop, how often to retry
evaluation    one model, one benchmark, one attack -> score rows
training      one fine-tuning in one process group
forward       forward passes: packed rows, and logits only where they are read
data          rows of text -> token ids
storage       the run folder on disk
config        YAML and key=value -> RunSpec
zoo           the built-in models and data
errors        errors raised on purpose
"""
