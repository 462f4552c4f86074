"""What every other package builds on: errors, settings, array libraries, parameters."""
