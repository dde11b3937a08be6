"""What the recipes (and the command line) run: arguments in, one folder out."""
