"""The stages and pipelines a person runs: the command line, and the YAML that says what to run."""
