"""The `macdrop` command: one file per verb; verbs print, the packages below return values."""
