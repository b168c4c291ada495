"""The verbs of the `macdrop` command, one module each, named as the verb."""
