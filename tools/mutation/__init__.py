"""Mutation testing: operators, what they change, and the checks that must notice. `tools/mutate.py` runs it."""
