"""Checks of every gradient: numerical, planted mistakes, exact facts, traces."""
