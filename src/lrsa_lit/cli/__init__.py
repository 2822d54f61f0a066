"""The command line: what each command takes, checks and prints. Nothing else of the package speaks YAML."""
